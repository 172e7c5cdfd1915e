"""Which output of a guided model is learned."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import BatchStream, DistillTask
from fraqat.errors import BatchSizeError, config_error


@runtime_checkable
class GuidedTask(Protocol):
    """A task whose models are sampled by two predictions, of which guidance makes one."""

    @property
    def guidance_scale(self) -> float | None:
        """Whose output is learned; None: outputs one by one."""
        ...

    @property
    def rows_per_sample(self) -> int:
        """Rows of the model that a sample of a training batch is: 2 where guidance is learned, else 1."""
        ...

    def guided(self, scale: float | Literal["auto"], part_size: int) -> DistillTask:
        """The task with what guidance makes of the two predictions learned in training, and nothing else changed.

        Args:
            scale: Of guidance; `auto` is the sampler's own, and gives the task itself where it is sampled by one prediction.
            part_size: Rows of a part of a batch: two for each sample.

        Raises:
            ConfigError: A scale for a model that is sampled by one prediction, or parts that cannot be of pairs.
        """
        ...


def training_task(task: DistillTask, spec: TrainSpec) -> DistillTask:
    """The task as `spec.guidance_scale` has it learned; see `GuidedTask.guided`.

    Raises:
        ConfigError: A scale for a task without guidance.
    """
    scale = spec.guidance_scale
    if scale is None:
        return task
    if isinstance(task, GuidedTask):
        return task.guided(scale, spec.batch_size // spec.accumulation)
    if scale == "auto":
        return task
    raise config_error("train.guidance_scale", scale, allowed="null or auto for this task", fix="remove it")


def guidance_phrase(task: DistillTask, spec: TrainSpec) -> str | None:
    """What is learned of a guided model, where a recipe asks for anything; `task` is that of `training_task`."""
    if spec.guidance_scale is None:
        return None
    scale = task.guidance_scale if isinstance(task, GuidedTask) else None
    return (
        "outputs are learned one by one"
        if scale is None
        else f"what guidance by {scale:g} makes of two outputs is learned"
    )


def training_stream(task: DistillTask, spec: TrainSpec) -> BatchStream:
    """The parts of all training batches; `task` is that of `training_task`.

    Raises:
        ConfigError: The batch is larger than the data.
    """
    try:
        return task.train_stream(spec.batch_size // spec.accumulation, spec.seed)
    except BatchSizeError as error:  # it knows the samples of a part, and not what the recipe says
        found = error
    num_rows = task.rows_per_sample if isinstance(task, GuidedTask) else 1
    reasons = [f"train.accumulation = {spec.accumulation}"] if spec.accumulation > 1 else []
    reasons += [f"train.guidance_scale, which makes {num_rows} rows of a sample"] if num_rows > 1 else []
    if not reasons:
        raise found
    limit = found.num_train * num_rows * spec.accumulation
    raise config_error(
        "train.batch_size",
        spec.batch_size,
        allowed=f"at most {limit} with {found.num_train} samples to train on and {' and '.join(reasons)}",
        fix="use less",
    )


def samples_of_part(task: DistillTask, spec: TrainSpec) -> int:
    """Samples in a part of a training batch, whose size counts rows of the model; `task` is that of `training_task`."""
    num_rows = spec.batch_size // spec.accumulation
    return num_rows // task.rows_per_sample if isinstance(task, GuidedTask) else num_rows
