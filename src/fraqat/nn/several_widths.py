"""One model for several widths: the same master weights, scales of their own for each."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fraqat.nn.layers import QuantizedLayer
from fraqat.nn.swap import quantized_layers


def serve_widths_(model: nn.Module, widths: Sequence[float]) -> None:
    """Lets the same master weights serve several widths: each gets learned scales, or a clipping, of its own.

    `set_bits_` changes between them. A layer whose own final width is above some of them serves that one instead.

    Args:
        model: A quantized model at its final width, whose scales were not trained yet.
        widths: In bits, the final one among them.
    """
    for _, layer in quantized_layers(model):
        final = layer.weight_quantizer.spec.bits
        layer.weight_quantizer.serve_({final, *(max(bits, final) for bits in widths)}, layer.master_weight())


def scale_rates(model: nn.Module) -> dict[nn.Parameter, float]:
    """The learned scales of a model, each with what its learning rate is multiplied by.

    Adam's step does not depend on the gradient's size, and a scale falls with the width: at 8 bits it is 127 / 7 = 18 times
    smaller than at 4, so the same rate would carry it 18 times as far. A width's rate is that of the layer's final width times
    the ratio of the two scales, as max-abs would have them.

    Args:
        model: A quantized model at its final width.
    """
    rates: dict[nn.Parameter, float] = {}
    for _, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if quantizer.scale is None:
            continue
        rates[quantizer.scale] = 1.0
        for bits, scale in quantizer.others.scales().items() if quantizer.others is not None else ():
            rates[scale] = quantizer.grid.range_divisor / quantizer.spec.grid(bits).range_divisor
    return rates


def scale_rates_by_name(model: nn.Module) -> dict[str, float]:
    """`scale_rates` of those scales that are trained, by the names of the parameters."""
    rates = scale_rates(model)
    return {name: rates[p] for name, p in model.named_parameters() if p.requires_grad and p in rates}


def settle_at_(model: nn.Module, bits: float) -> None:
    """Makes one width of `serve_widths_` the final one of the model, as if it had been quantized to it from the start.

    Args:
        model: A quantized model.
        bits: Layers whose own final width is above it keep theirs.
    """
    for _, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        quantizer.settle_(max(bits, quantizer.spec.bits), layer.master_weight())


@contextmanager
def kept_widths(model: nn.Module) -> Generator[None]:
    """Puts widths, clipping and learned scales of a model back as they were, bit for bit, when the block ends."""
    states = [(layer, _state(layer)) for _, layer in quantized_layers(model)]
    try:
        yield
    finally:
        for layer, (bits, on_final_grid, clip_ratio, scale) in states:
            quantizer = layer.weight_quantizer
            if not quantizer.is_at(bits, on_final_grid=on_final_grid):
                quantizer.set_bits_(bits, layer.whole_weight(), on_final_grid=on_final_grid)
            with torch.no_grad():
                if quantizer.clip_ratio is not None and clip_ratio is not None:
                    quantizer.clip_ratio.copy_(clip_ratio)
                if quantizer.scale is not None and scale is not None:
                    quantizer.scale.copy_(scale)


def _state(layer: QuantizedLayer) -> tuple[float, bool, Tensor | None, Tensor | None]:
    quantizer = layer.weight_quantizer
    clip_ratio, scale = (None if x is None else x.detach().clone() for x in (quantizer.clip_ratio, quantizer.scale))
    return quantizer.bits, quantizer.grid.bits != quantizer.bits, clip_ratio, scale
