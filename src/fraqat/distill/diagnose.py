"""Finds the layer in which NaN or infinity appears first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.nn.shards import own
from fraqat.schedules import Stage


@torch.no_grad()
def first_non_finite_layer(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Runs `forward` and returns the name of the first leaf module whose output is not finite, or None.

    Args:
        model: The model that `forward` runs.
        forward: A call without arguments that repeats the failing computation.
    """
    found: list[str] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and any(not bool(torch.isfinite(t).all()) for t in _tensors(output)):
                found.append(name)

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children()) or hasattr(m, "weight_quantizer")]
    handles = [module.register_forward_hook(hook_for(name)) for name, module in leaves]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0].removesuffix(".weight_quantizer").removesuffix(".activation_quantizer") if found else None


def first_non_finite_place(models: Mapping[str, nn.Module], forward: Callable[[nn.Module], object]) -> str:
    """Where NaN or infinity appears first, in words.

    Args:
        models: Role -> model, in the order in which they are called.
        forward: Calls one of them, as the failing computation did.
    """
    for role, model in models.items():
        name = first_non_finite_layer(model, lambda m=model: forward(m))
        if name is not None:
            return f"{role} layer {name}"
    return "the loss itself"


def first_non_finite_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter whose value or gradient is not finite, or None."""
    for name, parameter in model.named_parameters():
        for tensor in (parameter, parameter.grad):
            if tensor is not None and not bool(torch.isfinite(own(tensor.detach())).all()):
                return name
    return None


def non_finite_message(
    what: str, where: str, step: int, stage: Stage, num_stages: int, checkpoints: Path | None
) -> str:
    """What a run that stops at NaN or infinity says.

    Args:
        what: Is not finite.
        where: It shows first.
        step: Number of finished steps.
        stage: In which it was found, of `num_stages`.
        num_stages: Of the schedule.
        checkpoints: Their folder, None without a checkpoint.
    """
    kept = (
        "No checkpoint had been written yet."
        if checkpoints is None
        else f"The newest checkpoint is kept in {checkpoints}."
    )
    return (
        f"{what} at step {step}, stage {stage.index + 1} of {num_stages} ({stage.bits:g} bits), first in {where}. {kept} Fix: "
        "lower train.learning_rate.peak, set train.clip_norm, or train.autocast: none."
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
