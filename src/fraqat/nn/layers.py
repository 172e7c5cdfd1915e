"""Quantized twins of `nn.Linear` and the pointwise (1x1) `nn.Conv2d`.

A layer becomes its twin by changing its class, not by building another module: parameters, tied weights, hooks, dtype,
device, training flag and state-dict keys stay what they were, and changing the class back is the undo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fraqat.nn.adapters import LowRankAdapter
from fraqat.nn.integer import HasIntegerPath
from fraqat.nn.quantizers import ActivationQuantizer, WeightQuantizer
from fraqat.nn.spec import QuantSpec

_ATTRIBUTES = ("weight_quantizer", "activation_quantizer", "adapter", "integer")
_BATCHED = 4


class QuantizedLayer(HasIntegerPath):
    """What `QuantLinear` and `QuantPointwiseConv` share."""

    float_type: ClassVar[type[nn.Module]]
    type_name: ClassVar[str]
    channel_axis: ClassVar[int]

    weight: Tensor
    weight_quantizer: WeightQuantizer
    adapter: LowRankAdapter | None

    @property
    def spec(self) -> QuantSpec:
        """What the layer is quantized to at the end of training."""
        activation = self.activation_quantizer
        return QuantSpec(self.weight_quantizer.spec, activation.spec if activation is not None else None)

    def quantized_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight on their grids."""
        if self.activation_quantizer is not None:
            x = self.activation_quantizer(x)
        if self.adapter is None:
            return x, self.weight_quantizer(self.weight)
        master = self.master_weight()
        # Straight through without the mask of clipped weights: a masked gradient is not a product of thin matrices.
        weight = master + (self.weight_quantizer(master.detach()) - master).detach()
        return x, weight.to(self.weight.dtype)

    def master_weight(self) -> Tensor:
        """What is quantized: the weight, or in low-rank training its sum with the adapter, in float32."""
        return self.weight if self.adapter is None else self.adapter(self.weight)


class QuantLinear(QuantizedLayer, nn.Linear):
    """y = fake_quantize(x) @ fake_quantize(W)^T + bias; x [..., I], W [O, I], bias [O], y [..., O]."""

    float_type = nn.Linear
    type_name = "Linear"
    channel_axis = -1

    def forward(self, input: Tensor) -> Tensor:
        """Returns y [..., O] for input [..., I]."""
        y = self.integer_product(input, self.bias, self.weight, self.adapter)
        if y is not None:
            return y
        x, weight = self.quantized_operands(input)
        return nn.functional.linear(x, weight, self.bias)


class PointwiseLayer(HasIntegerPath, nn.Conv2d):
    """A 1x1 convolution with codes."""


class QuantPointwiseConv(QuantizedLayer, PointwiseLayer):
    """1x1 convolution: x [N, I, H, W], W [O, I, 1, 1], bias [O], y [N, O, H', W']. A token is one pixel."""

    float_type = nn.Conv2d
    type_name = "PointwiseConv"
    channel_axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Returns y [N, O, H', W'] for input [N, I, H, W] or [I, H, W]."""
        y = pointwise_product(self, input, self.weight, self.adapter)
        if y is not None:
            return y
        return pointwise_forward(self, self.quantized_operands, input)


def pointwise_product(
    conv: PointwiseLayer, x: Tensor, weight: Tensor | None = None, adapter: LowRankAdapter | None = None
) -> Tensor | None:
    """`integer_product` of a 1x1 convolution; None also for an unbatched input."""
    if x.ndim != _BATCHED:
        return None
    vertical, horizontal = conv.stride
    strided = x if conv.stride == (1, 1) else x[:, :, ::vertical, ::horizontal]
    return conv.integer_product(strided, conv.bias, weight, adapter)


def pointwise_forward(conv: nn.Conv2d, operands: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """1x1 convolution of [N, I, H, W] or [I, H, W] with the input and weight that `operands` makes of a batched input."""
    is_unbatched = x.ndim == 3
    x, weight = operands(x.unsqueeze(0) if is_unbatched else x)
    y = conv._conv_forward(x, weight, conv.bias)  # pyright: ignore[reportPrivateUsage]
    return y.squeeze(0) if is_unbatched else y


def twin_type(module: nn.Module) -> type[QuantizedLayer] | None:
    """The quantized twin of a module, or None if it has none.

    Only the exact classes count: a subclass may use its weight in ways of its own (the output projection of
    `nn.MultiheadAttention` is never called), and quantizing it would silently do nothing.
    """
    if type(module) is nn.Linear:
        return QuantLinear
    if type(module) is nn.Conv2d and _is_pointwise(module):
        return QuantPointwiseConv
    return None


def to_quantized_(module: nn.Module, twin: type[QuantizedLayer], spec: QuantSpec) -> QuantizedLayer:
    """Turns `module` into `twin` in place."""
    weight = cast(Tensor, module.weight)
    weight_quantizer = WeightQuantizer(spec.weight, weight)
    activation = spec.activation
    activation_quantizer = (
        ActivationQuantizer(activation, twin.channel_axis, weight.device) if activation is not None else None
    )
    module.__class__ = twin
    layer = cast(QuantizedLayer, module)
    layer.weight_quantizer = weight_quantizer
    layer.activation_quantizer = activation_quantizer
    layer.adapter = None
    layer.integer = None
    return layer.train(layer.training)


def to_float_(layer: QuantizedLayer) -> nn.Module:
    """Undoes `to_quantized_`; the weight keeps its current full-precision values."""
    for name in _ATTRIBUTES:
        delattr(layer, name)
    float_layer: Any = layer
    float_layer.__class__ = type(layer).float_type
    return float_layer


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid")


def has_finite_weight(module: nn.Module) -> bool:
    """Whether the weight holds neither NaN nor infinity; a meta weight counts as finite."""
    weight = cast(Tensor, module.weight)
    return weight.is_meta or bool(torch.isfinite(weight).all())
