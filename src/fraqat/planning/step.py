"""One distillation step on fake tensors: what the trainer does, without values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from fraqat.distill import TrainSpec
from fraqat.nn import quantized_layers, unquantize_
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
    """

    student: nn.Module
    predict: Callable[[nn.Module, Any], Outputs]
    make_inputs: Callable[[int], Mapping[str, Any]]
    loss: Callable[[Outputs, Outputs, Any], Tensor] = squared_error
    teacher: nn.Module | None = None
    teacher_dtype: torch.dtype = torch.float32

    def make_teacher(self) -> nn.Module:
        """The teacher, frozen."""
        teacher = self.teacher
        if teacher is None:
            teacher = copy.deepcopy(self.student)
            unquantize_(teacher)
            teacher = nn.Module.to(teacher, dtype=self.teacher_dtype)
        return teacher.eval().requires_grad_(False)


@dataclass(frozen=True)
class StepTrace:
    """What one step on one device, with nothing sharded, allocates and computes.

    Args:
        constant: Bytes that stay, by category.
        moments: Bytes that come and go, in time; with accumulation those of a later part, where all gradients are there.
        work: Operations of one step with one part.
        num_trained: Parameters that the optimizer changes.
        largest_block_bytes: Parameters of the student's largest repeated block (of the whole model if none repeats).
        checkpoint_saving_bytes: What activation checkpointing of the repeated blocks would save: what they keep, less the one
            block that is computed again at a time and less the input of each.
    """

    constant: Mapping[Category, int]
    moments: tuple[Moment, ...]
    work: tuple[Work, ...]
    num_trained: int
    largest_block_bytes: int
    checkpoint_saving_bytes: int


def trace_step(
    workload: Workload,
    train: TrainSpec,
    micro_batch: int,
    kind: DeviceKind,
    *,
    validation_batch: int | None = None,
    cached_teacher: bool = False,
    checkpoint_blocks: bool = False,
) -> StepTrace:
    """Runs one optimizer step of the trainer, and the validation after it, on fake tensors.

    Args:
        workload: Models and their call.
        train: Accumulation, autocast, clipping, average.
        micro_batch: Samples of one forward pass.
        kind: Decides attention kernels and autocast rules.
        validation_batch: Samples of one forward pass of the validation; None is the batch size of `train`.
        cached_teacher: The teacher's outputs come with the batch.
        checkpoint_blocks: Repeated blocks keep their input alone and run again in the backward pass.
    """
    mode = new_fake_mode()
    student = to_fake(workload.student, mode).train()
    teacher = None if cached_teacher else to_fake(workload.make_teacher(), mode)
    step = _Step(workload, train, student, teacher, StepRecorder())
    blocks = repeated_blocks(student)
    step.watch(blocks)
    if checkpoint_blocks:
        for block in blocks:
            _checkpoint_(block, kind)
    inputs = workload.make_inputs(micro_batch)
    held_out = workload.make_inputs(validation_batch or train.batch_size)
    with mode, step.recorder, TraceRules(kind):
        step.set_up()
        step.run(fake_batch(inputs, mode))
        step.recorder.phase = Phase.VALIDATION
        step.validate(fake_batch(held_out, mode))
    recorder = step.recorder
    return StepTrace(
        constant=step.constant,
        moments=tuple(recorder.moments if train.accumulation == 1 else _of_later_part(recorder.moments)),
        work=recorder.work(),
        num_trained=sum(parameter.numel() for parameter in step.trained),
        largest_block_bytes=_largest_block_bytes(student, blocks),
        checkpoint_saving_bytes=step.checkpoint_saving_bytes(),
    )


_CONSTANT = (Category.WEIGHTS, Category.TEACHER, Category.OPTIMIZER, Category.AVERAGE, Category.INPUTS)


class _Step:
    """The trainer's step in parts, with everything labelled."""

    def __init__(
        self,
        workload: Workload,
        train: TrainSpec,
        student: nn.Module,
        teacher: nn.Module | None,
        recorder: StepRecorder,
    ):
        self.workload, self.train, self.student, self.teacher = workload, train, student, teacher
        self.recorder = recorder
        self.trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.constant: dict[Category, int] = {}
        self._num_blocks = 0
        self._block_start = 0
        self._block_kept: list[int] = []
        self._block_outputs: list[int] = []

    def set_up(self) -> None:
        """Everything that is there before a step: weights, optimizer state, average."""
        self.recorder.label(_tensors(self.student), Category.WEIGHTS)
        if self.teacher is not None:
            self.recorder.label(_tensors(self.teacher), Category.TEACHER)
        self.optimizer = torch.optim.AdamW(self.trained, fused=True)
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.recorder.label(_state_tensors(self.optimizer), Category.OPTIMIZER)
        self.averages: list[Tensor] = []
        if self.train.ema_decay is not None:
            self.averages = [torch.empty_like(parameter, dtype=torch.float32) for parameter in self.trained]
            self.recorder.label(self.averages, Category.AVERAGE)

    def run(self, inputs: dict[str, Any]) -> None:
        """A step with one part; see `_of_later_part` for more."""
        self.recorder.label((value for value in inputs.values() if isinstance(value, Tensor)), Category.INPUTS)
        cached = self._cached_outputs(inputs) if self.teacher is None else None
        self.constant = {category: self.recorder.totals[category] for category in _CONSTANT}
        self._forward_and_backward(inputs, cached)
        self.recorder.phase = Phase.UPDATE
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.train.clip_norm is not None:
            clip_grads_with_norm_(self.trained, self.train.clip_norm, norm)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.trained, strict=False):
                average.lerp_(parameter.detach().float(), 0.1)

    def validate(self, inputs: dict[str, Any]) -> None:
        """The held-out loss as the trainer takes it: whole batches, no autocast, gradients still there."""
        self.student.eval()
        with torch.no_grad():
            kept = [parameter.clone() for parameter in self.trained] if self.averages else []
            outputs = self._cached_outputs(inputs) if self.teacher is None else self._predict(self.teacher, inputs)
            self.workload.loss(self._predict(self.student, inputs), outputs, inputs)
            del kept

    def watch(self, blocks: list[nn.Module]) -> None:
        """Hooks that label gradients and codes and see what each block keeps."""
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
        for _, layer in quantized_layers(self.student):
            layer.weight_quantizer.register_forward_pre_hook(lambda *_: self._set_in_quantizer(True))
            layer.weight_quantizer.register_forward_hook(lambda *_: self._set_in_quantizer(False))
        self._num_blocks = len(blocks)
        for block in blocks:
            block.register_forward_pre_hook(self._enter_block)
            block.register_forward_hook(self._leave_block)

    def checkpoint_saving_bytes(self) -> int:
        """See `StepTrace`."""
        return max(0, sum(self._block_kept) - max(self._block_kept, default=0) - sum(self._block_outputs))

    def _forward_and_backward(self, inputs: dict[str, Any], cached: Outputs | None) -> None:
        self.recorder.phase = Phase.TEACHER
        with torch.no_grad(), self._autocast():
            teacher_output = cached if self.teacher is None else self._predict(self.teacher, inputs)
        assert teacher_output is not None
        self.recorder.phase = Phase.FORWARD
        with self._autocast():
            student_output = self._predict(self.student, inputs)
            loss = self.workload.loss(student_output, teacher_output, inputs)
        del student_output, teacher_output
        self.recorder.phase = Phase.BACKWARD
        loss.backward()

    def _predict(self, model: nn.Module, inputs: dict[str, Any]) -> Outputs:
        return self.workload.predict(model, inputs)

    def _cached_outputs(self, inputs: dict[str, Any]) -> Outputs:
        """Tensors like the teacher's outputs, as part of the batch; nothing of their making is counted."""
        phase, self.recorder.phase = self.recorder.phase, Phase.SETUP
        with torch.no_grad():
            outputs = {name: torch.empty_like(value) for name, value in self._predict(self.student, inputs).items()}
        self.recorder.label(outputs.values(), Category.INPUTS)
        self.recorder.phase = phase
        self._block_kept.clear()
        self._block_outputs.clear()
        return outputs

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.train.autocast == "none":
            return nullcontext()
        return torch.autocast(TRACE_DEVICE, dtype=torch.bfloat16)

    def _label_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.recorder.label((parameter.grad,), Category.GRADIENTS)

    def _set_in_quantizer(self, value: bool) -> None:
        self.recorder.in_quantizer = value

    def _enter_block(self, *_: object) -> None:
        self._block_start = self.recorder.num_bytes()

    def _leave_block(self, block: nn.Module, args: object, output: object) -> None:
        if self.recorder.phase is Phase.FORWARD and len(self._block_kept) < self._num_blocks:
            self._block_kept.append(self.recorder.num_bytes() - self._block_start)
            tensors = output if isinstance(output, tuple | list) else (output,)
            self._block_outputs.append(sum(t.numel() * t.itemsize for t in tensors if isinstance(t, Tensor)))


def _of_later_part(moments: list[Moment]) -> list[Moment]:
    """From the second part on, every gradient is there from the start, and a new one is added to it and freed."""
    gradients = max(moment.gradients for moment in moments)
    return [dataclasses.replace(moment, gradients=gradients) for moment in moments]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network is made of: children of its outermost lists of two or more modules of one class."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        children = list(module.children())
        is_list = isinstance(module, nn.ModuleList) and len({type(child) for child in children}) == 1
        if is_list and len(children) > 1 and any(True for _ in children[0].parameters()):
            found.extend(children)
            return
        for child in children:
            search(child)

    search(model)
    return found


def _checkpoint_(block: nn.Module, kind: DeviceKind) -> None:
    """The block's forward pass keeps its inputs alone; the random state is not a matter of memory."""
    forward = block.forward

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), TraceRules(kind)  # the backward pass is one call, in which a function mode is set aside

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = run


def _largest_block_bytes(model: nn.Module, blocks: list[nn.Module]) -> int:
    return max(_parameter_bytes(block) for block in blocks or [model])


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    states = cast("dict[Any, dict[str, Any]]", optimizer.state)
    return [value for state in states.values() for value in state.values() if isinstance(value, Tensor)]
