"""What would make a run fit: each option of a plan by itself, all together, and more devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fraqat.planning.devices import Device
from fraqat.planning.memory import PlanOptions, Sharding, device_memory
from fraqat.planning.step import StepTrace

_GIB = 2**30
_MAX_DEVICES = 64


@dataclass(frozen=True)
class Alternative:
    """A setting that needs less memory: its name for a reader, and the traced step with it."""

    name: str
    trace: StepTrace


def memory_advice(
    trace: StepTrace,
    alternatives: Sequence[Alternative],
    together: StepTrace,
    device: Device,
    options: PlanOptions,
) -> tuple[str, ...]:
    """Lines for a run that does not fit, the largest saving first.

    Args:
        trace: A step of the run.
        alternatives: The same with one thing changed.
        together: The same with everything changed.
        device, options: Of the run.
    """
    now = device_memory(trace, device, options).num_bytes
    found = [(device_memory(other.trace, device, options).num_bytes, other.name) for other in alternatives]
    lines = [f"{name} saves {_gib(now - need)}: {_gib(need)} needed" for need, name in sorted(found) if need < now]
    need = device_memory(together, device, options).num_bytes
    return (*lines, f"all settings of train together: {_gib(need)} needed", _sharding_line(trace, device, options))


def _sharding_line(trace: StepTrace, device: Device, options: PlanOptions) -> str:
    num_devices = max(2, options.num_devices)
    while num_devices <= _MAX_DEVICES:
        sharded = dataclasses.replace(options, sharding=Sharding.FSDP, num_devices=num_devices)
        needed = device_memory(trace, device, sharded).num_bytes
        if needed <= device.memory_bytes:
            return f"fsdp over {num_devices} devices at the same micro-batch: {_gib(needed)} needed on each"
        num_devices *= 2
    return f"fsdp alone does not make it fit on up to {_MAX_DEVICES} devices"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
