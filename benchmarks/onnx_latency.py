"""One full-width transformer block in inference: float32, bf16, W4A16 and W4A8, in ONNX Runtime and in PyTorch.

    OMP_NUM_THREADS=1 python benchmarks/onnx_latency.py

Blocks of Sana 600M, PixArt-Sigma and SD3.5 Medium with random weights, one sample of 1024 tokens, with the model's own
embedding and output layers. The ways take turns on the same input; a figure is the median over rounds of the ratio to
float32 in ONNX Runtime, with the least and the greatest. Sizes are those of the
ONNX files. Appends to `docs/results/onnx_latency.jsonl` and writes `.md`; `--keep` leaves the graphs for `onnx_profile.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from fraqat import __version__
from fraqat.config import load_recipe
from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.export.onnx.graph import layer_nodes, replace_layers_, save, store_floats_, trace
from fraqat.export.onnx.integer import lower_
from fraqat.export.onnx.layers import Ops, around_rows
from fraqat.export.onnx.runtime import open_session
from fraqat.export.target import LayerPlace, Part, Target
from fraqat.nn import ActivationSpec, IntegerLayers, QuantSpec, WeightSpec, calibrate_, quantize_, quantized_layers
from fraqat.tasks.diffusion import OUTPUT, NamedTransformer
from fraqat.tasks.example_inputs import example_inputs
from fraqat.tasks.pipelines import build_transformer
from fraqat.workflows import open_session as open_recipe
from onnx_profile import cpu_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
MEASURE = "ONNX Runtime, float32"
TOKENS = 1024
FILE_NAMES = {
    MEASURE: "float32",
    "ONNX Runtime, W4A16": "w4a16",
    "ONNX Runtime, W4A8 per token": "w4a8-token",
    "ONNX Runtime, W4A8 static": "w4a8-static",
}
FIRST_CPU = "two-core x86 with AMX"
"""Of the records from before a record named its processor."""
WEIGHT = WeightSpec(range_method="max_abs")  # pyright: ignore[reportArgumentType]
STATIC = ActivationSpec(granularity="tensor", static=True, symmetric=False, range_method="three_sigma")  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Block:
    """A model with one of its blocks, and the sampler's picture size that gives `TOKENS` tokens."""

    title: str
    recipe: str
    side: int
    changes: dict[str, Any]


BLOCKS = (
    Block("Sana 600M", "sana-600m", 1024, {"num_layers": 1}),
    Block("PixArt-Sigma", "pixart-sigma", 512, {"num_layers": 1}),
    Block(
        "SD3.5 Medium", "sd3.5-medium", 512, {"num_layers": 1, "dual_attention_layers": [0], "pos_embed_max_size": 64}
    ),
)

Call = Callable[[], Any]


def model_of(block: Block, tokens: int = TOKENS) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with random weights, and one random sample of its inputs.

    Args:
        block: Which.
        tokens: Of the picture, a square number.
    """
    side = block.side * math.isqrt(tokens) // math.isqrt(TOKENS)
    session = open_recipe(load_recipe(block.recipe, (f"sampler.height={side}", f"sampler.width={side}")))
    torch.manual_seed(0)
    config = {**session.known.config, **{k: v for k, v in block.changes.items() if k in session.known.config}}
    model = build_transformer(session.known.class_name, config).eval().requires_grad_(False)
    shapes = example_inputs(model, session.known, session.recipe.sampler, 1, "cpu")
    inputs = {n: torch.randn(v.shape) if v.is_floating_point() else v for n, v in shapes.items()}
    inputs["timestep"] = torch.full((1,), 500.0)
    return model, inputs


def neutral_graph(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """The traced graph with a node for every quantized layer."""
    part = Part("transformer", NamedTransformer(model), (OUTPUT,), lambda: [inputs], {})
    return ir.to_proto(trace(part, model))


def float_graph(proto: Any, model: nn.Module, codes: dict[str, LayerCodes], *, in_4_bits: bool) -> Any:
    """The graph with float inputs everywhere: float32 weights, or INT4 ones that ONNX Runtime multiplies in its own way."""
    graph = ir.from_proto(proto)
    layers, nodes = dict(quantized_layers(model)), layer_nodes(graph)

    def rows(ops: Ops, name: str, x: Any) -> Any:
        layer = codes[name]
        if in_4_bits:
            scale = ops.constant("weight_scale", layer.qparams.scale.flatten().float())
            stored = ops.constant("codes", layer.matrix.t().contiguous(), ir.DataType.INT4)
            weight = ops("DequantizeLinear", stored, scale, axis=1)
        else:
            weight = ops.constant("weight", layers[name].weight.flatten(1).t().contiguous())
        y = ops("MatMul", x, weight)
        return y if layer.bias is None else ops("Add", y, ops.constant("bias", layer.bias))

    def lower(name: str) -> Any:
        return lambda tape, x: around_rows(
            Ops(tape, name), codes[name], nodes[name], lambda ops, y: rows(ops, name, y), x
        )

    replace_layers_(graph, {name: lower(name) for name in nodes})
    return graph


def integer_graph(proto: Any, codes: dict[str, LayerCodes]) -> Any:
    """The graph that the `onnx` target writes."""
    graph = ir.from_proto(proto)
    lower_(graph, codes)
    return graph


def quantized(model: nn.Module, spec: QuantSpec, inputs: dict[str, Tensor], target: Target | None = None) -> nn.Module:
    """The model on a grid, in place; with a target every layer on the nearest grid that the target computes."""

    def nearest(name: str, type_name: str, shape: tuple[int, ...], layer_spec: QuantSpec) -> QuantSpec | None:
        return layer_spec if target is None else target.nearest(LayerPlace(name, type_name, shape), layer_spec)

    quantize_(model, spec, fit=nearest)
    with torch.no_grad():
        calibrate_(model, lambda batch: NamedTransformer(model)(**batch), [inputs])  # pyright: ignore[reportCallIssue]
    return model


def ways_of(block: Block, folder: Path) -> tuple[dict[str, Call], dict[str, int]]:
    """What is timed, and the sizes of the files in bytes."""
    model, inputs = model_of(block)
    quantized(model, QuantSpec(WEIGHT, ActivationSpec()), inputs)
    codes, proto = layer_codes(model), neutral_graph(model, inputs)
    graphs = {
        MEASURE: float_graph(proto, model, codes, in_4_bits=False),
        "ONNX Runtime, W4A16": float_graph(proto, model, codes, in_4_bits=True),
        "ONNX Runtime, W4A8 per token": integer_graph(proto, codes),
    }
    static, _ = model_of(block)
    sizes: dict[str, int] = {}
    graphs["ONNX Runtime, W4A8 static"] = integer_graph(
        proto, layer_codes(quantized(static, QuantSpec(WEIGHT, STATIC), inputs))
    )
    sizes["W4A8 static, other floats in bfloat16"] = _stored_size(graphs["ONNX Runtime, W4A8 static"], folder)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    np.savez(folder / f"{block.recipe}.inputs.npz", **feeds)  # pyright: ignore[reportArgumentType]
    calls: dict[str, Call] = {}
    for name, graph in graphs.items():
        path = folder / f"{block.recipe}.{FILE_NAMES[name]}.onnx"
        save(graph, path)
        sizes[name] = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
        # Accuracy level 1 keeps the inputs of INT4 products in float32; without it they are rounded to 8 bits.
        calls[name] = session_call(open_session(path, **{"session.qdq_matmulnbits_accuracy_level": 1}), feeds)
    calls |= torch_ways(block, model, inputs)
    return calls, sizes


def _stored_size(graph: Any, folder: Path) -> int:
    """Bytes of a graph as `fraqat export --float-dtype bfloat16` writes it."""
    smaller = ir.from_proto(ir.to_proto(graph))
    store_floats_(smaller, "bfloat16")
    save(smaller, folder / "smaller.onnx")
    return (folder / "smaller.onnx").stat().st_size


def session_call(session: Any, feeds: dict[str, Any]) -> Call:
    """A run of a session with those of the arrays that its graph takes."""
    wanted = {item.name for item in session.get_inputs()}
    given = {name: value for name, value in feeds.items() if name in wanted}
    return lambda: session.run(None, given)


def torch_ways(block: Block, student: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Call]:
    """float32, bf16 and our integer products in PyTorch, eager."""
    half, _ = model_of(block)
    half.bfloat16()
    full, _ = model_of(block)
    IntegerLayers(student, counts_preparation=False)

    def call(model: nn.Module) -> Call:
        named = NamedTransformer(model)
        return torch.no_grad()(lambda: named(**inputs))

    return {"PyTorch, float32": call(full), "PyTorch, bf16": call(half), "PyTorch, W4A8 per token": call(student)}


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Ratio of every way to `MEASURE` in every round."""
    for call in calls.values():
        call()
    times, _ = timed(calls, rounds)
    return ratios_to(MEASURE, times)


def timed(calls: dict[str, Call], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every call in every round, the calls in turns, and seconds that the process's threads computed meanwhile."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, busy_start = time.perf_counter(), time.process_time()
            call()
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - busy_start)
    return seconds, busy


def ratios_to(base: str, times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Every time over that of `base` in the same round."""
    return {name: [a / b for a, b in zip(values, times[base], strict=True)] for name, values in times.items()}


def write_table(path: Path) -> None:
    """The newest records of every block as Markdown."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        newest[record["block"], record.get("cpu", FIRST_CPU)] = record
    lines = [
        "# Latency and size of one full-width block",
        "",
        "Made by `benchmarks/onnx_latency.py`: one sample of 1024 tokens, random weights, all ways in turns. Time is the",
        "median over rounds of the ratio to float32 in ONNX Runtime, with the least and the greatest; size is that of the",
        "ONNX file over the float32 one.",
    ]
    for (title, cpu), record in newest.items():
        head = f"## {title}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}, {cpu}"
        lines += ["", head, "", "| way | time, ratio | spread | file, ratio |", "| --- | --- | --- | --- |"]
        for name, values in record["ratios"].items():
            size = record["sizes"].get(name)
            share = "-" if size is None else f"{size / record['sizes'][MEASURE]:.3f}"
            spread = f"{min(values):.2f} to {max(values):.2f}"
            lines.append(f"| {name} | {statistics.median(values):.3f} | {spread} | {share} |")
        for name in (name for name in record["sizes"] if name not in record["ratios"]):
            lines.append(f"| {name} | - | - | {record['sizes'][name] / record['sizes'][MEASURE]:.3f} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measures the blocks asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocks", nargs="+", choices=[b.recipe for b in BLOCKS], default=[b.recipe for b in BLOCKS])
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_latency.jsonl")
    parser.add_argument("--keep", type=Path, help="folder for the graphs and inputs; 1 GB for all blocks")
    arguments = parser.parse_args()
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    for block in BLOCKS:
        if block.recipe not in arguments.blocks:
            continue
        with tempfile.TemporaryDirectory() as folder:
            calls, sizes = ways_of(block, arguments.keep or Path(folder))
            ratios = measure(calls, arguments.rounds)
        record = {
            "block": block.title,
            "ratios": ratios,
            "sizes": sizes,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "fraqat": __version__,
        }
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        for name, values in ratios.items():
            print(f"{block.title:14} {name:32} {statistics.median(values):.3f} {sizes.get(name, 0) / 1e6:.2f} MB")
    write_table(arguments.out)


if __name__ == "__main__":
    main()
