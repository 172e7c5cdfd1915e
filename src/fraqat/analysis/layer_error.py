"""Error of every quantized layer: of its weight alone, and of its output inside the running model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.nn import quantized_layers


@dataclass(frozen=True)
class LayerError:
    """Signal-to-quantization-noise ratios of one layer, in dB; None where there is no error or no signal.

    Args:
        weight_sqnr_db: Master weight against its quantized form, either with the layer's branch and smoothing, if it has any.
        output_sqnr_db: Output in the teacher against output in the student, both running on the same input of the model:
            it holds the errors of all layers before.
    """

    weight_sqnr_db: float | None
    output_sqnr_db: float | None


def sqnr_db(signal: Tensor, noisy: Tensor) -> float | None:
    """10 log10(sum signal^2 / sum (signal - noisy)^2), in float64."""
    signal, noise = signal.double(), signal.double() - noisy.double()
    power, noise_power = float(signal.square().sum()), float(noise.square().sum())
    return 10 * math.log10(power / noise_power) if power > 0 and noise_power > 0 else None


@torch.no_grad()
def layer_errors(
    teacher: nn.Module, student: nn.Module, forward: Callable[[nn.Module], object]
) -> dict[str, LayerError]:
    """Compares every quantized layer of the student with the same layer of the teacher.

    Args:
        teacher: The full-precision model.
        student: The quantized model, with the same layer names.
        forward: Runs a model on the same fixed inputs.

    Returns:
        Layer name -> error.
    """
    layers = dict(quantized_layers(student))
    outputs = [_record_outputs(model, list(layers), forward) for model in (teacher, student)]
    return {
        name: LayerError(
            weight_sqnr_db=sqnr_db(
                layer.effective_weight(layer.weight), layer.effective_weight(layer.weight_quantizer(layer.weight))
            ),
            output_sqnr_db=sqnr_db(outputs[0][name], outputs[1][name]) if name in outputs[0] else None,
        )
        for name, layer in layers.items()
    }


def _record_outputs(model: nn.Module, names: list[str], forward: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    recorded: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            recorded[name] = output.detach().cpu()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return recorded
