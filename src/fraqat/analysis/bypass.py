"""Switching the quantization of single layers off and on, for measurements; everything is put back afterwards."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from fraqat.errors import config_error
from fraqat.nn import QuantizedLayer, quantized_layers, set_bypassed_


def layers_of(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Quantized layers by name.

    Raises:
        ConfigError: There is none, or one computes with integer codes, which no switch reaches.
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise config_error("model", type(model).__name__, allowed="a quantized model", fix="call quantize_ first")
    integer = [name for name, layer in layers.items() if layer.integer is not None]
    if integer:
        raise config_error(
            "model",
            f"{integer[0]} with an integer path",
            allowed="floating-point paths",
            fix="release_ the engine first",
        )
    return layers


@contextmanager
def kept_switches(layers: Mapping[str, QuantizedLayer]) -> Generator[None]:
    """Puts the switches of layers back as they were when the block ends."""
    before = {name: _switches(layer) for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            weights, inputs = before[name]
            set_bypassed_([layer], weights=weights, inputs=inputs)


@contextmanager
def kept_widths(layers: Mapping[str, QuantizedLayer]) -> Generator[None]:
    """Puts widths, clipping and learned scales of layers back as they were, bit for bit, when the block ends."""
    states = {name: _state(layer) for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            bits, on_final_grid, clip_ratio, scale = states[name]
            quantizer = layer.weight_quantizer
            if not quantizer.is_at(bits, on_final_grid=on_final_grid):
                quantizer.set_bits_(bits, layer.master_weight(), on_final_grid=on_final_grid)
            with torch.no_grad():
                if quantizer.clip_ratio is not None and clip_ratio is not None:
                    quantizer.clip_ratio.copy_(clip_ratio)
                if quantizer.scale is not None and scale is not None:
                    quantizer.scale.copy_(scale)


def _switches(layer: QuantizedLayer) -> tuple[bool, bool]:
    activation = layer.activation_quantizer
    return layer.weight_quantizer.is_bypassed, activation is not None and activation.is_bypassed


def _state(layer: QuantizedLayer) -> tuple[float, bool, torch.Tensor | None, torch.Tensor | None]:
    quantizer = layer.weight_quantizer
    clip_ratio, scale = (None if x is None else x.detach().clone() for x in (quantizer.clip_ratio, quantizer.scale))
    return quantizer.bits, quantizer.grid.bits != quantizer.bits, clip_ratio, scale
