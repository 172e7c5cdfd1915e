"""One distillation step on fake tensors: what the trainer does, without values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fraqat.distill import (
    DeviceOptimizer,
    TrainSpec,
    autocast_dtype,
    checkpoint_blocks_,
    keep_products,
    repeated_blocks,
    share_frozen_,
    store_weights_,
)
from fraqat.kernels import EngineName
from fraqat.nn import EngineSpec, IntegerLayers, quantized_layers, unquantize_
from fraqat.planning.devices import DeviceKind
from fraqat.planning.fake import TRACE_DEVICE, TraceRules, fake_batch, new_fake_mode, to_fake
from fraqat.planning.recorder import Category, Moment, Phase, StepRecorder, Work

Outputs = Mapping[str, Tensor]


def squared_error(student: Outputs, teacher: Outputs, inputs: Mapping[str, Any]) -> Tensor:
    """Mean squared error of every output in float32, summed."""
    parts = [torch.nn.functional.mse_loss(student[name].float(), teacher[name].float()) for name in student]
    return torch.stack(parts).sum()


@dataclass(frozen=True)
class Workload:
    """What is trained: models on the meta device, and how they are called.

    Args:
        student: A model changed by `quantize_`; frozen parameters stay frozen.
        predict: Forward pass of a model on one batch, as `DistillTask.predict`.
        make_inputs: Number of samples -> a batch of that size, as `DistillTask.make_inputs` gives it; only shapes and dtypes
            count, so the meta device is enough.
        loss: Of the student's and the teacher's outputs and the batch.
        teacher: None is the student without quantization.
        teacher_dtype: Precision of the teacher when it is made from the student.
        constant_outputs: Names of outputs that do not depend on the batch, as of `ConstantOutputs`.
        make_pairs: Number of rows of the model, even -> a part of a training batch where guidance is learned: half as many
            samples, each computed twice by `predict`. None: training batches are of `make_inputs`.
        draws_noise_levels: Whether training draws noise levels, which can follow the student's error.
    """

    student: nn.Module
    predict: Callable[[nn.Module, Any], Outputs]
    make_inputs: Callable[[int], Mapping[str, Any]]
    loss: Callable[[Outputs, Outputs, Any], Tensor] = squared_error
    teacher: nn.Module | None = None
    teacher_dtype: torch.dtype = torch.float32
    constant_outputs: frozenset[str] = frozenset()
    make_pairs: Callable[[int], Mapping[str, Any]] | None = None
    draws_noise_levels: bool = False

    def make_teacher(self) -> nn.Module:
        """The teacher, frozen."""
        teacher = self.teacher
        if teacher is None:
            teacher = copy.deepcopy(self.student)
            unquantize_(teacher)
            teacher = nn.Module.to(teacher, dtype=self.teacher_dtype)
        return teacher.eval().requires_grad_(False)


@dataclass(frozen=True)
class RecordingTrace:
    """What recording the teacher's outputs allocates and computes, before the first step.

    Args:
        constant: Bytes that stay meanwhile, by category.
        moments: Bytes that come and go.
        work: Operations for one part of a batch.
        part_bytes: Outputs of one part, on disk.
        held_out_bytes: Outputs of one held-out batch.
    """

    constant: Mapping[Category, int]
    moments: tuple[Moment, ...]
    work: tuple[Work, ...]
    part_bytes: int
    held_out_bytes: int


@dataclass(frozen=True)
class StepTrace:
    """What one step on one device, with nothing sharded, allocates and computes.

    Args:
        constant: Bytes that stay, by category.
        moments: Bytes that come and go, in time; with accumulation those of a later part, where all gradients are there.
        work: Operations of one step with one part.
        num_trained: Parameters that the optimizer changes.
        largest_block_bytes: Parameters of the student's largest repeated block (of the whole model if none repeats).
        host_bytes: What an optimizer on the host keeps there.
        recording: Ahead of all steps, with `train.teacher.outputs: recorded`; None without.
    """

    constant: Mapping[Category, int]
    moments: tuple[Moment, ...]
    work: tuple[Work, ...]
    num_trained: int
    largest_block_bytes: int
    host_bytes: int
    recording: RecordingTrace | None = None


def trace_step(
    workload: Workload,
    train: TrainSpec,
    micro_batch: int,
    kind: DeviceKind,
    *,
    validation_batch: int | None = None,
) -> StepTrace:
    """Runs one optimizer step of the trainer, and the validation after it, on fake tensors.

    Args:
        workload: Models and their call.
        train: Accumulation, autocast, clipping, average, engine, optimizer, teacher, checkpointing.
        micro_batch: Rows of the model in one forward pass of training.
        kind: Decides attention kernels, autocast rules and the layout of weight codes.
        validation_batch: Samples of one forward pass of the validation; None is the batch size of `train`.
    """
    step = _Step(workload, train, kind)
    inputs = (workload.make_pairs or workload.make_inputs)(micro_batch)
    held_out = workload.make_inputs(validation_batch or train.batch_size)
    recorder = step.recorder
    with step.mode, recorder, TraceRules(kind):
        step.set_up_models()
        recording = step.record(inputs, held_out) if step.records else None
        step.set_up_state()
        step.run(fake_batch(inputs, step.mode))
        recorder.phase = Phase.VALIDATION
        step.validate(fake_batch(held_out, step.mode))
    moments = [moment for moment in recorder.moments if moment.phase is not Phase.RECORDING]
    return StepTrace(
        constant=step.constant,
        moments=tuple(moments if train.accumulation == 1 else _of_later_part(moments)),
        work=tuple(item for item in recorder.work() if item.phase is not Phase.RECORDING),
        num_trained=sum(parameter.numel() for parameter in step.trained),
        largest_block_bytes=_largest_block_bytes(step.student),
        host_bytes=recorder.totals[Category.HOST],
        recording=recording,
    )


def with_constants_of(trace: StepTrace, workload: Workload, train: TrainSpec, kind: DeviceKind) -> StepTrace:
    """A trace with what stays during a step as other settings of optimizer and teacher have it, without tracing a step.

    Args:
        trace: Of the same workload and batch.
        workload, train, kind: As in `trace_step`.
    """
    step = _Step(workload, train, kind)
    recording = trace.recording
    with step.mode, step.recorder, TraceRules(kind):
        step.set_up_models()
        if recording is not None:
            before = step.constants() | {Category.INPUTS: recording.constant[Category.INPUTS]}
            recording = dataclasses.replace(recording, constant=before)
            step.let_go_of_teacher()
        step.set_up_state()
    constant = step.constants() | {Category.INPUTS: trace.constant[Category.INPUTS]}
    if recording is not None:  # what is kept of the teacher is known to the trace alone
        constant[Category.TEACHER] = trace.constant[Category.TEACHER]
    host_bytes = step.recorder.totals[Category.HOST]
    return dataclasses.replace(trace, constant=constant, host_bytes=host_bytes, recording=recording)


_CONSTANT = (Category.WEIGHTS, Category.TEACHER, Category.OPTIMIZER, Category.AVERAGE, Category.INPUTS)


class _Step:
    """The trainer's step in parts, with everything labelled."""

    def __init__(self, workload: Workload, train: TrainSpec, kind: DeviceKind):
        self.workload, self.train, self.kind = workload, train, kind
        self.mode, self.recorder = new_fake_mode(), StepRecorder()
        self.student, self.integers = _fake_student(workload.student, train.engine, self.mode)
        self.student.train()
        self.teacher: nn.Module | None = to_fake(workload.make_teacher(), self.mode)
        self.records = train.teacher.outputs == "recorded"
        self.trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        self.constant: dict[Category, int] = {}
        self.optimizer = DeviceOptimizer(self.trained, dataclasses.replace(train, compile="none"))
        self._layouts: list[Tensor] = []
        self._recorded: dict[Phase, dict[str, tuple[torch.Size, torch.dtype]]] = {}
        self._kept: dict[Phase, dict[str, Tensor]] = {}
        self._watch()
        if train.activation_checkpointing == "blocks":
            checkpoint_blocks_(self.student, lambda: _contexts(kind), keeps_random_state=False)

    def set_up_models(self) -> None:
        """What is there from the start: weights and their codes, teacher, average."""
        label = self.recorder.label
        assert self.teacher is not None
        self._hold_teacher(self.teacher)
        label(_tensors(self.teacher), Category.TEACHER)
        label(_tensors(self.student), Category.WEIGHTS)
        weights = [layer.integer for _, layer in quantized_layers(self.student) if layer.integer is not None]
        if self.kind is DeviceKind.CPU:  # engines of a CPU keep the codes a second time, in their own order
            codes = [buffer for weight in weights for buffer in weight.buffers() if buffer.dtype == torch.int8]
            self._layouts = [torch.empty_like(buffer) for buffer in codes]
        label((tensor for weight in weights for tensor in weight.buffers()), Category.CODES)
        label(self._layouts, Category.CODES)
        self.averages: list[Tensor] = []
        if self.train.ema_decay is not None:
            self.averages = [torch.empty_like(parameter, dtype=torch.float32) for parameter in self.trained]
            label(self.averages, Category.AVERAGE)

    def constants(self) -> dict[Category, int]:
        """Bytes that stay, as they are now."""
        return {category: self.recorder.totals[category] for category in _CONSTANT}

    def record(self, inputs: Mapping[str, Any], held_out: Mapping[str, Any]) -> RecordingTrace:
        """The teacher's outputs for a part and for a held-out batch, after which it leaves memory."""
        recorder, batch = self.recorder, fake_batch(inputs, self.mode)
        recorder.label(_values(batch), Category.INPUTS)
        constant = self.constants()
        recorder.phase = Phase.RECORDING
        with self._autocast():
            part_bytes = self._record(Phase.FORWARD, batch)
        work = recorder.work()
        held_out_bytes = self._record(Phase.VALIDATION, fake_batch(held_out, self.mode))
        moments = tuple(recorder.moments)
        recorder.phase = Phase.SETUP
        self.let_go_of_teacher()
        return RecordingTrace(constant, moments, work, part_bytes, held_out_bytes)

    def let_go_of_teacher(self) -> None:
        """The teacher leaves memory, but for what is kept of it."""
        self.teacher = None

    @torch.no_grad()
    def _record(self, phase: Phase, inputs: dict[str, Any]) -> int:
        """Bytes of the outputs that are recorded; keeps those that are the same for all batches."""
        assert self.teacher is not None
        constant = self.workload.constant_outputs
        outputs = self._predict(self.teacher, inputs)
        self._kept[phase] = {name: value for name, value in outputs.items() if name in constant}
        recorded = {name: value for name, value in outputs.items() if name not in constant}
        self._recorded[phase] = {name: (value.shape, value.dtype) for name, value in recorded.items()}
        return sum(value.numel() * value.itemsize for value in recorded.values())

    def _hold_teacher(self, teacher: nn.Module) -> None:
        """As `hold_teacher_`, where a teacher that is the student without quantization has equal values."""
        shared: tuple[str, ...] = ()
        if self.workload.teacher is None:
            shared = share_frozen_(teacher, self.student, compares=False)
        store_weights_(teacher, self.train.teacher.dtype, keep=shared)

    def set_up_state(self) -> None:
        """Takes a first step, which makes the optimizer's state."""
        is_on_host = self.train.optimizer_device == "host"
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.recorder.label(self.optimizer.state_tensors(), Category.HOST if is_on_host else Category.OPTIMIZER)
        self._host_copies = [torch.empty_like(p) for p in self.trained for _ in range(2)] if is_on_host else []
        self.recorder.label(self._host_copies, Category.HOST)

    def run(self, inputs: dict[str, Any]) -> None:
        """A step with one part; see `_of_later_part` for more."""
        self.recorder.label(_values(inputs), Category.INPUTS)
        self.constant = self.constants()
        self._forward_and_backward(inputs)
        self.recorder.phase = Phase.UPDATE
        if self.integers is not None:
            self.integers.finish_gradients_()
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.train.clip_norm is not None:
            clip_grads_with_norm_(self.trained, self.train.clip_norm, norm)
        if self.train.optimizer_device == "same":
            self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.trained, strict=False):
                average.lerp_(parameter.detach().float(), 0.1)

    def validate(self, inputs: dict[str, Any]) -> None:
        """The held-out loss as the trainer takes it: whole batches, no autocast, gradients gone."""
        self.optimizer.zero_grad()
        self.student.eval()
        with torch.no_grad():
            kept = [parameter.clone() for parameter in self.trained] if self.averages else []
            outputs = self._teach(Phase.VALIDATION, inputs)
            self.workload.loss(self._predict(self.student, inputs), outputs, inputs)
            del kept

    def _watch(self) -> None:
        """Hooks that label gradients, and what fake quantization makes of weights."""
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
        for _, layer in quantized_layers(self.student):
            layer.weight_quantizer.register_forward_pre_hook(lambda *_: self._set_in_quantizer(True))
            layer.weight_quantizer.register_forward_hook(lambda *_: self._set_in_quantizer(False))

    def _forward_and_backward(self, inputs: dict[str, Any]) -> None:
        self.recorder.phase = Phase.TEACHER
        with torch.no_grad(), self._autocast():
            teacher_output = self._teach(Phase.FORWARD, inputs)
        self.recorder.phase = Phase.FORWARD
        with self._autocast():
            student_output = self._predict(self.student, inputs)
            loss = self.workload.loss(student_output, teacher_output, inputs)
        del student_output, teacher_output
        self.recorder.phase = Phase.BACKWARD
        loss.backward()

    def _predict(self, model: nn.Module, inputs: dict[str, Any]) -> Outputs:
        return self.workload.predict(model, inputs)

    def _teach(self, phase: Phase, inputs: dict[str, Any]) -> Outputs:
        """The teacher's outputs, computed, or in memory of their own as they are read from disk."""
        if self.teacher is not None:
            return self._predict(self.teacher, inputs)
        outputs = {
            name: torch.empty(shape, dtype=dtype, device=TRACE_DEVICE)
            for name, (shape, dtype) in self._recorded[phase].items()
        }
        return {**outputs, **self._kept[phase]}

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = autocast_dtype(self.train.autocast, "cpu" if self.kind is DeviceKind.CPU else "cuda")
        return nullcontext() if dtype is None else torch.autocast(TRACE_DEVICE, dtype=dtype)

    def _label_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.recorder.label((parameter.grad,), Category.GRADIENTS)

    def _set_in_quantizer(self, value: bool) -> None:
        self.recorder.in_quantizer = value


def _of_later_part(moments: list[Moment]) -> list[Moment]:
    """From the second part on, every gradient is there from the start, and a new one is added to it and freed."""
    gradients = max(moment.gradients for moment in moments)
    return [dataclasses.replace(moment, gradients=gradients) for moment in moments]


def _fake_student(
    student: nn.Module, engine: EngineSpec, mode: FakeTensorMode
) -> tuple[nn.Module, IntegerLayers | None]:
    """A fake copy with its integer path, which is made while the weights have no memory: engines would read fake ones."""
    if engine.name is EngineName.REFERENCE:
        return to_fake(student, mode), None
    on_meta = copy.deepcopy(student).to("meta")
    integers = IntegerLayers(on_meta, dataclasses.replace(engine, name=EngineName.AUTO, strict=False))
    return to_fake((on_meta, integers), mode)


def _contexts(kind: DeviceKind) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The backward pass is one call, in which a function mode is set aside: the second run of a block needs it again."""
    first, again = keep_products()
    return first, _together(TraceRules(kind), again)


@contextmanager
def _together(*contexts: AbstractContextManager[Any]) -> Generator[None]:
    with contexts[0], contexts[1]:
        yield


def _largest_block_bytes(model: nn.Module) -> int:
    return max(_parameter_bytes(block) for block in repeated_blocks(model) or [model])


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def _values(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    return (value for value in batch.values() if isinstance(value, Tensor))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
