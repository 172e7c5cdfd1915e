"""One full-width transformer block in every target that has a runtime on a PC: time, file and output, in one run.

    python benchmarks/target_latency.py

The blocks of `onnx_latency.py` with random weights and one sample. Each arm is a file that the target's own writer made, loaded
as a user of the target loads it, and is called once before anything is timed: its output must be the student's in PyTorch
within the target's bound, else it is not timed. Then all arms take turns on the same input, on one thread. A figure is the
median over rounds of the ratio of processor times to PyTorch's float32 in the same round. An arm that cannot run here is a row
with its reason. ExecuTorch wants an environment of its own (`docs/targets/executorch.md`): a run from there has all arms.
Appends to `docs/results/target_latency.jsonl` and writes `.md`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from machine import commit
from onnx_latency import BLOCKS, RESULTS, TOKENS, Block, Call, ratios_to, timed
from onnx_profile import cpu_name
from target_arms import ARMS, BASE, FLOAT, OPEN, PYTORCH, Arm, Case, NotRunError, compare, make

LIBRARIES = ("torch", "torchao", "onnxruntime", "executorch", "diffusers", "fraqat")
ELSEWHERE = {
    "gguf": "its runtimes are llama.cpp and stable-diffusion.cpp; neither comes with this package, and neither was run here",
    "vllm": "language models alone, and vLLM needs a GPU",
    "qualcomm": "runs on a phone; the emulator that a PC has says nothing about time",
}

OWN_FLOAT = {"onnx": "onnx", "onnx-qdq": "onnx", "executorch-xnnpack": "executorch-xnnpack"}
"""Target -> the one whose float32 arm is the same runtime's; PyTorch for the others."""


def measure_block(
    block: Block, tokens: int, rounds: int, arms: tuple[Arm, ...], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The record of one block.

    Args:
        block: Which.
        tokens: Of the picture, a square number.
        rounds: How often each arm is timed.
        arms: PyTorch's float32 is among them.
        say: Told how far it is.
    """
    load = os.getloadavg()[0]
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        case = Case(block, tokens, Path(folder))
        for arm in arms:
            try:
                made = make(case, arm)
                sizes = {"num_bytes": made.num_bytes, "num_layers": made.num_layers}
                found[arm.name] = {**compare(arm, made, case.float_output), **sizes, **made.notes()}
                calls[arm.name] = made.call
            except NotRunError as error:
                found[arm.name] = {"reason": str(error)}
            say(f"{block.title}, {arm.name}: {found[arm.name]}")
        seconds, busy = timed(calls, rounds)
    by_clock = ratios_to(BASE, seconds)
    for name, ratios in ratios_to(BASE, busy).items():
        found[name] |= {"ratios": ratios, "clock_ratios": by_clock[name]}
    return {
        "block": block.title,
        "tokens": tokens,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": [load, os.getloadavg()[0]],
        "float32_seconds": statistics.median(busy[BASE]),
        "busy_threads": {n: statistics.median(b / s for b, s in zip(busy[n], seconds[n], strict=True)) for n in calls},
        "arms": found,
        "versions": _versions(),
        "commit": commit(),
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def to_table(record: dict[str, Any]) -> list[str]:
    """A record's lines of Markdown."""
    arms, base = record["arms"], record["arms"][BASE]
    own = {a.name: f"{OWN_FLOAT.get(a.target, PYTORCH)}, {FLOAT}" for a in ARMS}
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    libraries = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        "",
        f"## {record['block']}, {record['tokens']} tokens, {threads}, {record['cpu']}",
        "",
        f"{record['rounds']} rounds; PyTorch's float32 took {record['float32_seconds']:.2f} s. Load of the machine "
        f"({record['cores']} cores) before",
        f"and after: {record['load'][0]:.1f} and {record['load'][1]:.1f}. {libraries}.",
        "",
        "| target | layers | time | spread | clock | own float32 | file | student, dB | float32, dB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in ARMS:
        name, target, width = row.name, row.target, row.width
        arm = arms.get(name, {"reason": "left out of this run"})
        if "reason" in arm:
            lines.append(f"| {target} | {width} | not run: {arm['reason']} | | | | | | |")
            continue
        ratios, own_arm = arm["ratios"], arms.get(own[name], {"reason": ""})
        if "ratios" in own_arm:
            own_ratio = statistics.median(a / b for a, b in zip(ratios, own_arm["ratios"], strict=True))
        else:
            own_ratio = math.nan
        cells = [
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(arm['clock_ratios']):.3f}",
            "-" if math.isnan(own_ratio) else f"{own_ratio:.3f}",
            f"{arm['num_bytes'] / base['num_bytes']:.3f}",
            *("equal" if arm[key] is None else f"{arm[key]:.1f}" for key in ("student_db", "float32_db")),
        ]
        quantized_layers_text = f", {arm['num_layers']} layers" if arm["num_layers"] else ""
        lines.append(f"| {target} | {width}{quantized_layers_text} | {' | '.join(cells)} |")
    return lines


def write_table(path: Path) -> None:
    """The record with the most targets of every block and processor as Markdown; of equals the newest."""
    fullest: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        key = record["block"], record["cpu"], record["tokens"]
        if key not in fullest or len(record["arms"]) >= len(fullest[key]["arms"]):
            fullest[key] = record
    lines = [
        "# Time and file of one full-width block, target by target",
        "",
        "Made by `benchmarks/target_latency.py`: random weights, one sample, all arms in turns on the same input in one run.",
        "Each file was written by the target's own writer and loaded by its own runtime. Figures are ratios to PyTorch's",
        "float32: `time` is the processor time of the process, which other work on the machine stretches less than the",
        "clock's (`clock`), the median over rounds with the least and the greatest; `own float32` is the ratio to float32 in",
        "the same runtime; `file` is against float32 in safetensors. Before anything was timed each output was compared with",
        "that of its student in PyTorch (`student`) and with the float model's (`float32`: what rounding itself costs).",
        "",
        "`onnx` in bf16 is `--float-dtype bfloat16`: stored so, widened to float32 before it is used. In float32 and bf16",
        "`packed` and `torchao` are PyTorch, and their rows are PyTorch's; in float32 `onnx-qdq` is `onnx`.",
        "",
        "Targets without a row:",
        "",
        *(f"- `{name}`: {reason}." for name, reason in ELSEWHERE.items()),
    ]
    for record in fullest.values():
        lines += to_table(record)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measures the blocks asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=TOKENS, help="tokens of the picture, a square number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", nargs="+", choices=[b.recipe for b in BLOCKS], default=[b.recipe for b in BLOCKS])
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=[PYTORCH, *OPEN],
        default=[PYTORCH, *OPEN],
        help="with PyTorch's float32; the page shows a run with fewer targets only where there is no fuller one",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "target_latency.jsonl")
    arguments = parser.parse_args()
    if math.isqrt(arguments.size) ** 2 != arguments.size or arguments.size < 1:
        parser.error(f"--size {arguments.size} is not possible: allowed is a square number. Fix: pass 256 or 1024.")
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads are at least 1. Fix: pass 1 or more.")
    torch.set_num_threads(arguments.threads)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    arms = tuple(arm for arm in ARMS if arm.name == BASE or arm.target in arguments.targets)
    for block in BLOCKS:
        if block.recipe in arguments.blocks:
            record = measure_block(block, arguments.size, arguments.rounds, arms)
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            print("\n".join(to_table(record)))
    write_table(arguments.out)


if __name__ == "__main__":
    main()
