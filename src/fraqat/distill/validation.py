"""The held-out distillation loss: the same data, noise and precision for every student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fraqat.distill.parts import HeldOutInputs
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, DistillTask, Prediction
from fraqat.distill.workers import ALONE, Workers


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
    teach: Callable[[int, Batch], Prediction] | None = None,
) -> float:
    """Mean loss over the task's held-out batches, without autocast, with noise that only task and batch size decide.

    Args:
        task: Gives the data.
        teacher, student: Models; the student's training flag is put back.
        spec: Batch size and loss terms.
        batches: Held-out data to use instead of all that the task has.
        workers: Share the batches among them; the result is the same in all, and the same bits as one process has.
        predict: Instead of the task's.
        teach: Gives the teacher's outputs for a batch by its number, instead of `predict` of the teacher.
    """
    was_training = student.training
    student.eval()
    predict = predict or task.predict
    held_out = HeldOutInputs(task, spec.batch_size, next(student.parameters()).device, workers, batches)
    own: list[float] = []
    for number, inputs in held_out:
        ours = predict(student, inputs)
        theirs = predict(teacher, inputs) if teach is None else teach(number, inputs)
        own.append(task.loss(ours, theirs, inputs, spec.losses).item())
    student.train(was_training)
    shared, sizes = workers.gather(own), held_out.sizes
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
