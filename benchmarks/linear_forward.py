"""One linear layer in inference: float32, bf16, our W4A8 and W4A16, torchao's int8 and W4A8, side by side in one run.

    OMP_NUM_THREADS=1 python benchmarks/linear_forward.py

The ways take turns on the same input; a figure is the median over rounds of the ratio to bf16, or to another `--measure`, with
the least and the greatest. A CPU without bf16 products (AVX2) is slow in bf16: there float32 is the honest measure.
Appends JSON lines to `docs/results/linear_forward.jsonl` and rewrites the table beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fraqat import __version__
from fraqat.kernels import EngineTable
from fraqat.nn import IntegerLayers, QuantSpec, quantize_
from machine import device_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152), (1536, 6144), (2240, 5600))
TOKENS = (1, 64, 1024, 4096)

Call = Callable[[Tensor], Tensor]


def _float32(layer: nn.Linear) -> Call:
    return lambda x: layer(x.float())


def _bf16(layer: nn.Linear) -> Call:
    return layer.bfloat16()


def _w4a8(layer: nn.Linear) -> Call:
    quantize_(model := nn.Sequential(layer.bfloat16()))
    IntegerLayers(model, counts_preparation=False)
    return model


def _w4a16(layer: nn.Linear) -> Call:
    """4-bit codes, unpacked and scaled at each call, inputs in bf16."""
    quantize_(model := nn.Sequential(layer), QuantSpec(activation=None))
    quantized: Any = model[0]
    codes, qparams = quantized.weight_quantizer.codes(quantized.weight)
    packed, scale = torch.stack([codes[:, ::2] + 8, codes[:, 1::2] + 8]).to(torch.uint8), qparams.scale.bfloat16()
    nibbles, bias = packed[0] | (packed[1] << 4), quantized.bias.bfloat16()

    def call(x: Tensor) -> Tensor:
        unpacked = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(1).bfloat16() - 8
        return nn.functional.linear(x, unpacked * scale, bias)

    return call


def _torchao(config_name: str) -> Callable[[nn.Linear], Call]:
    def build(layer: nn.Linear) -> Call:
        from torchao import quantization as ao

        configs: dict[str, Callable[[], Any]] = {
            "int8": ao.Int8DynamicActivationInt8WeightConfig,
            "w4a8": lambda: ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4  # pyright: ignore[reportAttributeAccessIssue]
            ),
        }
        model = nn.Sequential(layer.bfloat16())
        ao.quantize_(model, configs[config_name]())
        return model

    return build


WAYS: dict[str, Callable[[nn.Linear], Call]] = {
    "bf16": _bf16,
    "float32": _float32,
    "ours, W4A8": _w4a8,
    "W4A16, unpacked per call": _w4a16,
    "torchao int8 weights and inputs": _torchao("int8"),
    "torchao W4A8 (Intx)": _torchao("w4a8"),
}


@torch.inference_mode()
def measure(
    num_tokens: int, shape: tuple[int, int], rounds: int, compiled: bool, reference: str
) -> list[dict[str, Any]]:
    """All ways on one shape, in turns."""
    x = torch.randn(num_tokens, shape[0], generator=torch.Generator().manual_seed(0)).bfloat16()
    calls: dict[str, Call] = {}
    for name, build in WAYS.items():
        torch.manual_seed(0)
        with torch.inference_mode(False):
            built: Any = build(nn.Linear(*shape).requires_grad_(False))
        calls[name] = torch.compile(built) if compiled else built
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call(x)
            if index > 1:
                times[name].append(1000 * (time.perf_counter() - start))
    return [
        {"measure": reference} | _record(name, own, times[reference], num_tokens, shape, compiled)
        for name, own in times.items()
    ]


def _record(
    name: str, own: list[float], other: list[float], num_tokens: int, shape: tuple[int, int], compiled: bool
) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(own, other, strict=True))
    return {
        "benchmark": "linear_forward",
        "way": name,
        "compiled": compiled,
        "tokens": num_tokens,
        "in": shape[0],
        "out": shape[1],
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]],
        "median_ms": statistics.median(own),
        "num_calls": len(own),
        "threads": torch.get_num_threads(),
        "engines": [engine.name for engine in EngineTable(torch.device("cpu")).candidates],
        "device": device_name(),
        "torch": torch.__version__,
        "fraqat": __version__,
    }


def write_table(records: list[dict[str, Any]], path: Path) -> None:
    """A table per machine: one row per shape and number of tokens, one column per way; of several measurements the last."""
    mode = "compiled" if records[-1]["compiled"] else "eager"
    parts = [
        f"# One linear layer in inference\n\nMade by `benchmarks/linear_forward.py`, {mode}. Median over calls in turns, with "
        "the 10th and 90th percentile."
    ]
    tables: dict[str, dict[tuple[int, int, int], dict[str, str]]] = {}
    for r in records:
        low, high = r["ratio_spread"]
        title = f"{r['device']}, {r['threads']} threads: time over {r.get('measure', 'bf16')}'s"
        row = tables.setdefault(title, {}).setdefault((r["tokens"], r["in"], r["out"]), {})
        row[r["way"]] = f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})"
    for title, cells in tables.items():
        lines = [f"## {title}\n", "| tokens | in -> out | " + " | ".join(WAYS) + " |"]
        lines.append("| --- " * (2 + len(WAYS)) + "|")
        for (tokens, width, out), row in sorted(cells.items()):
            lines.append(f"| {tokens} | {width} -> {out} | " + " | ".join(row[name] for name in WAYS) + " |")
        parts.append("\n".join(lines))
    path.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Measures all shapes and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compile every way")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--shapes", nargs="+", default=[f"{a}x{b}" for a, b in SHAPES], help="as 1152x4608")
    parser.add_argument("--measure", choices=list(WAYS), default="bf16", help="what times are relative to")
    parser.add_argument("--out", type=Path, default=RESULTS / "linear_forward.jsonl")
    arguments = parser.parse_args()
    records = [
        record
        for num_tokens in arguments.tokens
        for width, out in (map(int, shape.split("x")) for shape in arguments.shapes)
        for record in measure(num_tokens, (width, out), arguments.rounds, arguments.compile, arguments.measure)
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    every = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    write_table([r for r in every if r["compiled"] == arguments.compile], arguments.out.with_suffix(".md"))
    print(arguments.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
