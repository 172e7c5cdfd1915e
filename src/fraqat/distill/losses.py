"""Distances between the teacher's and the student's output, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fraqat.errors import config_error
from fraqat.nn import STRICT_KEYS

OUTPUT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}
"""Name -> mean distance of (student, teacher) outputs in float32, of each element with `reduction="none"`."""

LANGUAGE_LOSSES = ("kl", "hidden_mse")
"""Terms that a language model's task computes itself: of next-token distributions, and of hidden states."""


@dataclass(frozen=True)
class LossSpec:
    """One term of the loss: `weight` times the distance `name`, of `OUTPUT_LOSSES` or `LANGUAGE_LOSSES`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    name: str = "mse"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in OUTPUT_LOSSES and self.name not in LANGUAGE_LOSSES:
            names = ", ".join((*OUTPUT_LOSSES, *LANGUAGE_LOSSES))
            raise config_error("losses.name", self.name, allowed=names, fix=f"choose one of {names}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise config_error(
                "losses.weight", self.weight, allowed="a positive number", fix="remove the term or use 1"
            )


def distillation_loss(
    student: Tensor, teacher: Tensor, terms: Sequence[LossSpec], weight_N: Tensor | None = None
) -> Tensor:
    """Weighted sum of the terms.

    Args:
        student: Output of the student, any shape.
        teacher: Output of the teacher, the same shape, without gradient.
        terms: At least one.
        weight_N: What the distance of each sample counts, of N on the first axis; None: 1.

    Returns:
        0-dim float32.
    """
    student, teacher = student.float(), teacher.float()
    total = student.new_zeros(())
    for term in terms:
        distance = OUTPUT_LOSSES[term.name]
        if weight_N is None:
            total = total + term.weight * distance(student, teacher)
        else:
            distance_N = distance(student, teacher, reduction="none").flatten(1).mean(1)
            total = total + term.weight * (weight_N * distance_N).mean()
    return total
