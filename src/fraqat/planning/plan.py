"""What a training run needs, before anything is downloaded or rented: memory, time, and the size of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fraqat.distill import TrainSpec, repeated_blocks
from fraqat.distill.spec import TeacherDtype
from fraqat.errors import config_error
from fraqat.nn import quantized_layers
from fraqat.planning.advice import Alternative, memory_advice
from fraqat.planning.devices import Device, DeviceKind
from fraqat.planning.memory import MemoryUse, PlanOptions, Sharding, device_memory
from fraqat.planning.recorder import Category, Phase
from fraqat.planning.result_size import ResultSize, packed_size
from fraqat.planning.roofline import phase_times_s
from fraqat.planning.step import RecordingTrace, StepTrace, Workload, trace_step, with_constants_of
from fraqat.table import Table

_GIB = 2**30
_GRADIENT_BYTES = 4
_TIME_NOTE = "times are what the roofline allows, without validation, checkpoints and data: real steps take longer"
_TEACHER_DTYPES: tuple[TeacherDtype, ...] = ("bfloat16", "int8")
_PART_PHASES = (Phase.TEACHER, Phase.FORWARD, Phase.BACKWARD)


@dataclass(frozen=True)
class Plan:
    """The answer of `plan_training`.

    Args:
        device: On which it would run.
        options: How.
        num_parameters, num_quantized_weights, num_trained: Counts of the student.
        batch_size, micro_batch: Rows of the model per optimizer step in all, and per forward pass on one device.
        memory: Of one device at the fullest moment.
        phase_times_s: Seconds of one optimizer step by phase, on one device.
        communication_s: Seconds that a step waits for other devices.
        total_steps: Of the schedule.
        result: Size of the exported model.
        recording_s: Seconds in which the teacher's outputs are recorded before training.
        recorded_bytes: What they take on disk until the run ends, at most; None without.
        recorded_limit_bytes: What they may take.
        is_of_pairs: Guidance is learned: a sample of training is two rows of the model.
        advice: What would make it fit, the largest saving first; empty if it fits, unless it was asked for.
    """

    device: Device
    options: PlanOptions
    num_parameters: int
    num_quantized_weights: int
    num_trained: int
    batch_size: int
    micro_batch: int
    memory: MemoryUse
    phase_times_s: Mapping[Phase, float]
    communication_s: float
    total_steps: int
    result: ResultSize
    recording_s: float = 0.0
    recorded_bytes: int | None = None
    recorded_limit_bytes: float = 0.0
    is_of_pairs: bool = False
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether one device holds its part."""
        return self.memory.num_bytes <= self.device.memory_bytes

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.phase_times_s.values()) + self.communication_s

    @property
    def hours(self) -> float:
        """Of the whole schedule with what is recorded before it, at least; validation, checkpoints and data are not counted."""
        return (self.step_s * self.total_steps + self.recording_s) / 3600

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line if the memory does not suffice, and the advice."""
        if self.fits:
            return ()
        missing = (self.memory.num_bytes - self.device.memory_bytes) / _GIB
        return (f"does not fit: {missing:.1f} GiB more than one {self.device.name} has", *self.advice)

    def to_table(self) -> Table:
        """Everything as rows of quantity, value and unit."""
        host_bytes = self.memory.host_bytes
        rows = [
            ("parameters", self.num_parameters, ""),
            ("quantized weights", self.num_quantized_weights, ""),
            ("trained parameters", self.num_trained, ""),
            ("devices", self.options.num_devices, self.device.name),
            ("sharding", self.options.sharding.value, ""),
            (
                "batch size",
                self.batch_size,
                "rows of the model, two for each sample" if self.is_of_pairs else "samples",
            ),
            ("micro-batch", self.micro_batch, f"{'rows' if self.is_of_pairs else 'samples'} per device and pass"),
            *((f"memory: {name}", num_bytes / _GIB, "GiB") for name, num_bytes in self._shown_parts()),
            ("memory in all", self.memory.num_bytes / _GIB, f"GiB, fullest in {self.memory.phase.value}"),
            *((("memory of the host: optimizer", host_bytes / _GIB, "GiB for each device"),) if host_bytes else ()),
            ("memory of the device", self.device.memory_bytes / _GIB, "GiB"),
            ("fits", self.fits, ""),
            *((f"time: {phase.value}", seconds, "s per step") for phase, seconds in self.phase_times_s.items()),
            ("time: waiting for other devices", self.communication_s, "s per step"),
            ("time of a step", self.step_s, "s"),
            *((("recording before the first step", self.recording_s, "s"),) if self.recorded_bytes is not None else ()),
            ("steps", self.total_steps, ""),
            ("duration", self.hours, "hours"),
            ("device hours", self.hours * self.options.num_devices, "hours"),
            ("size of the result", self.result.num_bytes / _GIB, "GiB"),
            ("bits per quantized weight", self.result.bits_per_weight, "with scales"),
        ]
        if self.recorded_bytes is not None:
            rows.append(("disk: outputs of the teacher", self.recorded_bytes / _GIB, "GiB until training ends"))
        notes = (_TIME_NOTE, *self._limit_notes(), *self.warnings)
        return Table("Plan", ("quantity", "value", "unit"), tuple(rows), notes)

    def _limit_notes(self) -> tuple[str, ...]:
        if self.recorded_bytes is None or self.recorded_bytes <= self.recorded_limit_bytes:
            return ()
        limit, needed = self.recorded_limit_bytes / _GIB, self.recorded_bytes / _GIB
        return (f"refused: outputs of the teacher take {needed:.1f} GiB; train.teacher.outputs_limit_gib is {limit:g}",)

    def _shown_parts(self) -> list[tuple[str, int]]:
        """Parts that are not empty, and those that every plan has."""
        always = (Category.WEIGHTS, Category.TEACHER, Category.OPTIMIZER, Category.GRADIENTS, Category.CODES)
        return [(name, num_bytes) for name, num_bytes in self.memory.parts.items() if num_bytes or name in always]


def plan_training(
    workload: Workload,
    train: TrainSpec,
    total_steps: int,
    device: Device,
    options: PlanOptions | None = None,
    *,
    float_dtype: torch.dtype = torch.float32,
    num_held_out: int = 0,
    always_advise: bool = False,
) -> Plan:
    """Plans a run from one step traced on fake tensors. Nothing is downloaded, and no memory of the model's size is needed.

    Args:
        workload: The quantized student on the meta device, and how it is called.
        train: Batch size (of all devices together), accumulation, precision, and what is traded for memory.
        total_steps: Optimizer steps of the schedule.
        device: See `find_device` and `measure_device`.
        options: Devices and sharding; None is one device.
        float_dtype: Precision of what stays unquantized in the exported file.
        num_held_out: Samples of the validation, which count where the teacher's outputs are recorded.
        always_advise: Say what would save memory where it fits, too.

    Raises:
        ConfigError: The batch cannot be divided among accumulation and devices, or nothing is quantized or trained.
    """
    options = options or PlanOptions()
    num_parts = train.accumulation * options.num_devices
    _check_batch(train, num_parts, workload)
    _check_student(workload)
    micro_batch = train.batch_size // num_parts
    trace = _trace(workload, train, micro_batch, device, options)
    memory = device_memory(trace, device, options)
    plan = Plan(
        device=device,
        options=options,
        num_parameters=sum(parameter.numel() for parameter in workload.student.parameters()),
        num_quantized_weights=sum(layer.weight.numel() for _, layer in quantized_layers(workload.student)),
        num_trained=trace.num_trained,
        batch_size=train.batch_size,
        micro_batch=micro_batch,
        memory=memory,
        phase_times_s=_step_times_s(trace, device, train, options),
        communication_s=0.0,
        total_steps=total_steps,
        result=packed_size(workload.student, float_dtype),
        is_of_pairs=workload.make_pairs is not None,
    )
    plan = dataclasses.replace(plan, communication_s=_communication_s(trace, plan, train))
    if trace.recording is not None:
        plan = _with_recording(plan, trace.recording, train, num_held_out)
    if plan.fits and not always_advise:
        return plan
    return dataclasses.replace(plan, advice=_advice(trace, workload, plan, train))


def _with_recording(plan: Plan, recording: RecordingTrace, train: TrainSpec, num_held_out: int) -> Plan:
    """A plan with time and size of what is recorded before training. The devices share the parts."""
    part_s = sum(phase_times_s(recording.work, plan.device).values())
    held_out_batch = max(1, train.batch_size // plan.options.num_devices)
    num_parts = plan.total_steps * train.accumulation
    num_bytes = num_parts * plan.options.num_devices * recording.part_bytes
    num_bytes += round(num_held_out * recording.held_out_bytes / held_out_batch)
    return dataclasses.replace(
        plan,
        recording_s=num_parts * part_s,
        recorded_bytes=num_bytes,
        recorded_limit_bytes=train.teacher.outputs_limit_gib * _GIB,
    )


def _advice(trace: StepTrace, workload: Workload, plan: Plan, train: TrainSpec) -> tuple[str, ...]:
    """What each setting of the recipe would change: optimizer and teacher without a new trace, the others with one."""
    device, options = plan.device, plan.options
    alternatives: list[Alternative] = []
    lean = train

    def consider(name: str, **changes: Any) -> None:
        nonlocal lean
        changed = dataclasses.replace(train, **changes)
        lean = dataclasses.replace(lean, **changes)
        alternatives.append(Alternative(name, with_constants_of(trace, workload, changed, device.kind)))

    for dtype in _TEACHER_DTYPES:
        consider(f"train.teacher.dtype: {dtype}", teacher=dataclasses.replace(train.teacher, dtype=dtype))
    if train.optimizer != "adamw_8bit":
        consider("train.optimizer: adamw_8bit", optimizer="adamw_8bit")
    if train.optimizer_device == "same" and device.kind is DeviceKind.GPU:
        consider("train.optimizer_device: host", optimizer_device="host")
    if train.teacher.outputs == "computed" and train.on_out_of_memory == "stop" and not train.draws_by_error:
        lean = dataclasses.replace(lean, teacher=dataclasses.replace(lean.teacher, outputs="recorded"))
        changed = dataclasses.replace(train, teacher=dataclasses.replace(train.teacher, outputs="recorded"))
        alternatives.append(
            Alternative(_recorded_name(workload, train), _trace(workload, changed, plan.micro_batch, device, options))
        )
    if train.activation_checkpointing == "none" and repeated_blocks(workload.student):
        lean = dataclasses.replace(lean, activation_checkpointing="blocks")
        changed = dataclasses.replace(train, activation_checkpointing="blocks")
        name = "train.activation_checkpointing: blocks"
        alternatives.append(Alternative(name, _trace(workload, changed, plan.micro_batch, device, options)))
    smallest = 2 if plan.is_of_pairs else 1
    if plan.micro_batch > smallest:
        single = _trace(workload, train, smallest, device, options)
        name = "one sample, which is two rows" if plan.is_of_pairs else "one sample"
        alternatives.append(Alternative(f"a micro-batch of {name} (raise train.accumulation)", single))
    together = _trace(workload, lean, smallest, device, options)
    return memory_advice(trace, alternatives, together, device, options)


def _recorded_name(workload: Workload, train: TrainSpec) -> str:
    """The setting, and what else it changes."""
    name = "train.teacher.outputs: recorded"
    if train.timestep_importance == "auto" and workload.draws_noise_levels:
        return f"{name} (not with an automatic schedule; noise levels no longer follow the student's error)"
    return f"{name} (not with an automatic schedule)"


def _check_batch(train: TrainSpec, num_parts: int, workload: Workload) -> None:
    divisor, what = num_parts, "accumulation x devices"
    fix = "change batch_size, accumulation or the number of devices"
    if workload.make_pairs is not None:
        divisor, what = 2 * num_parts, f"2 x {what}"
        fix = f"{fix}, or set train.guidance_scale: null, which computes no pairs"
    if train.batch_size % divisor:
        allowed = f"a multiple of {what} = {divisor}"
        raise config_error("train.batch_size", train.batch_size, allowed=allowed, fix=fix)


def _check_student(workload: Workload) -> None:
    if not any(True for _ in quantized_layers(workload.student)):
        raise config_error("student", "not quantized", allowed="a quantized model", fix="call quantize_ first")
    if not any(parameter.requires_grad for parameter in workload.student.parameters()):
        raise config_error("quantization", "all frozen", allowed="something to train", fix="free a family")


def _trace(workload: Workload, train: TrainSpec, micro_batch: int, device: Device, options: PlanOptions) -> StepTrace:
    return trace_step(
        workload,
        train,
        micro_batch,
        device.kind,
        validation_batch=train.batch_size // options.num_devices,
    )


def _step_times_s(trace: StepTrace, device: Device, train: TrainSpec, options: PlanOptions) -> Mapping[Phase, float]:
    """Times of all parts: from the second on, gradients are added (two reads, one write). FSDP shares the update."""
    times = dict(phase_times_s(trace.work, device))
    times.pop(Phase.VALIDATION, None)
    for phase in _PART_PHASES:
        if phase in times:
            times[phase] *= train.accumulation
    adding_s = 3 * _GRADIENT_BYTES * trace.num_trained / device.bytes_per_s
    times[Phase.BACKWARD] += (train.accumulation - 1) * adding_s
    if options.sharding is Sharding.FSDP:
        times[Phase.UPDATE] /= options.num_devices
    return times


def _communication_s(trace: StepTrace, plan: Plan, train: TrainSpec) -> float:
    """What communication takes beyond the computation that it runs beside.

    Rings, n devices: DDP sends 2 (n - 1) / n of the gradients, beside the last backward pass. FSDP sends (n - 1) / n of the
    weights twice and of teacher and gradients once in every part, beside all of it.
    """
    n = plan.options.num_devices
    share = (n - 1) / n / plan.device.link_bytes_per_s
    gradients = _GRADIENT_BYTES * trace.num_trained
    if plan.options.sharding is Sharding.DDP:
        beside_s = plan.phase_times_s[Phase.BACKWARD] / train.accumulation
        return max(0.0, 2 * gradients * share - beside_s)
    if plan.options.sharding is Sharding.FSDP:
        sent = 2 * trace.constant[Category.WEIGHTS] + trace.constant[Category.TEACHER] + gradients
        beside_s = sum(plan.phase_times_s.get(phase, 0.0) for phase in _PART_PHASES)
        return max(0.0, train.accumulation * sent * share - beside_s)
    return 0.0
