"""Time and memory of one distillation step on a stack of transformer blocks, ours beside the other ways to train.

    OMP_NUM_THREADS=2 python benchmarks/training_step.py --width 1152 --tokens 1024

Every arm (training_arms.py) is a process of its own on the same work (same seed, data, teacher, loss, AdamW); the processes
take turns, a few steps at a time, so that what else the machine does falls on all of them. On a CPU the figures are ratios to
the first arm, plain distillation. Memory is the peak of the process less what it holds after a step on a tiny stack: the
libraries, which have a column of their own. Appends one JSON line per arm to `docs/results/training_step.jsonl` and rewrites
the table beside it.

`--memory-only` computes no matrix product and no attention: their results are made and filled, and that is all. What a step
allocates is the same but for workspaces inside them, so a machine that is slow at them can tell the memory of a large step.

NVIDIA's ModelOpt pins other versions of what we use, so its arms run in an environment of their own:

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 nvidia-modelopt requests huggingface_hub
    python benchmarks/training_step.py --arms plain ours ModelOpt --peer-python ENV/bin/python
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqat import __version__
from machine import commit, device_name
from training_arms import NAMES, Training, Work

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TINY = {"width": 64, "tokens": 32, "batch": 1, "blocks": 2}
BASELINE = "torchao QAT"
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""Variable of glibc: from this size on, memory that is freed goes back to the machine at once."""


def work_off(name: str, work: Work, device: torch.device, *, memory_only: bool) -> None:
    """One arm: steps as many as each line of standard input says, and answers with their milliseconds."""
    skipped = skip_products() if memory_only else None
    Training(name, replace(work, **TINY), device).step()  # loads what a step needs
    _release_unused()
    libraries_bytes = _resident_bytes()
    training = Training(name, work, device)
    for line in sys.stdin:
        times: list[float] = []
        _reset_peak(device)
        loss = 0.0
        for _ in range(int(line)):
            _synchronize(device)
            start = time.perf_counter()
            loss = training.step()
            _synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
        peak = _peak_bytes(device) - (libraries_bytes if device.type == "cpu" else 0)
        answer = {"times_ms": times, "peak_bytes": peak, "libraries_bytes": libraries_bytes, "loss": loss}
        print(json.dumps(answer), flush=True)
    del skipped


def skip_products() -> torch.library.Library:
    """Replaces products and attention on CPUs by ones that only fill their results, as long as what is returned lives."""

    def filled(tensor: Tensor) -> Tensor:
        return tensor.fill_(1 if tensor.dtype == torch.int32 else 0.01)

    def product(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return filled(left.new_empty(*left.shape[:-1], right.shape[-1], dtype=dtype))

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        sizes = query.transpose(1, 2).shape
        return filled(query.new_empty(sizes)).transpose(1, 2), filled(query.new_empty(sizes[:3], dtype=torch.float32))

    def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tuple(filled(torch.empty_like(tensor)) for tensor in (query, key, value))

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", product, "CPU")
    library.impl("bmm", product, "CPU")
    library.impl("_int_mm", lambda left, right: product(left, right, torch.int32), "CPU")
    library.impl("addmm", lambda bias, left, right, beta=1, alpha=1: product(left, right), "CPU")
    library.impl("_scaled_dot_product_flash_attention_for_cpu", attention, "CPU")
    library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", attention_backward, "CPU")
    return library


def _release_unused() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    if not Path("/proc/self/statm").exists():
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(names: list[str], work: Work, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all arms in turns and returns one record each."""
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    command = [__file__, "--worker", json.dumps(asdict(work)), "--device", arguments.device]
    command += ["--memory-only"] if arguments.memory_only else []
    peer = arguments.peer_python
    workers = {
        name: subprocess.Popen(
            [str(peer) if name.startswith("ModelOpt") else sys.executable, *command, "--arms", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in names
    }
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    start = time.monotonic()
    for index in range(arguments.rounds + 1):  # the first round compiles and warms up
        if index > 1 and time.monotonic() - start > arguments.time_limit_s:
            break
        for name, worker in workers.items():
            answer = _ask(name, worker, arguments.steps if index else arguments.warm_up_steps)
            if index:
                answers[name].append(answer)
            print(f"round {index}: {name}", file=sys.stderr)
    for worker in workers.values():
        worker.communicate("")
    return [_record(name, answers[name], answers[names[0]], work, arguments) for name in names]


def _ask(name: str, worker: subprocess.Popen[str], steps: int) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    while line := worker.stdout.readline():
        if line.startswith('{"times_ms"'):  # a library may greet on standard output
            return json.loads(line)
    raise SystemExit(f"{name} failed, see above")


def _record(
    name: str, rounds: list[dict[str, Any]], plain: list[dict[str, Any]], work: Work, arguments: argparse.Namespace
) -> dict[str, Any]:
    def medians(parts: list[dict[str, Any]]) -> list[float]:
        return [statistics.median(part["times_ms"]) for part in parts]

    ratios = sorted(own / other for own, other in zip(medians(rounds), medians(plain), strict=True))
    times = sorted(time_ms for part in rounds for time_ms in part["times_ms"])
    return {
        "benchmark": "training_step",
        "arm": name,
        **asdict(work),
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "median_ms": statistics.median(times),
        "peak_gib": max(part["peak_bytes"] for part in rounds) / 2**30,
        "libraries_gib": rounds[-1]["libraries_bytes"] / 2**30,
        "loss": rounds[-1]["loss"],
        "num_steps": len(times),
        "malloc_mmap_threshold": os.environ.get(THRESHOLD),
        "memory_only": arguments.memory_only,
        "threads": arguments.threads,
        "device": device_name(arguments.device),
        "torch": torch.__version__,
        "fraqat": __version__,
        "commit": commit(),
    }


def write_table(path: Path) -> None:
    """Rewrites the table from all lines, the newest of every arm and work."""
    newest: dict[str, dict[str, dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        title = (
            f"{record['blocks']} blocks of width {record['width']}, {record['batch']} x {record['tokens']} tokens, "
            f"{record['weights']} weights, {record['device']}, {record['threads']} threads"
        )
        title += ", no autocast" if record.get("autocast") == "none" else ""
        title += f", {THRESHOLD}={size}" if (size := record.get("malloc_mmap_threshold")) else ""
        title += ", memory alone" if record.get("memory_only") else ""
        newest.setdefault(title, {})[record["arm"]] = record
    parts = [
        "# Time and memory of a distillation step\n\nMade by `benchmarks/training_step.py`: teacher, student, backward "
        "pass, AdamW and (ours) new codes, bf16 autocast, all arms\nin turns in one run. Time is the median over rounds of "
        "the ratio to plain distillation, with the least and the greatest. Memory is the\npeak of the process less its "
        "libraries; where there is no column of libraries they are in it. `of torchao` is over torchao's eager QAT\nwith "
        "default settings; `alike` over torchao's arm of the same settings: `lean`, `compiled` or neither. `lean`: the "
        "teacher in int8, AdamW's\nstate in 8 bits, blocks that keep the results of products alone. Tables of memory alone "
        "were made with `--memory-only`."
    ]
    for title in sorted(newest, key=lambda title: ("AMX" not in title, title)):
        parts.append(f"## {title}\n\n" + "\n".join(_rows(newest[title])))
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def _rows(records: dict[str, dict[str, Any]]) -> list[str]:
    has_libraries = all("libraries_gib" in record for record in records.values())
    has_time = not any(record.get("memory_only") for record in records.values())
    head = ["arm", *(["time, ratio", "spread"] if has_time else []), "peak memory, GiB", "of torchao", "alike"]
    head += ["loss"] if has_time else []
    head += ["libraries, GiB"] if has_libraries else []
    rows = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name in NAMES:
        if (record := records.get(name)) is None:
            continue
        low, high = record["ratio_spread"]
        suffix = name[name.index(",") :] if "," in name else ""
        alike = records.get(BASELINE + suffix.removeprefix(", reference"))
        cells = [name, *([f"{record['ratio']:.2f}", f"{low:.2f} to {high:.2f}"] if has_time else [])]
        cells += [f"{record['peak_gib']:.2f}", _over(record, records.get(BASELINE)), _over(record, alike)]
        cells += [f"{record['loss']:.3g}"] if has_time else []
        cells += [f"{record['libraries_gib']:.2f}"] if has_libraries else []
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _over(record: dict[str, Any], other: dict[str, Any] | None) -> str:
    return "" if other is None else f"{record['peak_gib'] / other['peak_gib']:.2f}"


def main() -> None:
    """Compares the arms, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="of the student")
    parser.add_argument("--autocast", choices=("bfloat16", "none"), default="bfloat16")
    parser.add_argument(
        "--arms", nargs="+", choices=NAMES, help="the first is the measure; all but ModelOpt's if left out"
    )
    parser.add_argument("--peer-python", type=Path, help="interpreter of the environment that has ModelOpt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="per round")
    parser.add_argument("--warm-up-steps", type=int, default=3)
    parser.add_argument("--time-limit-s", type=float, default=float("inf"), help="begin no round after it, but one")
    parser.add_argument("--memory-only", action="store_true", help="without products: see above")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.jsonl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.arms or [name for name in NAMES if not name.startswith("ModelOpt")]
    if arguments.worker:
        work_off(
            names[0],
            Work(**json.loads(arguments.worker)),
            torch.device(arguments.device),
            memory_only=arguments.memory_only,
        )
        return
    if arguments.peer_python is None and any(name.startswith("ModelOpt") for name in names):
        parser.error("arms of ModelOpt need --peer-python; how to make its environment is in --help")
    work = Work(
        arguments.width, arguments.tokens, arguments.batch, arguments.blocks, arguments.weights, arguments.autocast
    )
    records = compare(names, work, arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    write_table(arguments.out)
    for record in records:
        print(
            f"{record['arm']:35} {record['ratio']:.2f} {record['ratio_spread']} {record['peak_gib']:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
