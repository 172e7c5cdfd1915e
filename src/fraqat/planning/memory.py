"""Memory of one device: what a traced step needs, under the options of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

from fraqat.errors import config_error, parse_choice
from fraqat.nn import STRICT_KEYS
from fraqat.planning.devices import Device
from fraqat.planning.recorder import STEP_CATEGORIES, Category, Moment, Phase
from fraqat.planning.step import StepTrace

_MOMENTS_BITS = 8
_MOMENTS_BLOCK = 256
"""Values of an 8-bit optimizer state that share a float32 scale, as bitsandbytes and torchao have it."""

_GATHERED_BLOCKS = 2
"""Blocks that FSDP holds whole at a time: the one at work and the next, fetched ahead."""

RESERVED = "reserved"
SHARDING = "whole blocks"


class Sharding(StrEnum):
    """How several devices share a step.

    `none`: one device. `ddp`: each holds everything and a part of the batch; gradients lie in the buckets they are sent
    from. `fsdp`: weights, teacher, gradients, optimizer state and average are split; blocks are made whole while they run.
    """

    NONE = "none"
    DDP = "ddp"
    FSDP = "fsdp"


@dataclass(frozen=True)
class PlanOptions:
    """On what a step runs, and what is traded for memory.

    Args:
        num_devices: Devices that share a batch.
        sharding: How.
        cached_teacher: The teacher's outputs are read from disk; the teacher is not loaded.
        activation_checkpointing: Repeated blocks keep their inputs alone and run again in the backward pass.
        optimizer_bits: 32, or 8 for block-wise quantized AdamW states.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    num_devices: int = 1
    sharding: Sharding = Sharding.NONE
    cached_teacher: bool = False
    activation_checkpointing: bool = False
    optimizer_bits: Literal[8, 32] = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "sharding", parse_choice("plan.sharding", self.sharding, Sharding))
        if self.num_devices < 1:
            raise config_error("plan.num_devices", self.num_devices, allowed="1 or more", fix="use 1")
        if (self.num_devices > 1) is (self.sharding is Sharding.NONE):
            allowed = "none" if self.num_devices == 1 else "ddp or fsdp"
            raise config_error(
                "plan.sharding",
                self.sharding.value,
                allowed=f"{allowed} for {self.num_devices} device{'s' if self.num_devices > 1 else ''}",
                fix="correct plan.sharding or plan.num_devices",
            )
        if self.optimizer_bits not in (8, 32):
            raise config_error("plan.optimizer_bits", self.optimizer_bits, allowed="8 or 32", fix="use 32")


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one device at the fullest moment of a step.

    Args:
        phase: When that is.
        parts: Bytes by use; `reserved` is the device's own need and its allocator's gaps.
    """

    phase: Phase
    parts: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def device_memory(
    trace: StepTrace,
    device: Device,
    options: PlanOptions,
    *,
    teacher_share: float = 1.0,
    held_share: float = 1.0,
) -> MemoryUse:
    """Memory of one device at the fullest moment.

    Args:
        trace: A step on one device, nothing sharded.
        device: Gives the reserve.
        options: Sharding, optimizer width, cached teacher.
        teacher_share: Scales the teacher's weights: 0.5 for half the precision.
        held_share: Scales what the forward pass keeps, for an estimate of activation checkpointing without its trace.
    """
    constant = _constant_parts(trace, options, teacher_share)
    fullest = max(
        (_moment_parts(moment, trace, options, held_share) for moment in trace.moments),
        key=lambda parts: sum(parts[1].values()),
    )
    phase, changing = fullest
    parts = {**constant, **changing}
    reserved = device.reserved_bytes + round(device.gap_share * sum(parts.values()))
    return MemoryUse(phase, {**parts, RESERVED: reserved})


def optimizer_bytes(trace: StepTrace, bits: int) -> int:
    """AdamW's state: as traced at 32 bits; at 8, two codes per parameter and a float32 scale per 256 of them."""
    if bits != _MOMENTS_BITS:
        return trace.constant[Category.OPTIMIZER]
    return 2 * (trace.num_trained + 4 * -(-trace.num_trained // _MOMENTS_BLOCK))


def _constant_parts(trace: StepTrace, options: PlanOptions, teacher_share: float) -> dict[str, int]:
    num_shards = options.num_devices if options.sharding is Sharding.FSDP else 1
    teacher = 0 if options.cached_teacher else round(teacher_share * trace.constant[Category.TEACHER])
    sharded = {
        Category.WEIGHTS: trace.constant[Category.WEIGHTS],
        Category.TEACHER: teacher,
        Category.OPTIMIZER: optimizer_bytes(trace, options.optimizer_bits),
        Category.AVERAGE: trace.constant[Category.AVERAGE],
    }
    parts = {category.value: -(-num_bytes // num_shards) for category, num_bytes in sharded.items()}
    return parts | {Category.INPUTS.value: trace.constant[Category.INPUTS]}


def _moment_parts(
    moment: Moment, trace: StepTrace, options: PlanOptions, held_share: float
) -> tuple[Phase, dict[str, int]]:
    parts: dict[str, int] = {category.value: getattr(moment, category.value) for category in STEP_CATEGORIES}
    for category in (Category.CODES, Category.ACTIVATIONS):
        parts[category.value] = round(held_share * parts[category.value])
    parts[SHARDING] = 0
    if options.sharding is Sharding.FSDP:
        gradients = Category.GRADIENTS.value
        parts[gradients] = -(-parts[gradients] // options.num_devices)
        parts[SHARDING] = _whole_block_bytes(moment.phase, trace)
    return moment.phase, parts


def _whole_block_bytes(phase: Phase, trace: StepTrace) -> int:
    """Blocks that FSDP holds whole: weights of two, and in the backward pass the gradient of one."""
    if phase is Phase.UPDATE:
        return 0
    block = trace.largest_block_bytes
    if phase is Phase.TEACHER:
        block = round(block * trace.constant[Category.TEACHER] / max(1, trace.constant[Category.WEIGHTS]))
    return block * (_GATHERED_BLOCKS + (1 if phase is Phase.BACKWARD else 0))
