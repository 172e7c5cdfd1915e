"""Other people's quantization-aware training, through their code, on our data: what a comparison needs; see docs/peers.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fraqat.baselines.layers import peer_layers
from fraqat.baselines.torchao_layers import ParqOptimizer, ParqSpec, prepare_qat_, quantize_tensors_
from fraqat.distill import (
    Batch,
    DistillTask,
    TrainSpec,
    autocast,
    checkpoint_blocks_,
    hold_teacher_,
    make_optimizer,
    training_task,
)
from fraqat.distill.guidance import training_stream
from fraqat.distill.parts import to_device
from fraqat.distill.validation import validation_loss
from fraqat.errors import NonFiniteLossError, config_error, parse_choice
from fraqat.nn import unquantize_
from fraqat.schedules import Schedule, Stage


class PeerName(StrEnum):
    """`torchao-qat`: `QATConfig`, fake quantization with the straight-through estimator. `torchao-parq`: `QuantOptimizer`
    with `ProxPARQ`. `torchao-dynamic`: `quantize_`, no training."""

    TORCHAO_QAT = "torchao-qat"
    TORCHAO_PARQ = "torchao-parq"
    TORCHAO_DYNAMIC = "torchao-dynamic"


@dataclass(frozen=True)
class PeerResult:
    """What a peer left.

    Args:
        validation_loss: `fraqat.distill.validation_loss` of the model.
        num_steps: Optimizer steps.
        train_s: Seconds that they took.
        model: The peer's model, in evaluation mode.
    """

    validation_loss: float
    num_steps: int
    train_s: float
    model: nn.Module


class StepOptimizer(Protocol):
    """What `train_steps_` needs from an optimizer."""

    def set_learning_rate_(self, learning_rate: float) -> None:
        """Takes effect at the next step."""
        ...

    def zero_grad(self) -> None:
        """Lets the gradients leave memory."""
        ...

    def step(self) -> None:
        """Updates the parameters in place."""
        ...


OnStep = Callable[[int, float], None]
"""Receives the step, counted from 0, and its training loss."""


def train_peer(
    name: PeerName | str,
    task: DistillTask,
    teacher: nn.Module,
    student: nn.Module,
    num_steps: int,
    spec: TrainSpec,
    *,
    parq: ParqSpec | None = None,
    on_step: OnStep = lambda step, loss: None,
) -> PeerResult:
    """Turns a student into a peer's, trains it as `Distiller` trains ours, and measures it.

    The same are data order, noise, teacher, loss, precision, clipping, AdamW, course of the learning rate (over one stage),
    number of steps, start, and which layers are quantized or frozen. The grids are the peer's: see docs/peers.md.

    Args:
        name: Which peer.
        task: Gives the data.
        teacher: Is frozen; `spec.teacher` changes how it holds its weights, for good.
        student: Changed by `fraqat.nn.quantize_` and not trained. Its layers say what the peer quantizes; then they become
            float layers again, and the peer's. It is used up.
        num_steps: Optimizer steps; 0 for `torchao-dynamic`, 2 or more for `torchao-parq`.
        spec: Settings. `engine`, `compile`, `scale_rate`, `calibration_samples` and the settings of checkpoints and logs
            belong to our layers and trainer and have no meaning here.
        parq: Settings of `torchao-parq`, None for its defaults.
        on_step: Called after every step.

    Raises:
        ConfigError: An unknown peer, torchao is not installed, or a setting that the peer does not have.
        NonFiniteLossError: Loss or gradient became NaN or infinite.
    """
    peer = parse_choice("peer", name, PeerName)
    _check_settings(peer, num_steps, spec, parq)
    layers = peer_layers(student)
    _to_float_(student)
    teacher = teacher.eval().requires_grad_(False)
    hold_teacher_(teacher, student, spec.teacher.dtype)
    if peer is PeerName.TORCHAO_DYNAMIC:
        quantize_tensors_(student.requires_grad_(False), layers)
        return _measured(task, teacher, student, spec, 0, 0.0)
    is_parq = peer is PeerName.TORCHAO_PARQ
    # PARQ's optimizer rounds the weights that are trained; frozen ones and all inputs have torchao's fake quantizers.
    prepare_qat_(student, layers, has_weights=lambda layer: not (is_parq and layer.is_trained))
    train_s = 0.0
    if num_steps:
        trained = [p for p in student.parameters() if p.requires_grad]
        if not trained:
            raise config_error("quantization", "all frozen", allowed="something to train", fix="free a family")
        optimizer: StepOptimizer = (
            ParqOptimizer(student, layers, spec, parq or ParqSpec(), num_steps)
            if is_parq
            else make_optimizer(trained, spec)
        )
        train_s = train_steps_(task, teacher, student, optimizer, num_steps, spec, on_step)
    return _measured(task, teacher, student, spec, num_steps, train_s)


def train_steps_(
    task: DistillTask,
    teacher: nn.Module,
    model: nn.Module,
    optimizer: StepOptimizer,
    num_steps: int,
    spec: TrainSpec,
    on_step: OnStep = lambda step, loss: None,
) -> float:
    """Distils a model in place as `Distiller` does at one width: the same inputs, arithmetic and order.

    Args:
        task: Gives the data.
        teacher: Frozen.
        model: Its parameters that want a gradient are trained.
        optimizer: Of these.
        num_steps: 1 or more.
        spec: Settings.
        on_step: Called after every step.

    Returns:
        Seconds that the steps took.

    Raises:
        NonFiniteLossError: Loss or gradient became NaN or infinite.
    """
    task = training_task(task, spec)
    stage = Stage(0, 4.0, 0, num_steps)  # the width is the model's own affair
    loop = _Loop(task, teacher, model, optimizer, Schedule((stage,)), spec)
    torch.manual_seed(spec.seed)
    undo = checkpoint_blocks_(model) if spec.activation_checkpointing == "blocks" else lambda: None
    batches = iter(training_stream(task, spec))
    model.train()
    train_s = 0.0
    try:
        for step in range(num_steps):
            start = time.perf_counter()
            loss = loop.run(step, batches)
            train_s += time.perf_counter() - start
            on_step(step, loss)
    finally:
        undo()
    return train_s


@dataclass(frozen=True)
class _Loop:
    task: DistillTask
    teacher: nn.Module
    model: nn.Module
    optimizer: StepOptimizer
    schedule: Schedule
    spec: TrainSpec

    def run(self, step: int, batches: Iterator[Batch]) -> float:
        """One optimizer step; returns the loss before it."""
        spec, parts = self.spec, self.spec.accumulation
        device = next(self.model.parameters()).device
        self.optimizer.set_learning_rate_(spec.learning_rate.at(step, self.schedule))
        self.optimizer.zero_grad()
        loss = 0.0
        for part in range(parts):
            seed = (spec.seed << 32) + step * parts + part
            torch.manual_seed(seed)  # as in our own training: what a model draws comes from the part of the batch
            inputs = to_device(self.task.make_inputs(next(batches), torch.Generator().manual_seed(seed)), device)
            with torch.no_grad(), self._autocast(device):
                teacher_output = self.task.predict(self.teacher, inputs)
            with self._autocast(device):
                student_output = self.task.predict(self.model, inputs)
                part_loss = self.task.loss(student_output, teacher_output, inputs, spec.losses) / parts
            self._check(bool(torch.isfinite(part_loss)), "loss", step)
            part_loss.backward()
            loss += part_loss.item()
        self._clip(step)
        self.optimizer.step()
        return loss

    def _clip(self, step: int) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._check(bool(torch.isfinite(norm)), "gradient", step)
        if self.spec.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.spec.clip_norm, norm)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return autocast(self.spec.autocast, device.type)

    def _check(self, is_finite: bool, what: str, step: int) -> None:
        if not is_finite:
            raise NonFiniteLossError(
                f"the peer's {what} is not finite at step {step} of {self.schedule.total_steps}. Fix: lower "
                "train.learning_rate.peak, set train.clip_norm, or train.autocast: none."
            )


def _check_settings(peer: PeerName, num_steps: int, spec: TrainSpec, parq: ParqSpec | None) -> None:
    least = 2 if peer is PeerName.TORCHAO_PARQ else 0
    if num_steps < least:
        raise config_error("num_steps", num_steps, allowed=f"{least} or more for {peer}", fix="train longer")
    if peer is PeerName.TORCHAO_DYNAMIC and num_steps:
        raise config_error("num_steps", num_steps, allowed=f"0 for {peer}", fix="pass 0")
    if parq is not None and peer is not PeerName.TORCHAO_PARQ:
        raise config_error("parq", parq, allowed=f"None for {peer}", fix="drop it")
    if num_steps and spec.teacher.outputs == "recorded":
        raise config_error(
            "train.teacher.outputs",
            "recorded",
            allowed=f"computed for {peer}, whose loop asks the teacher at every step",
            fix="set train.teacher.outputs: computed, or leave the method out",
        )
    if num_steps and spec.draws_by_error:
        raise config_error(
            "train.timestep_importance",
            "set",
            allowed=f"null or auto for {peer}, which draws noise levels as the task does",
            fix="remove train.timestep_importance, or leave the method out",
        )
    if spec.low_rank is not None:
        raise config_error("train.low_rank", spec.low_rank, allowed="null: peers train the weights", fix="drop it")
    if spec.ema_decay is not None:
        raise config_error("train.ema_decay", spec.ema_decay, allowed="null: peers have no average", fix="drop it")


def _to_float_(student: nn.Module) -> None:
    """Float layers again; unlike after `unquantize_` alone, what was frozen for training stays frozen."""
    frozen = {name for name, p in student.named_parameters(remove_duplicate=False) if not p.requires_grad}
    unquantize_(student)
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)


def _measured(
    task: DistillTask, teacher: nn.Module, model: nn.Module, spec: TrainSpec, num_steps: int, train_s: float
) -> PeerResult:
    model.eval()
    return PeerResult(validation_loss(task, teacher, model, spec), num_steps, train_s, model)
