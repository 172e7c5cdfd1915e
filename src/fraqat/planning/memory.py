"""Memory of one device: what a traced step needs, under the options of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from fraqat.errors import config_error, parse_choice
from fraqat.nn import STRICT_KEYS
from fraqat.planning.devices import Device
from fraqat.planning.recorder import STEP_CATEGORIES, Category, Moment, Phase
from fraqat.planning.step import StepTrace

_GATHERED_BLOCKS = 2
"""Blocks that FSDP holds whole at a time: the one at work and the next, fetched ahead."""

_SHARDED = (Category.WEIGHTS, Category.TEACHER, Category.OPTIMIZER, Category.AVERAGE)

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
    """On what a step runs.

    Args:
        num_devices: Devices that share a batch.
        sharding: How.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    num_devices: int = 1
    sharding: Sharding = Sharding.NONE

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


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one device at the fullest moment of a run.

    Args:
        phase: When that is.
        parts: Bytes by use; `reserved` is the device's own need and its allocator's gaps.
        host_bytes: What the optimizer keeps on the host, for one device.
    """

    phase: Phase
    parts: Mapping[str, int]
    host_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def device_memory(trace: StepTrace, device: Device, options: PlanOptions) -> MemoryUse:
    """Memory of one device at the fullest moment.

    Args:
        trace: A step on one device, nothing sharded.
        device: Gives the reserve.
        options: Sharding.
    """
    phase, parts = _fullest(trace.constant, trace.moments, trace, options)
    if trace.recording is not None:
        before = _fullest(trace.recording.constant, trace.recording.moments, trace, options)
        if sum(before[1].values()) > sum(parts.values()):
            phase, parts = before
    reserved = device.reserved_bytes + round(device.gap_share * sum(parts.values()))
    host_bytes = -(-trace.host_bytes // _num_shards(options))
    return MemoryUse(phase, {**parts, RESERVED: reserved}, host_bytes)


def _fullest(
    constant: Mapping[Category, int], moments: Sequence[Moment], trace: StepTrace, options: PlanOptions
) -> tuple[Phase, dict[str, int]]:
    phase, changing = max(
        (_moment_parts(moment, trace, options) for moment in moments), key=lambda parts: sum(parts[1].values())
    )
    return phase, {**_constant_parts(constant, options), **changing}


def _num_shards(options: PlanOptions) -> int:
    return options.num_devices if options.sharding is Sharding.FSDP else 1


def _constant_parts(constant: Mapping[Category, int], options: PlanOptions) -> dict[str, int]:
    num_shards = _num_shards(options)
    parts = {category.value: -(-constant[category] // num_shards) for category in _SHARDED}
    return parts | {Category.INPUTS.value: constant[Category.INPUTS]}


def _moment_parts(moment: Moment, trace: StepTrace, options: PlanOptions) -> tuple[Phase, dict[str, int]]:
    parts: dict[str, int] = {category.value: getattr(moment, category.value) for category in STEP_CATEGORIES}
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
    if phase in (Phase.TEACHER, Phase.RECORDING):
        constant = trace.constant if trace.recording is None else trace.recording.constant
        block = round(block * constant[Category.TEACHER] / max(1, constant[Category.WEIGHTS]))
    return block * (_GATHERED_BLOCKS + (1 if phase is Phase.BACKWARD else 0))
