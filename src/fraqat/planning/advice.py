"""What would make a run fit: each option of a plan by itself, all together, and more devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fraqat.planning.devices import Device
from fraqat.planning.memory import MemoryUse, PlanOptions, Sharding, device_memory
from fraqat.planning.recorder import Category, Phase
from fraqat.planning.step import StepTrace

_GIB = 2**30
_MAX_DEVICES = 64


def memory_advice(
    trace: StepTrace, single: StepTrace, device: Device, options: PlanOptions, *, has_float32_teacher: bool
) -> tuple[str, ...]:
    """Lines for a run that does not fit, the largest saving first.

    Args:
        trace: A step of the run.
        single: A step with micro-batches of one sample; `trace` itself if it is that.
        device, options: Of the run.
        has_float32_teacher: Whether the teacher could be loaded in half its precision.
    """
    now = device_memory(trace, device, options).num_bytes
    found = dict(_alternatives(trace, single, device, options, has_float32_teacher))
    by_need = sorted((use.num_bytes, name) for name, use in found.items() if use.num_bytes < now)
    lines = [f"{name} saves {_gib(now - needed)}: {_gib(needed)} needed" for needed, name in by_need]
    best = dataclasses.replace(options, cached_teacher=True, optimizer_bits=8)
    together = device_memory(single, device, best, held_share=_held_share(single, options))
    return (*lines, f"all of these together: {_gib(together.num_bytes)} needed", _sharding_line(trace, device, options))


def _alternatives(
    trace: StepTrace, single: StepTrace, device: Device, options: PlanOptions, has_float32_teacher: bool
) -> Iterator[tuple[str, MemoryUse]]:
    """What the run would need with one thing changed."""
    if trace.constant[Category.TEACHER]:
        if has_float32_teacher:
            halved = device_memory(trace, device, options, teacher_share=0.5)
            yield "a bfloat16 teacher (model.teacher_dtype: bfloat16)", halved
        cached = dataclasses.replace(options, cached_teacher=True)
        yield "reading the teacher's outputs from a cache", device_memory(trace, device, cached)
    yield "an 8-bit optimizer", device_memory(trace, device, dataclasses.replace(options, optimizer_bits=8))
    share = _held_share(trace, options)
    yield "activation checkpointing", device_memory(trace, device, options, held_share=share)
    yield "a micro-batch of one sample (raise train.accumulation)", device_memory(single, device, options)


def _held_share(trace: StepTrace, options: PlanOptions) -> float:
    """Share of what the forward pass keeps that activation checkpointing would leave."""
    if options.activation_checkpointing:
        return 1.0
    held = max(moment.codes + moment.activations for moment in trace.moments if moment.phase is Phase.FORWARD)
    return max(0.0, 1 - trace.checkpoint_saving_bytes / held)


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
