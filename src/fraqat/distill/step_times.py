"""What a finished step took, and what a finished training leaves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median_low

import torch

from fraqat.distill.log import StepRecord
from fraqat.distill.memory_use import peak_memory_bytes
from fraqat.schedules import Schedule, Stage

_NUM_AVERAGED = 20


@dataclass(frozen=True)
class DistillResult:
    """What a finished training leaves: steps, the seconds that they took (all processes), held-out loss at the end.

    `losses` has that of every width that the model serves, `stages` bits and steps of what was trained, one after the other.
    """

    num_steps: int
    train_s: float
    validation_loss: float
    losses: dict[str, float] = field(default_factory=dict[str, float])
    stages: tuple[tuple[float, int], ...] = ()


class StepTimes:
    """Makes the records of steps, with the time that is left.

    Attributes:
        train_s: Seconds of all steps so far.

    Args:
        batch_size: Samples per step.
        device: Whose memory is told.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.train_s = 0.0
        self._batch_size, self._device = batch_size, device
        self._recent_ms: deque[float] = deque(maxlen=_NUM_AVERAGED)

    def record(
        self, step: int, schedule: Schedule, stage: Stage, loss: float, rate: float, norm: float, step_ms: float
    ) -> StepRecord:
        """The record of a step that took `step_ms`.

        Args:
            step: Its number, from 0.
            schedule: Of the run.
            stage: Of the step.
            loss: Before the update.
            rate: Learning rate.
            norm: Of the gradient, before it was clipped.
            step_ms: Its time.
        """
        self.train_s += step_ms / 1000
        self._recent_ms.append(step_ms)
        usual_ms = median_low(self._recent_ms)  # the first step also chooses engines and compiles
        return StepRecord(
            step=step,
            total_steps=schedule.total_steps,
            stage=stage.index,
            num_stages=len(schedule),
            bits=stage.bits,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            step_ms=step_ms,
            left_s=usual_ms / 1000 * (schedule.total_steps - step - 1),
            samples_per_s=1000 * self._batch_size / step_ms,
            memory_bytes=peak_memory_bytes(self._device),
        )
