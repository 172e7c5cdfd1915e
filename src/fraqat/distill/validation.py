"""The held-out distillation loss: the same data, noise and precision for every student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, DistillTask

VALIDATION_SEED = 20_251_014


@torch.no_grad()
def validation_loss(
    task: DistillTask,
    teacher: nn.Module,
    student: nn.Module,
    spec: TrainSpec,
    batches: Sequence[Batch] | None = None,
) -> float:
    """Mean loss over the task's held-out batches, without autocast, with noise that only task and batch size decide.

    Args:
        task: Gives the data.
        teacher, student: Models; the student's training flag is put back.
        spec: Batch size and loss terms.
        batches: Held-out data to use instead of all that the task has.
    """
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    total, count = 0.0, 0
    for batch in task.validation_batches(spec.batch_size) if batches is None else batches:
        inputs = to_device(task.make_inputs(batch, generator), device)
        teacher_output = task.predict(teacher, inputs)
        loss = task.loss(task.predict(student, inputs), teacher_output, inputs, spec.losses)
        size = len(next(iter(batch.values())))
        total, count = total + size * loss.item(), count + size
    student.train(was_training)
    return total / count


@torch.no_grad()
def batch_loss(task: DistillTask, teacher: nn.Module, student: nn.Module, spec: TrainSpec, inputs: Batch) -> float:
    """The loss of one batch of made inputs, in evaluation and without autocast; the student's training flag is put back."""
    was_training = student.training
    student.eval()
    loss = task.loss(task.predict(student, inputs), task.predict(teacher, inputs), inputs, spec.losses).item()
    student.train(was_training)
    return loss


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
