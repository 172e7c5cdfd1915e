"""The gradient of a whole batch, from its parts and pieces of these, in one process or in several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fraqat.distill.parallel import TrainedModels
from fraqat.distill.precision import autocast
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, DistillTask, SplittableTask
from fraqat.distill.validation import to_device
from fraqat.distill.workers import Workers


@dataclass(frozen=True)
class BatchLosses:
    """What a batch gave.

    Args:
        losses: Of every part: first of those of this process, and by `share_` of those of all, in the order of the processes.
        suspect: Inputs of the first piece of this process whose loss is not finite; where all are, of the last.
    """

    losses: tuple[float, ...]
    suspect: Batch

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
        models: Teacher and student as they are called.
        spec: Seed, accumulation, losses, precision.
        workers: Share the parts; gradients are averaged over them.
        parts: Numbers of this process' parts.
        device: Of the models.
    """

    def __init__(
        self,
        task: DistillTask,
        models: TrainedModels,
        spec: TrainSpec,
        workers: Workers,
        parts: Sequence[int],
        device: torch.device,
    ):
        self._task, self._models, self._spec, self._workers = task, models, spec, workers
        self._last_part, self._device = parts[-1], device

    def add_(self, parts: Sequence[tuple[int, Batch]], step: int, num_splits: int) -> BatchLosses:
        """Adds the gradient of this process' parts of a batch to what the parameters have; see `share_`.

        Args:
            parts: Number and samples of each part of this process.
            step: Number of finished steps.
            num_splits: Pieces in which a part is computed.
        """
        losses: list[float] = []
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
                    loss = self._loss(inputs)
                    (loss * share / num_summed if num_splits > 1 else loss / num_summed).backward()
                part_loss += share * loss.item()
            losses.append(part_loss)
        return BatchLosses(tuple(losses), suspect)

    def share_(self, batch: BatchLosses) -> BatchLosses:
        """Lets every process have gradient and losses of the whole batch, once each has computed its parts."""
        self._models.average_gradients_()
        return BatchLosses(self._told(batch.losses), batch.suspect)

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
        seed = (self._spec.seed << 32) + step * self._spec.accumulation + part
        torch.manual_seed(seed)
        inputs = self._task.make_inputs(batch, torch.Generator().manual_seed(seed))
        if num_splits == 1:
            return [(inputs, 1.0)]
        assert isinstance(self._task, SplittableTask)
        return self._task.split_inputs(inputs, num_splits)

    def _loss(self, inputs: Batch) -> Tensor:
        with torch.no_grad(), autocast(self._spec.autocast, self._device.type):
            teacher_output = self._models.teacher(inputs)
        with autocast(self._spec.autocast, self._device.type):
            student_output = self._models.student(inputs)
            return self._task.loss(student_output, teacher_output, inputs, self._spec.losses)
