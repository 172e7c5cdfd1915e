"""The gradient of a whole batch, from its parts and pieces of these, in one process or in several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fraqat.distill.importance import make_importance
from fraqat.distill.parallel import TrainedModels
from fraqat.distill.parts import part_inputs, to_device
from fraqat.distill.precision import autocast
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, DistillTask, Prediction, SplittableTask, TimestepTask
from fraqat.distill.teacher_outputs import TeacherOutputs
from fraqat.distill.workers import Workers


@dataclass(frozen=True)
class BatchLosses:
    """What a batch gave.

    Args:
        losses: Of every part: first of those of this process, and by `share_` of those of all, in the order of the processes.
        suspect: Inputs of the first piece of this process whose loss is not finite; where all are, of the last.
        errors: `TimestepImportance.sums` of every piece of this process; empty where noise levels are not drawn by error.
    """

    losses: tuple[float, ...]
    suspect: Batch
    errors: tuple[tuple[float, ...], ...] = ()

    @property
    def mean(self) -> float:
        """The loss of the batch."""
        return sum(value / len(self.losses) for value in self.losses)

    @property
    def first_bad(self) -> int | None:
        """Number of the first part whose loss is not finite."""
        return next((number for number, value in enumerate(self.losses) if not math.isfinite(value)), None)


class BatchGradients:
    """Computes the gradient of one batch after the other.

    All that is random in a part is drawn from the part's own seed, so that it does not matter which process computes it.

    Args:
        task: Makes inputs and loss.
        models: The student as it is called.
        outputs: Of the teacher.
        spec: Seed, accumulation, losses, precision.
        workers: Share the parts; gradients are averaged over them.
        parts: Numbers of this process' parts.
        device: Of the models.

    Attributes:
        importance: Draws noise levels by the student's error; None: the task draws them.

    Raises:
        ConfigError: They should be drawn by error, and the task draws none.
    """

    def __init__(
        self,
        task: DistillTask,
        models: TrainedModels,
        outputs: TeacherOutputs,
        spec: TrainSpec,
        workers: Workers,
        parts: Sequence[int],
        device: torch.device,
    ):
        self._task, self._models, self._spec, self._workers = task, models, spec, workers
        self._outputs = outputs
        self._last_part, self._device = parts[-1], device
        self.importance = make_importance(
            task, spec.timestep_importance, is_recorded=spec.teacher.outputs == "recorded"
        )

    def add_(self, parts: Sequence[tuple[int, Batch]], step: int, num_splits: int) -> BatchLosses:
        """Adds the gradient of this process' parts of a batch to what the parameters have; see `share_`.

        Args:
            parts: Number and samples of each part of this process.
            step: Number of finished steps.
            num_splits: Pieces in which a part is computed.
        """
        losses: list[float] = []
        errors: list[tuple[float, ...]] = []
        suspect: Batch = {}
        num_summed = self._spec.accumulation // self._workers.num
        for part, batch in parts:
            pieces = self._pieces(part, batch, step, num_splits)
            part_loss = 0.0
            for number, (piece, share) in enumerate(pieces):
                inputs = to_device(piece, self._device)
                if all(math.isfinite(value) for value in (*losses, part_loss)):
                    suspect = inputs
                is_last = part == self._last_part and number == len(pieces) - 1
                with self._models.part(is_last=is_last):
                    loss, sums = self._loss(inputs, self._outputs.of_part(step, part, inputs))
                    (loss * share / num_summed if num_splits > 1 else loss / num_summed).backward()
                part_loss += share * loss.item()
                errors.append(sums)
            losses.append(part_loss)
        return BatchLosses(tuple(losses), suspect, tuple(errors))

    def share_(self, batch: BatchLosses) -> BatchLosses:
        """Lets every process have gradient and losses of the whole batch, once each has computed its parts."""
        self._models.average_gradients_()
        if self.importance is not None:
            num = 2 * self.importance.spec.bins
            told = self._told([value for row in batch.errors for value in row])
            self.importance.update_([told[start : start + num] for start in range(0, len(told), num)])
        return replace(batch, losses=self._told(batch.losses))

    def measure(
        self, parts: Sequence[tuple[int, Batch]], step: int, num_splits: int, loss: Callable[[Batch], float]
    ) -> float:
        """The loss of the whole batch by another measure, with the inputs that `add_` made of it; gradients stay.

        Args:
            parts, step, num_splits: See `add_`.
            loss: Of the inputs of one piece.
        """
        losses = [
            sum(
                share * loss(to_device(piece, self._device))
                for piece, share in self._pieces(part, batch, step, num_splits)
            )
            for part, batch in parts
        ]
        return BatchLosses(self._told(losses), {}).mean

    def _told(self, losses: Sequence[float]) -> tuple[float, ...]:
        return tuple(value for row in self._workers.gather(losses) for value in row)

    def _pieces(self, part: int, batch: Batch, step: int, num_splits: int) -> list[tuple[Batch, float]]:
        """The inputs of a part in pieces, with the share of each. torch's own random numbers begin anew."""
        inputs = part_inputs(self._task, self._spec, step, part, batch, self.importance)
        if num_splits == 1:
            return [(inputs, 1.0)]
        assert isinstance(self._task, SplittableTask)
        return self._task.split_inputs(inputs, num_splits)

    def _loss(self, inputs: Batch, teacher_output: Prediction) -> tuple[Tensor, tuple[float, ...]]:
        """The loss, and what the student's errors add to the means of `importance`."""
        with autocast(self._spec.autocast, self._device.type):
            student_output = self._models.student(inputs)
            loss = self._task.loss(student_output, teacher_output, inputs, self._spec.losses)
        if self.importance is None:
            return loss, ()
        assert isinstance(self._task, TimestepTask)
        with torch.no_grad():
            errors = self._task.sample_errors(student_output, teacher_output)
        return loss, tuple(self.importance.sums(errors, inputs))
