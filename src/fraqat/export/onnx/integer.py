"""ONNX for ONNX Runtime on CPUs and in browsers: the integer products that were trained, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from torch import nn

from fraqat.errors import config_error
from fraqat.export.codes import LayerCodes, layer_codes
from fraqat.export.target import Bound, ExportJob, LayerPlace, OpenedExport, Part, Target
from fraqat.nn import QuantSpec
from fraqat.numerics import ZeroPoint

PARTS_FILE = "parts.json"


@final
class IntegerTarget(Target):
    """`PART.onnx` for every part of the model; quantized layers are integer products with INT4 weights."""

    name = "onnx"
    summary = "ONNX with integer products for ONNX Runtime on CPUs and in browsers"
    extra = "onnx"
    requires = ("onnx", "onnxscript", "onnxruntime")
    exports_all_parts = True
    bound = Bound(
        30.0, 100.0, "the same integers; floats are added in another order, which turns a few roundings of later inputs"
    )

    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """Layers that no integer product can compute are floating-point products on the same grids.

        Zero points per token, which other runtimes measure in ways of their own, are not written; offsets (Eq. 2) are.
        """
        activation = spec.activation
        if activation is None or activation.zero_point is ZeroPoint.FLOAT:
            return spec
        return dataclasses.replace(spec, activation=dataclasses.replace(activation, zero_point=ZeroPoint.FLOAT))

    def write(self, job: ExportJob) -> None:
        """Writes the graphs and `parts.json`, which names their inputs and outputs."""
        write_graphs(job, lower_)

    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """The graphs in ONNX Runtime."""
        from fraqat.export.onnx.runtime import OnnxExport

        return OnnxExport(folder, student)


def write_graphs(job: ExportJob, lower: Callable[[Any, dict[str, LayerCodes]], None]) -> None:
    """Writes `PART.onnx` for every part, the files beside them, and `parts.json`.

    Args:
        job: What to write, and where to.
        lower: Replaces the `Layer` nodes of a neutral graph by what the target computes.
    """
    from fraqat.export.onnx.graph import save, store_floats_, trace

    codes = layer_codes(job.student)
    written: dict[str, Any] = {}
    for part in job.parts():
        model = trace(part, job.student)
        lower(model, codes)
        store_floats_(model, job.float_dtype)
        save(model, job.folder / f"{part.name}.onnx")
        write_files(part, job.folder)
        written[part.name] = describe_part(part)
        job.say(f"{part.name}.onnx: {len(model.graph)} operators")
    (job.folder / PARTS_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def lower_(model: Any, codes: dict[str, LayerCodes]) -> None:
    """Replaces the `Layer` nodes of a neutral graph by integer products."""
    from fraqat.export.onnx.graph import layer_nodes, replace_layers_
    from fraqat.export.onnx.layers import RUNTIME_DOMAIN, Ops, layer_output

    nodes, shared = layer_nodes(model), dict[str, Any]()
    unknown = sorted(set(nodes) - set(codes))
    if unknown:
        raise config_error("layer", unknown[:3], allowed="layers of the student", fix="trace the part with its student")

    def lower(name: str) -> Any:
        layer, node = codes[name], nodes[name]
        return lambda tape, x: layer_output(Ops(tape, name, shared), layer, node, x)

    replace_layers_(model, {name: lower(name) for name in nodes})
    model.graph.opset_imports[RUNTIME_DOMAIN] = 1


def write_files(part: Part, folder: Path) -> None:
    """Writes the files that a program around the part reads."""
    for name, contents in part.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)


def describe_part(part: Part) -> dict[str, Any]:
    """What a program needs to call a part: shapes with names for dynamic sizes, and constants."""
    example = part.batches()[0]
    inputs: dict[str, Any] = {}
    for name, value in example.items():
        axes = part.dynamic_axes.get(name, {})
        shape = [axes.get(axis, size) for axis, size in enumerate(value.shape)]
        inputs[name] = {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
    return {"inputs": inputs, "outputs": list(part.outputs), "constants": dict(part.constants)}
