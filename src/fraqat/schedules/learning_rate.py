"""The learning rate as a function of training progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from fraqat.errors import config_error, parse_choice
from fraqat.nn import STRICT_KEYS
from fraqat.schedules.bit_widths import HIGHEST_BITS, Schedule


class LearningRateKind(StrEnum):
    """`decay_last`: constant through the stages, cosine in the last. `constant`. `cosine`: over all. `restart`: one cosine
    per stage. `cooldown`: constant while weights have 8 bits or more, then falls with the width to the end of the run."""

    DECAY_LAST = "decay_last"
    CONSTANT = "constant"
    COSINE = "cosine"
    RESTART = "restart"
    COOLDOWN = "cooldown"


class CooldownShape(StrEnum):
    """How a cooldown falls over its progress t in [0, 1]. `linear`: 1 - t. `sqrt`: 1 - sqrt(t), which falls fast at first.
    `cosine`."""

    LINEAR = "linear"
    SQRT = "sqrt"
    COSINE = "cosine"


@dataclass(frozen=True)
class LearningRateSpec:
    """Peak learning rate and its course.

    Args:
        peak: Largest value, greater than 0.
        kind: Course over the run.
        warmup_steps: Linear rise from 0 at the start of the run.
        warmup_share: The same as a share of the run, in [0, 1), instead of `warmup_steps`.
        final_ratio: Share of the peak at the end of the fall, in [0, 1].
        cooldown_shape: Of `kind: cooldown`; None is linear.

    A cooldown is the warm-up, stable, decay course whose decay is the quantized phase itself (arXiv 2509.22935): quantization
    begins at the peak, and width and rate fall together. Stages at 8 bits and wider count as full precision; a run without
    them decays from the end of the warm-up on, and one without narrower stages in its last stage.

    Raises:
        ConfigError: Numbers out of range, two warm-ups, or a shape without a cooldown.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    peak: float = 1e-4
    kind: LearningRateKind = LearningRateKind.DECAY_LAST
    warmup_steps: int = 0
    final_ratio: float = 0.0
    warmup_share: float = 0.0
    cooldown_shape: CooldownShape | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_choice("learning_rate.kind", self.kind, LearningRateKind))
        if self.cooldown_shape is not None:
            shape = parse_choice("learning_rate.cooldown_shape", self.cooldown_shape, CooldownShape)
            object.__setattr__(self, "cooldown_shape", shape)
            if self.kind is not LearningRateKind.COOLDOWN:
                raise config_error(
                    "learning_rate.cooldown_shape",
                    shape.value,
                    allowed=f"null with kind {self.kind.value}",
                    fix="set learning_rate.kind: cooldown, or leave the shape out",
                )
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise config_error("learning_rate.peak", self.peak, allowed="a positive number", fix="try 1e-4")
        if self.warmup_steps < 0:
            raise config_error("learning_rate.warmup_steps", self.warmup_steps, allowed="0 or more", fix="use 0")
        if not 0 <= self.warmup_share < 1 or (self.warmup_share and self.warmup_steps):
            raise config_error(
                "learning_rate.warmup_share",
                self.warmup_share,
                allowed="[0, 1), and 0 where warmup_steps is given",
                fix="use one of the two",
            )
        if not 0 <= self.final_ratio <= 1:
            raise config_error("learning_rate.final_ratio", self.final_ratio, allowed="[0, 1]", fix="use 0")

    def at(self, step: int, schedule: Schedule) -> float:
        """Learning rate of step `step`, counted from 0."""
        warmup_steps = self._num_warmup_steps(schedule)
        warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        return self.peak * warmup * self._course(step, schedule)

    def _num_warmup_steps(self, schedule: Schedule) -> int:
        return self.warmup_steps or round(self.warmup_share * schedule.total_steps)

    def _course(self, step: int, schedule: Schedule) -> float:
        stage = schedule.stage_at(step)
        match self.kind:
            case LearningRateKind.CONSTANT:
                return 1.0
            case LearningRateKind.COSINE:
                return self._cosine(step / schedule.total_steps)
            case LearningRateKind.RESTART:
                return self._cosine((step - stage.first_step) / stage.num_steps)
            case LearningRateKind.DECAY_LAST:
                is_last = stage.index == len(schedule) - 1 and schedule.is_decided
                return self._cosine((step - stage.first_step) / stage.num_steps) if is_last else 1.0
            case LearningRateKind.COOLDOWN:
                return self._cooldown(step, schedule)

    def _cooldown(self, step: int, schedule: Schedule) -> float:
        quantized = next((s for s in schedule if s.bits < HIGHEST_BITS), schedule.stages[-1])
        first = max(quantized.first_step, self._num_warmup_steps(schedule))
        if step < first:
            return 1.0
        progress = min(1.0, (step - first) / max(1, schedule.total_steps - first))
        match self.cooldown_shape:
            case CooldownShape.COSINE:
                return self._cosine(progress)
            case CooldownShape.SQRT:
                fall = 1 - math.sqrt(progress)
            case _:
                fall = 1 - progress
        return self.final_ratio + (1 - self.final_ratio) * fall

    def _cosine(self, progress: float) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_ratio + (1 - self.final_ratio) * fall
