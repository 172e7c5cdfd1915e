"""QDQ ONNX for interchange: floating-point operators between QuantizeLinear and DequantizeLinear, opset 21.

Every number that a compiler needs stands in the file: INT4 codes with their zero points, the static range of every input, the
bias as int32 at the scale of the accumulator.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

from torch import nn

from fraqat.errors import config_error
from fraqat.export.codes import LayerCodes
from fraqat.export.onnx.integer import write_graphs
from fraqat.export.target import (
    Bound,
    ExportJob,
    LayerPlace,
    OpenedExport,
    Target,
    fitted_activation,
    fitted_weight,
)
from fraqat.nn import ActivationSpec, QuantSpec, WeightSpec
from fraqat.numerics import Granularity

WEIGHT_BITS = 8
"""Widest weights."""
RUNTIME_OPTIONS = MappingProxyType({"session.qdq_matmulnbits_accuracy_level": "1", "session.x64quantprecision": "1"})
"""Of ONNX Runtime, which fuses INT4 weights into MatMulNBits and by default rounds inputs of 16 bits to 8 there (52 dB). On x86
without VNNI it cuts products of 8-bit weights off at 16 bits unless it is told to be precise."""


@final
class QdqTarget(Target):
    """`PART.onnx` for every part of the model, with a dynamic batch."""

    name = "onnx-qdq"
    summary = "QDQ ONNX (opset 21) with INT4 weights and static ranges, for compilers that read ONNX"
    extra = "onnx"
    requires = ("onnx", "onnxscript", "onnxruntime")
    defaults = MappingProxyType(
        {
            "weight": {"bits": 4, "granularity": "channel", "narrow": True, "scale_dtype": "bfloat16"},
            "activation": {
                "bits": 8,
                "static": True,
                "granularity": "tensor",
                "symmetric": False,
                "range_method": "percentile",
            },
        }
    )
    exports_all_parts = True
    bound = Bound(
        sqnr_db=30.0,
        layer_sqnr_db=60.0,
        reason="the same codes; the bias is rounded to whole steps of the accumulator, s_x * s_w, which turns a few roundings "
        "of later inputs",
    )

    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """Symmetric weights of at most 8 bits; inputs of 8 or 16 bits with a fixed scale, or in floating point."""
        return QuantSpec(_nearest_weight(spec.weight), nearest_input(spec.activation))

    def write(self, job: ExportJob) -> None:
        """Writes the graphs and `parts.json`, which names their inputs and outputs."""
        write_graphs(job, lower_)

    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """The graphs in ONNX Runtime on the CPU."""
        from fraqat.export.onnx.runtime import OnnxExport

        return OnnxExport(folder, student, options=RUNTIME_OPTIONS)


def _nearest_weight(weight: WeightSpec) -> WeightSpec:
    return dataclasses.replace(weight, symmetric=True, bits=min(weight.bits, WEIGHT_BITS))


def nearest_input(activation: ActivationSpec | None) -> ActivationSpec | None:
    """The nearest static input of 8 or 16 bits; None stays None."""
    if activation is None:
        return None
    return fitted_activation(activation, static=True, bits=8.0 if activation.bits <= 8 else 16.0)


def nearest_channel_weight(weight: WeightSpec) -> WeightSpec:
    """Symmetric, narrow and per output channel (a scale per tensor is that too), of at most 8 bits."""
    granularity = weight.granularity if weight.granularity is Granularity.TENSOR else Granularity.CHANNEL
    bits = min(weight.bits, WEIGHT_BITS)
    return fitted_weight(weight, symmetric=True, narrow=bits >= 2, bits=bits, granularity=granularity)


def check_static(layer: LayerCodes, target: str) -> None:
    """Refuses a layer whose input has no fixed scale.

    Raises:
        ConfigError: It is measured at run time.
    """
    if layer.spec.activation is not None and layer.activation is None:
        raise config_error(
            f"{layer.name}.activation.static",
            False,
            allowed=f"inputs with a fixed scale for target {target}",
            fix=f"train with `--set target={target}`, or set activation static: true and call calibrate_",
        )


def lower_(model: Any, codes: dict[str, LayerCodes]) -> None:
    """Replaces the `Layer` nodes of a neutral graph by MatMul and Conv between QDQ pairs.

    Raises:
        ConfigError: An input has no fixed scale, or a bias does not fit.
    """
    from fraqat.export.onnx.graph import layer_nodes, replace_layers_
    from fraqat.export.onnx.layers import Ops
    from fraqat.export.onnx.qdq_layers import qdq_product

    nodes = layer_nodes(model)
    for name in nodes:
        check_static(codes[name], QdqTarget.name)

    def lower(name: str) -> Any:
        layer, node = codes[name], nodes[name]
        return lambda tape, x: qdq_product(Ops(tape, name), layer, node, x)

    replace_layers_(model, {name: lower(name) for name in nodes})
