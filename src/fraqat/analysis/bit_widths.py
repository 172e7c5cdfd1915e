"""Loss against the width of the weights, without training: the paper's Fig. 2 (arXiv 2510.14823)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fraqat.analysis.bypass import kept_switches, layers_of
from fraqat.errors import config_error
from fraqat.nn import QuantizedLayer, kept_widths, set_bypassed_

DEFAULT_BITS = (8.0, 7.0, 6.0, 5.5, 5.0, 4.75, 4.5, 4.25, 4.0, 3.0, 2.0)
"""The widths of the fractional schedule, and two below."""


@dataclass(frozen=True)
class WidthLoss:
    """What one width of the weights does to a model.

    Args:
        bits: Width of every layer that no rule keeps above it.
        loss: With inputs quantized as the model's are.
        float_input_loss: With inputs in floating point.
        weight_sqnr_db: 10 log10(sum w^2 / sum (w - quantized w)^2) over all quantized layers together, w with the layer's
            branch and smoothing if it has any; None without error.
    """

    bits: float
    loss: float
    float_input_loss: float
    weight_sqnr_db: float | None


@dataclass(frozen=True)
class BitWidths:
    """Losses over widths.

    Args:
        float_loss: With neither weights nor inputs quantized: what is left is the model's own rounding.
        widths: In the order asked for.
    """

    float_loss: float
    widths: tuple[WidthLoss, ...]


@torch.no_grad()
def losses_over_widths(
    model: nn.Module,
    bits: Sequence[float],
    loss: Callable[[], float],
    *,
    on_width: Callable[[int], None] = lambda num_done: None,
) -> BitWidths:
    """Measures a loss with the weights of all layers at each of several widths; the model is left as it was.

    A layer whose own final width is above the lowest of the model, because a rule keeps it there, does not fall below it.

    Args:
        model: Changed by `quantize_`, at any width, on the floating-point path; static inputs are calibrated.
        bits: Widths, each once.
        loss: Measures the model as it is.
        on_width: Told how many widths are done.

    Returns:
        The loss without any quantization, and two losses for each width.

    Raises:
        ConfigError: No or repeated widths, a width that the model's grids do not have, or a model that is not quantized.
    """
    layers = layers_of(model)
    check_widths(bits, layers)
    lowest = min(layer.weight_quantizer.spec.bits for layer in layers.values())
    has_inputs = any(layer.activation_quantizer is not None for layer in layers.values())
    measured: list[WidthLoss] = []
    with kept_switches(layers), kept_widths(model):
        set_bypassed_(layers.values(), weights=True, inputs=True)
        float_loss = loss()
        for width in bits:
            for layer in layers.values():
                final = layer.weight_quantizer.spec.bits
                layer.weight_quantizer.set_bits_(max(width, final) if final > lowest else width, layer.master_weight())
            set_bypassed_(layers.values(), weights=False, inputs=True)
            float_input_loss = loss()
            sqnr_db = _total_sqnr_db(layers.values())
            set_bypassed_(layers.values(), weights=False, inputs=False)
            own_loss = loss() if has_inputs else float_input_loss
            measured.append(WidthLoss(width, own_loss, float_input_loss, sqnr_db))
            on_width(len(measured))
    return BitWidths(float_loss, tuple(measured))


def check_widths(bits: Sequence[float], layers: Mapping[str, QuantizedLayer]) -> None:
    """Refuses widths that cannot be measured.

    Raises:
        ConfigError: See `losses_over_widths`.
    """
    if not bits or len(set(bits)) != len(bits):
        raise config_error("bits", list(bits), allowed="one or more different widths", fix="name each width once")
    for width in bits:
        for layer in layers.values():
            layer.weight_quantizer.spec.grid(width)


def _total_sqnr_db(layers: Iterable[QuantizedLayer]) -> float | None:
    power = noise = 0.0
    for layer in layers:
        weight = layer.master_weight()
        signal = layer.effective_weight(weight).double()
        power += float(signal.square().sum())
        noise += float((signal - layer.effective_weight(layer.weight_quantizer(weight)).double()).square().sum())
    return 10 * math.log10(power / noise) if power > 0 and noise > 0 else None
