"""How start-up, quantization and a training step grow with the size of the model and of its input.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py

Start-up: `quantize_`, then the integer layers with their first codes, for stacks of growing depth and width. Step: forward and
backward of a student by integer products over that of the same stack in bf16, in turns, as tokens, width and depth grow.
Ratios and exponents only: absolute times of a CPU mean little. Writes `docs/results/scaling.jsonl` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fraqat import __version__
from fraqat.nn import IntegerLayers, quantize_

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BASE = {"width": 512, "depth": 4, "tokens": 512}
GROWTH = {"width": (256, 512, 1024, 2048), "depth": (2, 4, 8, 16), "tokens": (128, 512, 2048, 8192)}


def build(width: int, depth: int) -> nn.Module:
    """Feed-forward networks four times as wide, one after the other."""
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)]
    return nn.Sequential(*parts)


def measure(width: int, depth: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Times of one size, in milliseconds, and the ratio of our step to bf16's."""
    plain, student = build(width, depth), build(width, depth)
    quantize_ms = _time_ms(lambda: quantize_(student))
    layers: list[IntegerLayers] = []
    attach_ms = _time_ms(lambda: layers.append(IntegerLayers(student)))
    refresh_ms = statistics.median(_time_ms(layers[0].refresh_) for _ in range(rounds))
    x = torch.randn(tokens, width).bfloat16().requires_grad_()

    def step(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        model.zero_grad()

    for model in (plain, student):
        step(model)
    pairs = [(_time_ms(lambda: step(student)), _time_ms(lambda: step(plain))) for _ in range(rounds)]
    ratios = sorted(own / other for own, other in pairs)
    return {
        "benchmark": "scaling",
        "width": width,
        "depth": depth,
        "tokens": tokens,
        "million_weights": sum(p.numel() for p in student.parameters()) / 1e6,
        "quantize_ms": quantize_ms,
        "attach_ms": attach_ms,
        "refresh_ms": refresh_ms,
        "step_ms": statistics.median(own for own, _ in pairs),
        "plain_step_ms": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "threads": torch.get_num_threads(),
        "device": platform.machine(),
        "torch": torch.__version__,
        "fraqat": __version__,
    }


def _time_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def write_table(records: list[dict[str, Any]], path: Path) -> None:
    """A table per growing size, with the exponent of each time between the two largest sizes."""
    first = records[0]
    parts = [
        "# How cost grows\n\nMade by `benchmarks/scaling.py`: "
        f"{first['threads']} threads of an {first['device']} CPU; stacks of feed-forward networks, base "
        f"{BASE['depth']} deep, {BASE['width']} wide, {BASE['tokens']} tokens.\nTimes are relative to the first row; the last "
        "row is the exponent between the two largest sizes (1 is linear). Ratio: our forward and\nbackward pass over bf16's, "
        "median and spread; new codes, once per optimizer step, are the column before."
    ]
    columns = ("quantize_ms", "attach_ms", "refresh_ms", "step_ms", "plain_step_ms")
    for grown, sizes in GROWTH.items():
        rows = [r for r in records if r["grown"] == grown]
        parts.append(
            f"## {grown}\n\n| {grown} | million weights | quantize_ | integer layers | new codes | step | bf16 step | ratio |\n"
            + "| --- " * 8
            + "|"
        )
        for r in rows:
            cells = [f"{r[c] / rows[0][c]:.2f}" for c in columns]
            low, high = r["ratio_spread"]
            spread = f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})"
            parts[-1] += f"\n| {r[grown]} | {r['million_weights']:.1f} | " + " | ".join([*cells, spread]) + " |"
        steps = math.log(sizes[-1] / sizes[-2])
        exponents = [f"{math.log(rows[-1][c] / rows[-2][c]) / steps:.2f}" for c in columns]
        parts[-1] += "\n| exponent | | " + " | ".join(exponents) + " | |"
    path.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Measures all sizes and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.jsonl")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    for grown, sizes in GROWTH.items():
        for size in sizes:
            records.append(measure(**(BASE | {grown: size}), rounds=arguments.rounds) | {"grown": grown})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_table(records, arguments.out.with_suffix(".md"))
    print(arguments.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
