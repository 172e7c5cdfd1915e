"""A width for every layer at a given average size: measured losses, and the budget solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from fraqat.analysis.bit_widths import check_widths
from fraqat.analysis.bypass import kept_switches, layers_of
from fraqat.errors import config_error
from fraqat.nn import kept_widths, set_bypassed_
from fraqat.numerics import Grid


@dataclass(frozen=True)
class LayerChoices:
    """What one layer may become.

    Args:
        name: Qualified name.
        num_weights: Of the layer, 1 or more.
        rises: Width in bits -> by how much the loss rises when this layer alone has it.
    """

    name: str
    num_weights: int
    rises: Mapping[float, float]

    def __post_init__(self) -> None:
        if self.num_weights < 1 or not self.rises:
            raise config_error(
                f"layer {self.name}",
                f"{self.num_weights} weights, widths {list(self.rises)}",
                allowed="at least one weight and one width",
                fix="measure the layers again",
            )


@dataclass(frozen=True)
class WidthChoice:
    """The widths that were chosen.

    Args:
        bits: Layer -> width.
        average_bits: Of the codes, over all weights of these layers; a fractional width takes the room of the next whole one.
        rise: Sum of the rises; what the loss will rise by where the layers err independently.
    """

    bits: dict[str, float]
    average_bits: float
    rise: float


@torch.no_grad()
def layer_width_rises(
    model: nn.Module,
    widths: Sequence[float],
    loss: Callable[[], float],
    *,
    pinned: Callable[[str], bool] = lambda name: False,
    on_layer: Callable[[int], None] = lambda num_done: None,
) -> tuple[LayerChoices, ...]:
    """Measures by how much the weights of one layer alone, at each of several widths, raise a loss.

    Inputs and all other weights are in floating point; the model is left as it was. One loss for each layer and width, and 1.

    Args:
        model: Changed by `quantize_`, on the floating-point path.
        widths: Each once.
        loss: Measures the model as it is.
        pinned: Layers that are measured at their own final width alone.
        on_layer: Told how many layers are done.

    Raises:
        ConfigError: No or repeated widths, a width that a grid does not have, or a model that is not quantized.
    """
    layers = layers_of(model)
    check_widths(widths, layers)
    measured: list[LayerChoices] = []
    with kept_switches(layers), kept_widths(model):
        set_bypassed_(layers.values(), weights=True, inputs=True)
        float_loss = loss()
        for name, layer in layers.items():
            quantizer = layer.weight_quantizer
            rises: dict[float, float] = {}
            for bits in (quantizer.spec.bits,) if pinned(name) else widths:
                quantizer.set_bits_(bits, layer.master_weight())
                set_bypassed_([layer], weights=False, inputs=True)
                rises[bits] = loss() - float_loss
            set_bypassed_([layer], weights=True, inputs=True)
            measured.append(LayerChoices(name, layer.weight.numel(), rises))
            on_layer(len(measured))
    return tuple(measured)


def choose_layer_widths(layers: Sequence[LayerChoices], average_bits: float) -> WidthChoice:
    """Widths of least summed rise whose codes need at most `average_bits` a weight.

    A knapsack with several choices per layer. Every layer begins at its narrowest width; the widening with the largest fall of
    the loss per bit is taken first, along the lower convex hull of each layer's rises, as long as it fits. What room is left
    goes to any single widening that still fits, the largest fall first. The sum is above the optimum by at most the fall of the
    first widening that did not fit: up to there it is the optimum of the problem with fractions of layers.

    Args:
        layers: Names, sizes and rises.
        average_bits: Budget, in bits a weight over all these layers.

    Raises:
        ConfigError: No layers, or a budget that the narrowest widths exceed.
    """
    if not layers:
        raise config_error("layers", [], allowed="at least one", fix="measure a quantized model")
    num_weights = sum(layer.num_weights for layer in layers)
    chosen = {layer.name: min(layer.rises, key=_room) for layer in layers}
    left = average_bits * num_weights - sum(layer.num_weights * _room(chosen[layer.name]) for layer in layers)
    if left < 0:
        least = average_bits - left / num_weights
        raise config_error(
            "average_bits", average_bits, allowed=f"{least:.4g} or more with these widths", fix="allow narrower widths"
        )
    left = _widen_along_hulls_(chosen, layers, left)
    _fill_(chosen, layers, left)
    used = sum(layer.num_weights * _room(chosen[layer.name]) for layer in layers)
    return WidthChoice(chosen, used / num_weights, sum(layer.rises[chosen[layer.name]] for layer in layers))


def _room(bits: float) -> int:
    """Bits that a code of this width takes in a file."""
    return Grid(bits).storage_bits


def _hull(layer: LayerChoices) -> list[float]:
    """Widths on the lower convex hull of rise over size, ascending, from the narrowest one to the lowest rise."""
    hull: list[float] = []
    for bits in sorted(layer.rises, key=lambda b: (_room(b), layer.rises[b])):
        if hull and (_room(bits) == _room(hull[-1]) or layer.rises[bits] >= min(layer.rises[b] for b in hull)):
            continue
        while len(hull) > 1 and _slope(layer, hull[-1], bits) >= _slope(layer, hull[-2], hull[-1]):
            hull.pop()
        hull.append(bits)
    return hull


def _slope(layer: LayerChoices, narrow: float, wide: float) -> float:
    """Fall of the loss per bit of the file."""
    return (layer.rises[narrow] - layer.rises[wide]) / (layer.num_weights * (_room(wide) - _room(narrow)))


def _widen_along_hulls_(chosen: dict[str, float], layers: Sequence[LayerChoices], left: float) -> float:
    steps = [
        (_slope(layer, narrow, wide), index, narrow, wide)
        for index, layer in enumerate(layers)
        for hull in [_hull(layer)]
        for narrow, wide in pairwise(hull)
    ]
    for layer in layers:
        chosen[layer.name] = _hull(layer)[0]
    # Slopes fall along a hull, so that a layer's own steps come in their order.
    for _, index, narrow, wide in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        layer = layers[index]
        room = layer.num_weights * (_room(wide) - _room(narrow))
        if chosen[layer.name] == narrow and room <= left:
            chosen[layer.name], left = wide, left - room
    return left


def _fill_(chosen: dict[str, float], layers: Sequence[LayerChoices], left: float) -> None:
    while True:
        best: tuple[float, LayerChoices, float, float] | None = None
        for layer in layers:
            now = chosen[layer.name]
            for bits, rise in layer.rises.items():
                room = layer.num_weights * (_room(bits) - _room(now))
                fall = layer.rises[now] - rise
                if fall > 0 and room <= left and (best is None or fall > best[0]):
                    best = (fall, layer, bits, room)
        if best is None:
            return
        _, layer, bits, room = best
        chosen[layer.name], left = bits, left - room
