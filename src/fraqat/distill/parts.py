"""The inputs that teacher and student are called with: of the parts of training batches, and of held-out batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fraqat.distill.importance import TimestepImportance
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, DistillTask, TimestepTask
from fraqat.distill.workers import Workers

VALIDATION_SEED = 20_251_014


def part_inputs(
    task: DistillTask,
    spec: TrainSpec,
    step: int,
    part: int,
    batch: Batch,
    importance: TimestepImportance | None = None,
) -> Batch:
    """What `task` makes of a part of a training batch.

    All that is random in it, torch's own generator for what comes after among it, is drawn from the part's own seed, so that
    it does not matter which process computes it, and when.

    Args:
        task: Makes the inputs.
        spec: `seed` and `accumulation`.
        step: Number of finished steps.
        part: Number in the batch.
        batch: Its samples.
        importance: Draws the noise levels instead of `task`.
    """
    seed = (spec.seed << 32) + step * spec.accumulation + part
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if importance is None:
        return task.make_inputs(batch, generator)
    assert isinstance(task, TimestepTask)
    place_N, columns = importance.draw(step, len(next(iter(batch.values()))), generator)
    return {**task.make_inputs_at(batch, place_N, generator), **columns}


class HeldOutInputs:
    """The held-out batches of one process with their numbers; noise that only task and batch size decide.

    Where they cannot be shared equally, the last one comes again: a forward pass of sharded models is everybody's.

    Args:
        task: Gives the data.
        batch_size: Of a batch.
        device: Of the inputs.
        workers: Share the batches.
        batches: Held-out data to use instead of all that the task has.

    Attributes:
        sizes: Samples of every batch of all processes; complete after an iteration.
    """

    def __init__(
        self,
        task: DistillTask,
        batch_size: int,
        device: torch.device,
        workers: Workers,
        batches: Sequence[Batch] | None = None,
    ):
        self._task, self._device, self._workers = task, device, workers
        self._batches = task.validation_batches(batch_size) if batches is None else batches
        self.sizes: list[int] = []

    def __len__(self) -> int:
        """Batches of all processes."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        self.sizes = []
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        num, rank = self._workers.num, self._workers.rank
        last: tuple[int, Batch] | None = None
        num_given = 0
        for number, batch in enumerate(self._batches):
            inputs = self._task.make_inputs(
                batch, generator
            )  # by all: the noise of a batch follows that of the one before
            self.sizes.append(len(next(iter(batch.values()))))
            if number % num == rank or last is None:
                last = number, to_device(inputs, self._device)
            if number % num == rank:
                num_given += 1
                yield last
        while last is not None and num_given < -(-len(self) // num):
            num_given += 1
            yield last


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
