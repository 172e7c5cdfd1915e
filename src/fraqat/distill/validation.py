"""The held-out distillation loss: the same data, noise and precision for every student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, DistillTask, Prediction
from fraqat.distill.workers import ALONE, Workers

VALIDATION_SEED = 20_251_014


@torch.no_grad()
def validation_loss(
    task: DistillTask,
    teacher: nn.Module,
    student: nn.Module,
    spec: TrainSpec,
    batches: Sequence[Batch] | None = None,
    *,
    workers: Workers = ALONE,
    predict: Callable[[nn.Module, Batch], Prediction] | None = None,
) -> float:
    """Mean loss over the task's held-out batches, without autocast, with noise that only task and batch size decide.

    Args:
        task: Gives the data.
        teacher, student: Models; the student's training flag is put back.
        spec: Batch size and loss terms.
        batches: Held-out data to use instead of all that the task has.
        workers: Share the batches among them; the result is the same in all, and the same bits as one process has.
        predict: Instead of the task's.
    """
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    predict = predict or task.predict
    own, sizes = [], []
    last: Batch = {}
    for number, batch in enumerate(task.validation_batches(spec.batch_size) if batches is None else batches):
        inputs = task.make_inputs(batch, generator)  # by all: the noise of a batch follows that of the one before
        sizes.append(len(next(iter(batch.values()))))
        if number % workers.num == workers.rank:
            last = to_device(inputs, device)
            own.append(task.loss(predict(student, last), predict(teacher, last), last, spec.losses).item())
        elif not last:
            last = to_device(inputs, device)
    num_each = -(-len(sizes) // workers.num)
    while len(own) < num_each:  # a forward pass of sharded models is everybody's
        own.append(task.loss(predict(student, last), predict(teacher, last), last, spec.losses).item())
    student.train(was_training)
    shared = workers.gather(own)
    losses = [shared[number % workers.num][number // workers.num] for number in range(len(sizes))]
    return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)


@torch.no_grad()
def batch_loss(
    task: DistillTask,
    teacher: nn.Module,
    student: nn.Module,
    spec: TrainSpec,
    inputs: Batch,
    *,
    predict: Callable[[nn.Module, Batch], Prediction] | None = None,
) -> float:
    """The loss of one batch of made inputs, in evaluation and without autocast; the student's training flag is put back.

    `predict` as in `validation_loss`.
    """
    was_training, predict = student.training, predict or task.predict
    student.eval()
    loss = task.loss(predict(student, inputs), predict(teacher, inputs), inputs, spec.losses).item()
    student.train(was_training)
    return loss


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
