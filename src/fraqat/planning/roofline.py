"""Time of a step by the roofline: an operation takes what its arithmetic, its memory traffic or its start takes longest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fraqat.planning.devices import Device
from fraqat.planning.recorder import Phase, Work

_FLOAT64_SHARE = 0.5
"""Of the float32 rate: processors and large accelerators; small ones are far below it."""


def phase_times_s(work: Iterable[Work], device: Device) -> Mapping[Phase, float]:
    """Seconds of each phase: sum over its operations of max(flops / rate, bytes / bandwidth, start)."""
    times: dict[Phase, float] = {}
    for item in work:
        compute_s = item.num_flops / _rate(device, item.dtype)
        memory_s = item.num_bytes / device.bytes_per_s
        times[item.phase] = times.get(item.phase, 0.0) + item.count * max(compute_s, memory_s, device.operation_s)
    return times


def _rate(device: Device, dtype: torch.dtype) -> float:
    if dtype in (torch.bfloat16, torch.float16):
        return device.flops_per_s["bfloat16"]
    return device.flops_per_s["float32"] * (_FLOAT64_SHARE if dtype == torch.float64 else 1.0)
