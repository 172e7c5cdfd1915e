"""Devices are found and measured, and the roofline is what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fraqat.errors import ConfigError
from fraqat.planning import DEVICES, DeviceKind, Phase, find_device, measure_device, phase_times_s
from fraqat.planning.recorder import Work

H100 = DEVICES["H100"]


@pytest.mark.parametrize(
    ("name", "known"), [("h100", "H100"), ("rtx4090", "RTX 4090"), ("RTX-3090", "RTX 3090"), ("a100 80", "A100-80")]
)
def test_devices_are_found_whatever_the_spelling(name: str, known: str) -> None:
    assert find_device(name) is DEVICES[known]


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"device = 'H1000' .* H200, H100, .* this-cpu"):
        find_device("H1000")


def test_every_device_has_a_source_and_plausible_figures() -> None:
    for device in DEVICES.values():
        assert device.source
        assert 20 * 2**30 < device.memory_bytes < 300 * 2**30
        assert device.flops_per_s["bfloat16"] > device.flops_per_s["float32"] > 1e12
        assert 1e11 < device.link_bytes_per_s + device.bytes_per_s < 1e13


def test_this_machine_is_measured() -> None:
    device = find_device("this-cpu")
    assert device.kind is DeviceKind.CPU
    assert device.reserved_bytes == 0
    assert device.flops_per_s["float32"] > 1e8
    assert device.bytes_per_s > 1e7
    assert 0 < device.operation_s < 1e-3
    assert device.memory_bytes > 2**28


def test_rates_are_work_over_the_time_of_the_clock_given() -> None:
    ticks = iter(range(10**9))
    device = measure_device(lambda: float(next(ticks)))
    assert device.flops_per_s["float32"] == 2 * 8 * 512 * 1024 * 1024  # every measurement takes one tick
    assert device.bytes_per_s == 22 * 4_000_000 / 3


def test_an_operation_takes_the_longest_of_arithmetic_memory_and_start() -> None:
    device = dataclasses.replace(
        H100, flops_per_s={"float32": 100.0, "bfloat16": 1000.0}, bytes_per_s=10.0, operation_s=0.5
    )
    work = (
        Work(Phase.FORWARD, "mm", torch.float32, 400, 10, 2),
        Work(Phase.FORWARD, "mm", torch.bfloat16, 400, 10, 1),
        Work(Phase.FORWARD, "view", torch.float32, 0, 1, 1),
        Work(Phase.UPDATE, "add", torch.float32, 0, 30, 1),
        Work(Phase.UPDATE, "mm", torch.float64, 100, 1, 1),
    )
    times = phase_times_s(work, device)
    assert times[Phase.FORWARD] == pytest.approx(2 * 4.0 + 1.0 + 0.5)
    assert times[Phase.UPDATE] == pytest.approx(3.0 + 2.0)
