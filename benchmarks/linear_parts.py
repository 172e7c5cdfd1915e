"""What a quantized linear layer of many tokens spends its time on, and where memory is mapped anew, on one CPU.

    OMP_NUM_THREADS=1 python benchmarks/linear_parts.py

The parts take turns in one process, each at once and in the blocks of `fraqat.kernels.blocks`: codes of the inputs, the scaled
product by `int_mm`, both gradients. Figures are medians over rounds: CPU time of the process over that of a bf16
linear layer, forward, in the same round; page faults of a call, 4 KiB each. Appends JSON lines to
`docs/results/linear_parts.jsonl` and rewrites the table beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fraqat import __version__
from fraqat.kernels import Operands, blocks, input_gradient, quantize_tokens, weight_gradient
from fraqat.kernels.portable import IntegerMatmul
from machine import commit, device_name

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SHAPES = ("1152x1152", "1152x4608", "4608x1152")
LIMITS = ("_CACHED_BYTES", "_MAX_CACHED_BYTES", "_WHOLE_SUMS_BYTES")
REFERENCE = "bf16 linear layer"

Call = Callable[[], Any]


@contextmanager
def at_once() -> Generator[None]:
    """No blocks."""
    kept = {name: getattr(blocks, name) for name in LIMITS}
    for name in LIMITS:
        setattr(blocks, name, 2**62)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(blocks, name, value)


def whole(call: Call) -> Call:
    """The same call without blocks."""

    def run() -> None:
        with at_once():
            call()

    return run


def parts(num_tokens: int, width: int, out: int) -> dict[str, Call]:
    """The calls of one shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, width, generator=generator).bfloat16()
    grad = torch.randn(num_tokens, out, generator=generator).bfloat16()
    weight_codes = torch.randint(-8, 8, (out, width), generator=generator).to(torch.int8)
    weight, bias = weight_codes.bfloat16(), torch.randn(out, generator=generator)
    codes, token_scale = quantize_tokens(x)
    scale = torch.rand(out, generator=generator) + 0.1
    engine, operands = IntegerMatmul(), Operands(codes, scale, token_scale, None, None, bias, torch.bfloat16)
    prepared = engine.prepare(weight_codes)

    def quantize() -> None:
        quantize_tokens(x)

    def multiply() -> None:
        engine.product(operands, prepared)

    def differentiate_input() -> None:
        input_gradient(grad, scale, weight_codes, torch.bfloat16)

    def differentiate_weight() -> None:
        weight_gradient(grad, token_scale, codes, None, torch.bfloat16, torch.float32)

    calls: dict[str, Call] = {
        "codes of the inputs": quantize,
        "scaled product": multiply,
        "gradient of the input": differentiate_input,
        "gradient of the weight": differentiate_weight,
    }
    both = {f"{name}{suffix}": run for name, call in calls.items() for suffix, run in _ways(call)}
    return {REFERENCE: lambda: nn.functional.linear(x, weight, bias.bfloat16()), **both}


def _ways(call: Call) -> tuple[tuple[str, Call], tuple[str, Call]]:
    return (", at once", whole(call)), ("", call)


@torch.no_grad()
def measure(num_tokens: int, shape: str, rounds: int) -> list[dict[str, Any]]:
    """Every part of one shape, in turns; two rounds before are not counted."""
    width, out = map(int, shape.split("x"))
    calls = parts(num_tokens, width, out)
    times: dict[str, list[float]] = {name: [] for name in calls}
    faults: dict[str, list[int]] = {name: [] for name in calls}
    for index in range(rounds + 2):
        for name, call in calls.items():
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
            call()
            if index > 1:
                times[name].append(time.process_time() - start)
                faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return [_record(name, own, times[REFERENCE], faults[name], num_tokens, shape) for name, own in times.items()]


def _record(
    name: str, own: list[float], other: list[float], faults: list[int], num_tokens: int, shape: str
) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(own, other, strict=True))
    return {
        "benchmark": "linear_parts",
        "part": name,
        "tokens": num_tokens,
        "shape": shape,
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]],
        "page_faults": statistics.median(faults),
        "num_calls": len(own),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "fraqat": __version__,
    }


def write_table(records: list[dict[str, Any]], path: Path) -> None:
    """One row per part, one column per shape and number of tokens; of several measurements the last. A table per machine."""
    pieces = [
        "# Parts of one linear layer\n\nMade by `benchmarks/linear_parts.py`. CPU time over that of a bf16 linear layer's "
        "forward, median with the 10th and 90th percentile; then the page faults of a call."
    ]
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for r in records:
        rows = tables.setdefault(f"{r['device']}, {r['threads']} threads", {})
        low, high = r["ratio_spread"]
        column = f"{r['tokens']} x {r['shape'].replace('x', ' -> ')}"
        cell = f"{r['ratio']:.2f} ({low:.2f} to {high:.2f}); {r['page_faults']:.0f}"
        rows.setdefault(r["part"], {})[column] = cell
    for title, rows in tables.items():
        columns = list(rows[REFERENCE])
        lines = [f"## {title}\n", "| part | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
        lines += [f"| {part} | " + " | ".join(cells.get(c, "") for c in columns) + " |" for part, cells in rows.items()]
        pieces.append("\n".join(lines))
    path.write_text("\n\n".join(pieces) + "\n")


def main() -> None:
    """Measures all shapes and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="as 1152x4608")
    parser.add_argument("--out", type=Path, default=RESULTS / "linear_parts.jsonl")
    arguments = parser.parse_args()
    records = [
        r for tokens in arguments.tokens for shape in arguments.shapes for r in measure(tokens, shape, arguments.rounds)
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    path = arguments.out.with_suffix(".md")
    write_table([json.loads(line) for line in arguments.out.read_text().splitlines()], path)
    print(path.read_text())


if __name__ == "__main__":
    main()
