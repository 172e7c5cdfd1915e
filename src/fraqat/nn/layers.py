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
from fraqat.nn.branch import LowRankBranch
from fraqat.nn.integer import HasIntegerPath
from fraqat.nn.quantizers import ActivationQuantizer, WeightQuantizer
from fraqat.nn.shards import whole
from fraqat.nn.smoothing import InputSmoothing
from fraqat.nn.spec import QuantSpec

_ATTRIBUTES = ("weight_quantizer", "activation_quantizer", "adapter", "smoothing", "branch", "integer")
_BATCHED = 4


class QuantizedLayer(HasIntegerPath):
    """What `QuantLinear` and `QuantPointwiseConv` share."""

    float_type: ClassVar[type[nn.Module]]
    type_name: ClassVar[str]
    channel_axis: ClassVar[int]

    weight: Tensor
    weight_quantizer: WeightQuantizer
    adapter: LowRankAdapter | None
    smoothing: InputSmoothing | None
    branch: LowRankBranch | None

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

    @torch.no_grad()
    def renew_codes_(self) -> None:
        """Makes the codes of the weight as it is now, whole."""
        assert self.integer is not None
        self.integer.refresh_(self.weight_quantizer, self.master_weight())

    def whole_weight(self) -> Tensor:
        """`master_weight`, of all rows where processes hold some each; all of them must ask together."""
        weight = whole(self.weight)
        if self.adapter is None:
            return weight
        return self.adapter.added(weight, whole(self.adapter.up), whole(self.adapter.down))

    @property
    def has_extras(self) -> bool:
        """Whether the layer is more than a quantized product: its input is smoothed, or a branch stands beside it."""
        return self.smoothing is not None or self.branch is not None

    def smoothed(self, x: Tensor) -> Tensor:
        """The input that quantizer and branch are given: x / s, or x itself."""
        return x if self.smoothing is None else self.smoothing(x)

    def with_branch(self, y: Tensor, x: Tensor) -> Tensor:
        """The product y of the codes plus the branch's for the smoothed input x, or y itself."""
        return y if self.branch is None or self.branch.is_spent else y + self.branch(x).to(y.dtype)

    def effective_weight(self, weight: Tensor) -> Tensor:
        """The one matrix that acts on the layer's own input: (W + U D) diag(1 / s) for W = `weight`, or `weight` itself.

        Args:
            weight: The layer's weight, or what its quantizer makes of it.

        Returns:
            Of the weight's shape; float32 or wider where the layer has branch or smoothing.
        """
        if not self.has_extras:
            return weight
        matrix = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        if self.branch is not None:
            matrix = matrix + self.branch.product()
        if self.smoothing is not None:
            matrix = matrix / self.smoothing.scale
        return matrix.view(weight.shape)


class QuantLinear(QuantizedLayer, nn.Linear):
    """y = fake_quantize(x) @ fake_quantize(W)^T + bias; x [..., I], W [O, I], bias [O], y [..., O]."""

    float_type = nn.Linear
    type_name = "Linear"
    channel_axis = -1

    def forward(self, input: Tensor) -> Tensor:
        """Returns y [..., O] for input [..., I]."""
        smoothed = self.smoothed(input)
        y = self.integer_product(smoothed, self.bias, self.weight, self.adapter)
        if y is None:
            x, weight = self.quantized_operands(smoothed)
            y = nn.functional.linear(x, weight, self.bias)
        return self.with_branch(y, smoothed)


class PointwiseLayer(HasIntegerPath, nn.Conv2d):
    """A 1x1 convolution with codes."""


class QuantPointwiseConv(QuantizedLayer, PointwiseLayer):
    """1x1 convolution: x [N, I, H, W], W [O, I, 1, 1], bias [O], y [N, O, H', W']. A token is one pixel."""

    float_type = nn.Conv2d
    type_name = "PointwiseConv"
    channel_axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Returns y [N, O, H', W'] for input [N, I, H, W] or [I, H, W]."""
        smoothed = self.smoothed(input)
        y = pointwise_product(self, smoothed, self.weight, self.adapter)
        if y is None:
            y = pointwise_forward(self, self.quantized_operands, smoothed)
        return self.with_branch(y, strided_input(self, smoothed))


def strided_input(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The pixels of [..., H, W] that a 1x1 convolution looks at."""
    vertical, horizontal = conv.stride
    return x if conv.stride == (1, 1) else x[..., ::vertical, ::horizontal]


def pointwise_product(
    conv: PointwiseLayer, x: Tensor, weight: Tensor | None = None, adapter: LowRankAdapter | None = None
) -> Tensor | None:
    """`integer_product` of a 1x1 convolution; None also for an unbatched input."""
    if x.ndim != _BATCHED:
        return None
    return conv.integer_product(strided_input(conv, x), conv.bias, weight, adapter)


def pointwise_forward(conv: nn.Conv2d, operands: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """1x1 convolution of [N, I, H, W] or [I, H, W] with the input and weight that `operands` makes of a batched input.

    Scales are measured over the pixels that the convolution looks at, as those of an integer product are.
    """
    is_unbatched = x.ndim == 3
    x, weight = operands(strided_input(conv, x.unsqueeze(0) if is_unbatched else x))
    y = nn.functional.conv2d(x, weight, conv.bias)
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
    layer.smoothing = None
    layer.branch = None
    layer.integer = None
    return layer.train(layer.training)


def to_float_(layer: QuantizedLayer) -> nn.Module:
    """Undoes `to_quantized_`; the weight keeps its current full-precision values, and takes branch and smoothing in."""
    if layer.has_extras:
        with torch.no_grad():
            layer.weight.copy_(layer.effective_weight(layer.weight))
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
