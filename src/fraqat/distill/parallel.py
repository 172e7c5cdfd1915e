"""Teacher and student as the trainer calls them, in one process or in several."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from fraqat.distill.compiling import check_has_blocks, compile_blocks_, compiled
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, DistillTask, Prediction
from fraqat.distill.workers import Workers
from fraqat.errors import ConfigError

_BUCKET_BYTES = 25 * 2**20
"""As DDP's."""


class Predictor(nn.Module):
    """`task.predict` of a model as a forward pass of its own: what PyTorch's engines for several processes wrap.

    Args:
        task: Of the model.
        model: Teacher or student, compiled or not.
        copies_views: Outputs own their memory; FSDP2 cannot watch views that are changed in place.
    """

    def __init__(self, task: DistillTask, model: nn.Module, *, copies_views: bool = False):
        super().__init__()
        self.model = model
        self._task, self._copies_views = task, copies_views

    def forward(self, inputs: Batch) -> Prediction:
        """The outputs that are distilled."""
        outputs = self._task.predict(self.model, inputs)
        if not self._copies_views:
            return outputs
        return {name: value.clone() if value._is_view() else value for name, value in outputs.items()}


class TrainedModels:
    """Both models in one process.

    Args:
        task: Gives the outputs.
        teacher, student: As they are held.
        spec: `compile`.
    """

    is_sharded = False
    """Whether the student, as it was given, is whole in no process any more."""
    is_copy = False
    """Whether another process holds the same rows."""
    meets_in_passes = False
    """Whether forward and backward passes exchange tensors, so that no process can break one off alone."""

    def __init__(self, task: DistillTask, teacher: nn.Module, student: nn.Module, spec: TrainSpec):
        self._model, self._teacher = student, teacher
        self._compiles_blocks = spec.compile == "blocks"
        if self._compiles_blocks:
            check_has_blocks(student)
        # Kept: a scale changes its name with the width where a model serves several.
        self._trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.teacher: nn.Module = Predictor(task, compiled(teacher, spec.compile))
        self.student: nn.Module = Predictor(task, compiled(student, spec.compile))

    def compile_blocks_(self) -> Callable[[], None]:
        """Compiles the blocks of both models, as they compute now, where `train.compile` says so; the call given undoes it."""
        undo = ExitStack()
        if self._compiles_blocks:
            for model in (self._teacher, self._model):
                undo.callback(compile_blocks_(model))
        return undo.close

    def part(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of a part of a batch; gradients travel in the last one alone."""
        return nullcontext()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What this process trains, by name: parameters, or the rows of them that it holds."""
        return dict(self._trained)

    @property
    def sum_rows_(self) -> Callable[[Tensor], None] | None:
        """Adds a tensor up over the processes that hold rows of the same parameters, in place; None where these are whole."""
        return None

    def shared_parameters(self) -> dict[str, Tensor]:
        """The parameters that `trained_parameters` are parts of; the same where they are whole."""
        return dict(self.trained_parameters())

    def zero_grad_(self) -> None:
        """Lets gradients leave memory that are not those of `trained_parameters`."""

    def average_gradients_(self) -> None:
        """Lets all processes have the mean of their gradients, where the backward passes have not done so."""

    def collect_gradients_(self) -> None:
        """Gives `trained_parameters` their gradients, after the last backward pass of a batch."""

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of the whole gradient, of which this process holds `gradients`."""
        return get_total_norm(gradients)

    def weights_changed_(self) -> None:
        """Call it whenever trained parameters or widths have changed: nothing that was made of them is used again."""

    def let_go_(self) -> None:
        """Leaves in this process what it holds of the student, after a forward pass that no backward pass follows."""

    def full_state(self, *, keeps: bool = True) -> dict[str, Tensor]:
        """The student's state dict, whole; on the host where processes hold parts. All must ask together.

        Args:
            keeps: Whether this process wants it; the others get nothing where they hold parts.
        """
        return self._model.state_dict()


class ReplicatedModels(TrainedModels):
    """Every process has both models whole; `DistributedDataParallel` averages the gradients over the processes.

    With `train.on_out_of_memory: split` gradients are averaged after the backward passes instead of inside the last one, so
    that a process may fail in any of them without leaving the others waiting there.

    Args:
        task, teacher, student, spec: See `TrainedModels`.
        workers: The processes.
    """

    def __init__(self, task: DistillTask, teacher: nn.Module, student: nn.Module, spec: TrainSpec, workers: Workers):
        super().__init__(task, teacher, student, spec)
        if spec.parallel.teacher == "shard":
            from fraqat.distill.sharding import make_mesh, shard_teacher_  # FSDP2 is slow to import

            shard_teacher_(self.teacher, teacher, make_mesh(spec.parallel, workers, next(teacher.parameters()).device))
        is_apart = spec.on_out_of_memory == "split" and spec.parallel.teacher != "shard"
        self.meets_in_passes = not is_apart
        self._num = workers.num
        self._ddp: DistributedDataParallel | None = None
        if is_apart:
            return
        # Learned scales of integer layers have no gradient from autograd, and not every model uses all that it has. PyTorch
        # must look for such parameters, and complains where there are none.
        self.student.register_parameter(
            "never_used", nn.Parameter(torch.zeros(1, device=next(student.parameters()).device))
        )
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in _ddp_arguments() else "broadcast_buffers"
        options: dict[str, Any] = {buffers: False, "init_sync": False, "find_unused_parameters": True}
        self._ddp = DistributedDataParallel(self.student, gradient_as_bucket_view=True, **options)
        self.student = self._ddp

    def part(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last or self._ddp is None else self._ddp.no_sync()

    def average_gradients_(self) -> None:
        if self._ddp is not None:
            return
        parameters = list(self._trained.values())
        is_used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        dist.all_reduce(is_used, op=dist.ReduceOp.MAX)  # a model may use in one process what it does not in another
        gradients: list[Tensor] = []
        for parameter in (p for p, used in zip(parameters, is_used.tolist(), strict=True) if used):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad.div_(self._num))
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


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
            "the processes have begun with different students. Fix: let all of them read the same model and the same "
            "calibration data, with the same versions of fraqat and torch on the same kind of machine."
        )


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype each, that travel together."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        num_bytes = sum(g.nbytes for g in bucket) + gradient.nbytes
        if bucket and (bucket[0].dtype != gradient.dtype or num_bytes > _BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _sum(tensor: Tensor) -> float:
    return tensor.sum(dtype=torch.float64).item()


def _ddp_arguments() -> frozenset[str]:
    return frozenset(inspect.signature(DistributedDataParallel.__init__).parameters)
