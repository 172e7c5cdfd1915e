"""Teacher and student as the trainer calls them, in one process or in several."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fraqat.distill.spec import CompileMode, TrainSpec
from fraqat.distill.task import Batch, DistillTask, Prediction
from fraqat.distill.workers import Workers
from fraqat.errors import ConfigError


class Predictor(nn.Module):
    """`task.predict` of a model as a forward pass of its own: what PyTorch's engines for several processes wrap.

    Args:
        task: Of the model.
        model: Teacher or student, compiled or not.
    """

    def __init__(self, task: DistillTask, model: nn.Module):
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, inputs: Batch) -> Prediction:
        """The outputs that are distilled."""
        return self._task.predict(self.model, inputs)


class TrainedModels:
    """Both models in one process.

    Args:
        task: Gives the outputs.
        teacher, student: As they are held.
        spec: `compile`.
    """

    def __init__(self, task: DistillTask, teacher: nn.Module, student: nn.Module, spec: TrainSpec):
        self.teacher: nn.Module = Predictor(task, compiled(teacher, spec.compile))
        self.student: nn.Module = Predictor(task, compiled(student, spec.compile))

    def part(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of a part of a batch; gradients travel in the last one alone."""
        return nullcontext()


class ReplicatedModels(TrainedModels):
    """Every process has both models whole; `DistributedDataParallel` averages the gradients over the processes.

    Args:
        task, teacher, student, spec: See `TrainedModels`.
        workers: The processes.

    Raises:
        ConfigError: The processes have begun with different students.
    """

    def __init__(self, task: DistillTask, teacher: nn.Module, student: nn.Module, spec: TrainSpec, workers: Workers):
        super().__init__(task, teacher, student, spec)
        check_same_start(student, workers)
        # Said at the first step where every parameter is used; learned scales of integer layers get theirs afterwards.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified", category=UserWarning)
        self._student = DistributedDataParallel(
            self.student, broadcast_buffers=False, init_sync=False, find_unused_parameters=True
        )
        self.student = self._student

    def part(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self._student.no_sync()


def make_models(
    task: DistillTask, teacher: nn.Module, student: nn.Module, spec: TrainSpec, workers: Workers
) -> TrainedModels:
    """The models as a recipe wants them."""
    if workers.num == 1:
        return TrainedModels(task, teacher, student, spec)
    return ReplicatedModels(task, teacher, student, spec, workers)


@torch.no_grad()
def check_same_start(student: nn.Module, workers: Workers) -> None:
    """Compares sums over every parameter.

    Raises:
        ConfigError: They differ between the processes.
    """
    sums = [value for p in student.parameters() for value in (_sum(p), _sum(p.abs()))]
    told = workers.gather([float(len(sums)), sum(sums), *(sums[:1] + sums[-1:])])
    if any(other != told[0] for other in told):
        raise ConfigError(
            "the processes have begun with different students. Fix: let all of them read the same model and the same calibration "
            "data, with the same versions of fraqat and torch on the same kind of machine."
        )


def _sum(tensor: Tensor) -> float:
    return tensor.sum(dtype=torch.float64).item()


def compiled(model: nn.Module, mode: CompileMode) -> nn.Module:
    """The model as training calls it: itself, or compiled."""
    if mode == "none":
        return model
    options: Any = torch.compile(model, mode="reduce-overhead" if mode == "cuda_graphs" else "default")
    return options
