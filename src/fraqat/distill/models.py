"""Chooses how teacher and student are held and called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from torch import nn

from fraqat.distill.checkpointing import checkpoint_blocks_
from fraqat.distill.parallel import ReplicatedModels, TrainedModels, check_same_start
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import DistillTask
from fraqat.distill.workers import Workers
from fraqat.errors import config_error
from fraqat.nn import IntegerLayers, quantized_layers, scale_rates_by_name
from fraqat.schedules import Schedule


def make_models(
    task: DistillTask,
    teacher: nn.Module,
    student: nn.Module,
    spec: TrainSpec,
    workers: Workers,
    integers: IntegerLayers | None,
    schedule: Schedule,
) -> TrainedModels:
    """The models as a recipe wants them.

    Args:
        task: Gives the outputs.
        teacher, student: Whole, in every process; sharding changes them.
        spec: `parallel` and `compile`.
        workers: The processes.
        integers: Integer path of the student, its codes made.
        schedule: Stages of the run.

    Raises:
        ConfigError: The processes have begun with different students, or a setting does not go with the mode.
    """
    if workers.num == 1:
        return TrainedModels(task, teacher, student, spec)
    check_same_start(student, workers)
    if spec.parallel.mode == "ddp":
        return ReplicatedModels(task, teacher, student, spec, workers)
    from fraqat.distill.sharded import ShardedModels  # FSDP2 is slow to import

    return ShardedModels(task, teacher, student, spec, workers, integers, schedule)


def check_trainable(student: nn.Module, spec: TrainSpec, schedule: Schedule) -> None:
    """Refuses what could not be trained, or not averaged.

    Raises:
        ConfigError: The schedule ends below the final width of every layer or has a stage whose grid cannot be, everything is
            frozen, or scales are learned and averaged: a learned scale jumps with the width, and its
            average would still be that of wider stages at the end.
    """
    _check_widths(student, schedule)
    if not any(p.requires_grad for p in student.parameters()):
        raise config_error(
            "quantization", "all frozen", allowed="something to train", fix="free a family, or train for 0 steps"
        )
    if spec.ema_decay is not None and scale_rates_by_name(student):
        raise config_error(
            "train.ema_decay", spec.ema_decay, allowed="null with learned scales", fix="use range_method: mse"
        )


def _check_widths(student: nn.Module, schedule: Schedule) -> None:
    specs = [layer.weight_quantizer.spec for _, layer in quantized_layers(student)]
    lowest = min((spec.bits for spec in specs), default=schedule.target_bits)
    if schedule.target_bits < lowest:
        raise config_error(
            "schedule",
            schedule.target_bits,
            allowed=f"an end at {lowest:g} bits, the lowest final width of the student's layers, or more",
            fix="end the schedule there, or let a layer end lower",
        )
    narrowest = min(stage.bits for stage in schedule)
    if narrowest < 2 and any(spec.narrow and spec.bits == lowest for spec in specs):
        raise config_error(
            "schedule.stages",
            narrowest,
            allowed="2 bits or more with narrow weights",
            fix="raise it, or set narrow: false",
        )


def prepare_blocks_(student: nn.Module, models: TrainedModels, spec: TrainSpec) -> Callable[[], None]:
    """Lets repeated blocks recompute and compiles them, as a recipe wants it, for as long as training lasts.

    Args:
        student: The whole of it.
        models: As `make_models` gave them.
        spec: `activation_checkpointing` and `compile`.

    Returns:
        A call that undoes it.
    """
    undo = ExitStack()
    if spec.activation_checkpointing == "blocks":
        undo.callback(checkpoint_blocks_(student))
    undo.callback(models.compile_blocks_())
    return undo.close
