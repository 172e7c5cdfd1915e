"""Time and memory of one distillation step on a stack of transformer blocks, ours beside the other ways to train.

    OMP_NUM_THREADS=2 python benchmarks/training_step.py --width 1152 --tokens 1024

Every arm is a process of its own on the same work (same seed, data, teacher, loss, AdamW); the processes take turns, a few
steps at a time, so that what else the machine does falls on all of them. On a CPU the figures are ratios to plain bf16
distillation. Appends one JSON line per arm to `docs/results/training_step.jsonl` and rewrites the table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fraqat import __version__

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Work:
    """What every arm does.

    Args:
        width: of the tokens.
        tokens: per sample.
        batch: samples.
        blocks: of the stack.
        weights: dtype of the student's weights; autocast to bf16 in any case.
    """

    width: int
    tokens: int
    batch: int
    blocks: int
    weights: str


class Block(nn.Module):
    """A pre-norm transformer block as in DiT: attention with biases, then a GELU network four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // 64
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C] to the same."""
        normed = self.norm_1(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


def build(work: Work) -> nn.Module:
    """The stack, the same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(work.width) for _ in range(work.blocks))).to(getattr(torch, work.weights))


class NaiveFakeQuantLinear(nn.Linear):
    """The straightforward way: both operands rounded in floating point at every call, gradients straight through."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        scale = input.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        x = input + (torch.round(input / scale).clamp(-128, 127) * scale - input).detach()
        scale = self.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / 7
        weight = self.weight + (torch.round(self.weight / scale).clamp(-8, 7) * scale - self.weight).detach()
        return F.linear(x, weight, self.bias)


@dataclass
class Arm:
    """A student and what surrounds its step."""

    student: nn.Module
    before_update: Callable[[], None] = lambda: None
    after_update: Callable[[], None] = lambda: None


def _plain(model: nn.Module) -> Arm:
    return Arm(model)


def _ours(model: nn.Module, engine: str) -> Arm:
    from fraqat.kernels import EngineName
    from fraqat.nn import EngineSpec, IntegerLayers, quantize_

    quantize_(model)
    if engine == "reference":
        return Arm(model)
    layers = IntegerLayers(model, EngineSpec(EngineName(engine)))
    return Arm(model, layers.finish_gradients_, layers.refresh_)


def _torchao(model: nn.Module) -> Arm:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.qat.api import QATStep

    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, "per_channel")  # pyright: ignore[reportAttributeAccessIssue]
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step=QATStep.PREPARE))
    return Arm(model)


def _naive(model: nn.Module) -> Arm:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = NaiveFakeQuantLinear
    return Arm(model)


ARMS: dict[str, Callable[[nn.Module], Arm]] = {
    "plain bf16": _plain,
    "ours": partial(_ours, engine="auto"),
    "ours, reference": partial(_ours, engine="reference"),
    "torchao QAT": _torchao,
    "naive fake quantization": _naive,
}
NAMES = tuple(f"{name}{mode}" for name in ARMS for mode in ("", ", compiled"))


def work_off(name: str, work: Work, device: torch.device) -> None:
    """One arm: steps as many as each line of standard input says, and answers with their milliseconds."""
    base_bytes = _resident_bytes()
    compiled = name.endswith(", compiled")
    teacher = build(work).to(device, torch.bfloat16).eval().requires_grad_(False)
    arm = ARMS[name.removesuffix(", compiled")](build(work).to(device))
    optimizer = torch.optim.AdamW(arm.student.parameters(), LEARNING_RATE, fused=True)
    called_teacher: Any = torch.compile(teacher) if compiled else teacher
    called_student: Any = torch.compile(arm.student) if compiled else arm.student
    generator = torch.Generator(device).manual_seed(1)
    inputs = torch.randn(work.batch, work.tokens, work.width, generator=generator, device=device).bfloat16()
    autocast = torch.autocast(device.type, torch.bfloat16)
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), autocast:
            target = called_teacher(inputs)
        with autocast:
            output = called_student(inputs)
            loss = F.mse_loss(output.float(), target.float())
        loss.backward()
        arm.before_update()
        optimizer.step()
        arm.after_update()

    for line in sys.stdin:
        times: list[float] = []
        _reset_peak(device)
        for _ in range(int(line)):
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
        peak = _peak_bytes(device) - (base_bytes if device.type == "cpu" else 0)
        print(json.dumps({"times_ms": times, "peak_bytes": peak, "loss": loss.item()}), flush=True)


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


def compare(names: list[str], work: Work, rounds: int, steps: int, threads: int, device: str) -> list[dict[str, Any]]:
    """Runs all arms in turns and returns one record each."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(work)), "--device", device]
    workers = {
        name: subprocess.Popen(
            [*command, "--arms", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name in names
    }
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for index in range(rounds + 1):  # the first round compiles and warms up
        for name, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(f"{steps if index else 3}\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise SystemExit(f"{name} failed, see above")
            if index:
                answers[name].append(json.loads(line))
            print(f"round {index}: {name}", file=sys.stderr)
    for worker in workers.values():
        worker.communicate("")
    return [_record(name, answers[name], answers[names[0]], work, threads, device) for name in names]


def _record(
    name: str, rounds: list[dict[str, Any]], plain: list[dict[str, Any]], work: Work, threads: int, device: str
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
        "loss": rounds[-1]["loss"],
        "num_steps": len(times),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "fraqat": __version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
        ).stdout.strip(),
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
        newest.setdefault(title, {})[record["arm"]] = record
    parts = [
        "# Time and memory of a distillation step\n\nMade by `benchmarks/training_step.py`: teacher, student, backward "
        "pass, AdamW and (ours) new codes, bf16 autocast, all arms\nin turns in one run. Time is the median over rounds of "
        "the ratio to plain bf16 distillation, with the least and the greatest; memory is\nthe peak of the process less "
        "what it had before the models were built."
    ]
    for title, records in newest.items():
        rows = ["| arm | time, ratio | spread | peak memory, GiB | loss |", "| --- | --- | --- | --- | --- |"]
        for name in NAMES:
            if record := records.get(name):
                low, high = record["ratio_spread"]
                rows.append(
                    f"| {name} | {record['ratio']:.2f} | {low:.2f} to {high:.2f} | {record['peak_gib']:.2f} | "
                    f"{record['loss']:.3g} |"
                )
        parts.append(f"## {title}\n\n" + "\n".join(rows))
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Compares the arms, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="of the student")
    parser.add_argument("--arms", nargs="+", choices=NAMES, default=list(NAMES), help="the first is the measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="per round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.jsonl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work_off(arguments.arms[0], Work(**json.loads(arguments.worker)), torch.device(arguments.device))
        return
    work = Work(arguments.width, arguments.tokens, arguments.batch, arguments.blocks, arguments.weights)
    records = compare(arguments.arms, work, arguments.rounds, arguments.steps, arguments.threads, arguments.device)
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
