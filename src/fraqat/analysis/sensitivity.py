"""How much each layer's quantization costs: alone, and as the only one left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.analysis.bypass import kept_switches, layers_of
from fraqat.analysis.layer_error import sqnr_db
from fraqat.nn import QuantizedLayer, set_bypassed_


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer's quantization does to the loss.

    Args:
        name: Qualified name.
        place: Place among the quantized layers of the model, from 0.
        alone: Loss when this layer alone is quantized, weight and input.
        without: Loss when all layers but this one are quantized.
        weight_sqnr_db: Weight against its quantized form, in dB; None without error or signal.
        output_sqnr_db: Output of the layer in floating point against its output when quantized, on the same inputs, those of
            the model in floating point; over all calls that the loss makes. None without error, or if it is never called.
    """

    name: str
    place: int
    alone: float
    without: float
    weight_sqnr_db: float | None
    output_sqnr_db: float | None


@dataclass(frozen=True)
class Sensitivity:
    """Losses by layer.

    Args:
        float_loss: With nothing quantized.
        full_loss: With all layers quantized.
        layers: In model order.
    """

    float_loss: float
    full_loss: float
    layers: tuple[LayerSensitivity, ...]

    def rise_alone(self, layer: LayerSensitivity) -> float:
        """By how much the layer's quantization raises the loss of the float model."""
        return layer.alone - self.float_loss

    def fall_without(self, layer: LayerSensitivity) -> float:
        """By how much the loss of the quantized model falls when the layer stays in floating point."""
        return self.full_loss - layer.without

    @property
    def ranked(self) -> tuple[LayerSensitivity, ...]:
        """The layers, the one that alone raises the loss most first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.alone))

    def sums(self, family_of: Callable[[str], str]) -> dict[str, FamilySum]:
        """Sums over the layers of each family, in the order in which families first occur."""
        found: dict[str, FamilySum] = {}
        for layer in self.layers:
            family = family_of(layer.name)
            before = found.get(family, FamilySum(0, 0.0, 0.0))
            found[family] = FamilySum(
                before.num_layers + 1,
                before.rise_alone + self.rise_alone(layer),
                before.fall_without + self.fall_without(layer),
            )
        return found


@dataclass(frozen=True)
class FamilySum:
    """Number of layers, and sums of `Sensitivity.rise_alone` and `Sensitivity.fall_without` over them."""

    num_layers: int
    rise_alone: float
    fall_without: float


@torch.no_grad()
def layer_sensitivity(
    model: nn.Module, loss: Callable[[], float], *, on_layer: Callable[[int], None] = lambda num_done: None
) -> Sensitivity:
    """Measures a loss with each layer quantized alone, and with each layer left out; the model is left as it was.

    With the rises of single layers alone summing to the rise of the whole model, layers err independently; where they do not,
    the errors are coupled (LAPQ, arXiv 1911.07190, section 3). 2 L + 2 losses for L layers.

    Args:
        model: Changed by `quantize_`, at the widths to measure, on the floating-point path; static inputs are calibrated.
        loss: Measures the model as it is.
        on_layer: Told how many layers are done.

    Raises:
        ConfigError: The model is not quantized, or computes with integer codes.
    """
    layers = layers_of(model)
    measured: list[LayerSensitivity] = []
    with kept_switches(layers):
        set_bypassed_(layers.values(), weights=False, inputs=False)
        full_loss = loss()
        set_bypassed_(layers.values(), weights=True, inputs=True)
        float_loss = loss()
        for place, (name, layer) in enumerate(layers.items()):
            set_bypassed_([layer], weights=False, inputs=False)
            with _output_error(layer) as error:
                alone = loss()
            set_bypassed_(layers.values(), weights=False, inputs=False)
            set_bypassed_([layer], weights=True, inputs=True)
            without = loss()
            set_bypassed_(layers.values(), weights=True, inputs=True)
            measured.append(LayerSensitivity(name, place, alone, without, _weight_sqnr_db(layer), error.sqnr_db()))
            on_layer(len(measured))
    return Sensitivity(float_loss, full_loss, tuple(measured))


def _weight_sqnr_db(layer: QuantizedLayer) -> float | None:
    """Of the weight at the layer's width, whatever its switch says."""
    weight, quantizer = layer.master_weight(), layer.weight_quantizer
    was_bypassed, quantizer.is_bypassed = quantizer.is_bypassed, False
    quantized = quantizer(weight)
    quantizer.is_bypassed = was_bypassed
    return sqnr_db(layer.effective_weight(weight), layer.effective_weight(quantized))


class _Error:
    """Sums of squares of a signal and of its error."""

    def __init__(self) -> None:
        self.power = self.noise = 0.0

    def add(self, signal: Tensor, noisy: Tensor) -> None:
        self.power += float(signal.double().square().sum())
        self.noise += float((signal.double() - noisy.double()).square().sum())

    def sqnr_db(self) -> float | None:
        return 10 * math.log10(self.power / self.noise) if self.power > 0 and self.noise > 0 else None


@contextmanager
def _output_error(layer: QuantizedLayer) -> Generator[_Error]:
    """Compares every output of a layer inside the block with its output in floating point on the same input."""
    error = _Error()

    def hook(called: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        set_bypassed_([layer], weights=True, inputs=True)
        error.add(called.forward(*args, **kwargs), output)
        set_bypassed_([layer], weights=False, inputs=False)

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield error
    finally:
        handle.remove()
