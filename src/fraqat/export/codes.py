"""The integers of a trained student, layer by layer, as every target takes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fraqat.errors import config_error
from fraqat.nn import QuantizedLayer, QuantSpec, quantized_layers
from fraqat.numerics import Grid, GroupScales, QParams


@dataclass(frozen=True)
class LayerCodes:
    """One quantized layer: weight = scale * codes (+ offset).

    Args:
        name: Qualified name in the student.
        type_name: `Linear` or `PointwiseConv`.
        spec: What it is quantized to.
        grid: Of the weight.
        codes: Integers in a tensor of the weight's shape, int8 up to 8 bits.
        qparams: Scale (and offset, Eq. 2) in the layout's scale shape: [O, 1], [1, 1] or [O, G, 1].
        groups: The scale as a float per channel and integers per group, where it is such a product.
        bias: [O], float32, or None.
        activation: Scale and zero point of a static input, else None.
    """

    name: str
    type_name: str
    spec: QuantSpec
    grid: Grid
    codes: Tensor
    qparams: QParams
    groups: GroupScales | None
    bias: Tensor | None
    activation: QParams | None

    @property
    def matrix(self) -> Tensor:
        """Codes as a matrix [O, K]."""
        return self.codes.flatten(1)


def codes_of(name: str, layer: QuantizedLayer) -> LayerCodes:
    """The integers of one layer.

    Raises:
        ConfigError: The layer is not at its final width, or has a branch or a smoothed input, which no target computes.
    """
    if layer.has_extras:
        raise config_error(
            f"{name}.branch" if layer.branch is not None else f"{name}.smoothing",
            "set",
            allowed="layers that are a quantized product alone",
            fix="export a student trained without quantization.branch and quantization.smoothing",
        )
    quantizer = layer.weight_quantizer
    if quantizer.bits != quantizer.spec.bits:
        raise config_error(
            f"{name}.bits",
            quantizer.bits,
            allowed=f"{quantizer.spec.bits:g}, the final width",
            fix="call set_bits_ first",
        )
    weight = layer.master_weight()
    codes, qparams = quantizer.codes(weight)
    static: QParams | None = None
    activation = layer.activation_quantizer
    if activation is not None and activation.scale is not None:
        static = QParams(activation.scale, activation.zero_point)
    bias = layer.bias
    return LayerCodes(
        name=name,
        type_name=layer.type_name,
        spec=layer.spec,
        grid=quantizer.grid,
        codes=codes,
        qparams=qparams,
        groups=quantizer.group_scales(weight),
        bias=bias.detach().float() if isinstance(bias, Tensor) else None,
        activation=static,
    )


def layer_codes(student: nn.Module) -> dict[str, LayerCodes]:
    """The integers of every quantized layer, in the model's order; see `codes_of`."""
    return {name: codes_of(name, layer) for name, layer in quantized_layers(student)}
