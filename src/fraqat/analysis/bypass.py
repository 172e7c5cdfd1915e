"""Switching the quantization of single layers off and on, for measurements; everything is put back afterwards."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

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


def _switches(layer: QuantizedLayer) -> tuple[bool, bool]:
    activation = layer.activation_quantizer
    return layer.weight_quantizer.is_bypassed, activation is not None and activation.is_bypassed
