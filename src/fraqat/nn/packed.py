"""Layers for inference: integer codes instead of a weight. They compute what the trained layer computed."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fraqat.nn.integer import HasIntegerPath
from fraqat.nn.layers import (
    PointwiseLayer,
    QuantizedLayer,
    QuantLinear,
    QuantPointwiseConv,
    pointwise_forward,
    pointwise_product,
    twin_type,
)
from fraqat.nn.quantizers import ActivationQuantizer, KeepsBufferDtype
from fraqat.nn.spec import QuantSpec
from fraqat.numerics import BlockLayout, GroupScales, QParams, dequantize


class PackedLayer(HasIntegerPath, KeepsBufferDtype):
    """What `PackedLinear` and `PackedPointwiseConv` share.

    Buffers: `codes`, integers of the weight's shape; `scale` and, for Eq. 2, `offset`, of the scale's shape. They keep
    their dtype when the model is cast.
    """

    type_name: ClassVar[str]

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    layout: BlockLayout
    spec: QuantSpec
    group_scales: GroupScales | None

    def effective_codes(self) -> tuple[Tensor, Tensor]:
        """Codes within int8 [O, K] and one scale per output channel, or for all, that give the same weight."""
        codes = self.codes.flatten(1)
        if self.group_scales is None:
            return codes, self.scale
        multiplied = self.layout.split(codes) * self.group_scales.multiplier.to(codes.device, torch.int8)
        return self.layout.join(multiplied, tuple(codes.shape)), self.group_scales.channel.to(codes.device)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized input and the weight scale * code + offset, in the input's dtype."""
        if self.activation_quantizer is not None:
            x = self.activation_quantizer(x)
        return x, dequantize(self.codes, QParams(self.scale, offset=self.offset), self.layout, x.dtype)


class PackedLinear(PackedLayer, nn.Linear):
    """Linear layer with integer codes [O, I]."""

    type_name = QuantLinear.type_name

    def forward(self, input: Tensor) -> Tensor:
        """Returns y [..., O] for input [..., I]."""
        y = self.integer_product(input, self.bias)
        if y is not None:
            return y
        x, weight = self.operands(input)
        return nn.functional.linear(x, weight, self.bias)


class PackedPointwiseConv(PackedLayer, PointwiseLayer):
    """1x1 convolution with integer codes [O, I, 1, 1]."""

    type_name = QuantPointwiseConv.type_name

    def forward(self, input: Tensor) -> Tensor:
        """Returns y [N, O, H', W'] for input [N, I, H, W] or [I, H, W]."""
        y = pointwise_product(self, input)
        if y is not None:
            return y
        return pointwise_forward(self, self.operands, input)


_PACKED_TYPES: dict[type[QuantizedLayer], type[PackedLayer]] = {
    QuantLinear: PackedLinear,
    QuantPointwiseConv: PackedPointwiseConv,
}


def to_packed_(
    module: nn.Module,
    spec: QuantSpec,
    codes: Tensor,
    qparams: QParams,
    static_scale: QParams | None = None,
    groups: GroupScales | None = None,
) -> PackedLayer:
    """Turns a float layer into its packed form in place; its weight parameter is dropped.

    Args:
        module: An `nn.Linear` or a pointwise `nn.Conv2d`.
        spec: What the layer was quantized to.
        codes: Integers of the weight's shape.
        qparams: Scale and offset of the codes.
        static_scale: Scale and zero point of a static activation.
        groups: The scale as a float per channel and integers per group, where it is such a product.
    """
    twin = twin_type(module)
    assert twin is not None, f"{type(module).__name__} has no packed form"
    del module.weight
    layer_as_any: Any = module
    layer_as_any.__class__ = _PACKED_TYPES[twin]
    layer = cast(PackedLayer, module)
    layer.spec, layer.layout = spec, spec.weight.layout()
    layer.group_scales, layer.integer = groups, None
    layer.register_buffer("codes", codes)
    layer.register_buffer("scale", _at_least_float32(qparams.scale))
    layer.register_buffer("offset", None if qparams.offset is None else _at_least_float32(qparams.offset))
    layer.activation_quantizer = None
    if spec.activation is not None:
        layer.activation_quantizer = ActivationQuantizer(spec.activation, twin.channel_axis, codes.device)
        if static_scale is not None:
            layer.activation_quantizer.set_static_(static_scale)
    return layer


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def packed_codes(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> codes of every packed layer."""
    return {name: m.codes for name, m in model.named_modules() if isinstance(m, PackedLayer)}
