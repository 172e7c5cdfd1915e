"""Laws of the memory of one device under the options of a plan."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy_workload import ToyNetwork, make_workload, num_parameters

from fraqat.distill import TeacherSpec, TrainSpec
from fraqat.errors import ConfigError
from fraqat.planning import (
    DEVICES,
    Category,
    Device,
    DeviceKind,
    Phase,
    PlanOptions,
    Sharding,
    StepTrace,
    device_memory,
    trace_step,
)

BARE = Device("bare", DeviceKind.GPU, 2**30, {"float32": 1e12, "bfloat16": 1e13}, 1e12, 1e-6, 1e11)
SPLIT = ("weights", "teacher", "optimizer", "average")


@pytest.fixture(scope="module")
def trace() -> StepTrace:
    return trace_step(make_workload(), TrainSpec(batch_size=8, ema_decay=0.9), 8, DeviceKind.GPU)


def test_ddp_divides_nothing_and_fsdp_the_states(trace: StepTrace) -> None:
    alone = device_memory(trace, BARE, PlanOptions())
    ddp = device_memory(trace, BARE, PlanOptions(4, Sharding.DDP))
    fsdp = device_memory(trace, BARE, PlanOptions(4, Sharding.FSDP))
    assert ddp == alone
    for part in SPLIT:
        assert fsdp.parts[part] == -(-alone.parts[part] // 4)
    assert fsdp.parts["whole blocks"] >= 2 * trace.largest_block_bytes
    assert fsdp.num_bytes < alone.num_bytes


def test_more_devices_never_need_more(trace: StepTrace) -> None:
    totals = [device_memory(trace, BARE, PlanOptions(n, Sharding.FSDP)).num_bytes for n in (2, 4, 8, 16)]
    assert totals == sorted(totals, reverse=True)


def test_a_teacher_with_recorded_outputs_is_not_there_in_training(trace: StepTrace) -> None:
    train = TrainSpec(batch_size=8, ema_decay=0.9, teacher=TeacherSpec(outputs="recorded"))
    recorded = trace_step(make_workload(), train, 8, DeviceKind.GPU)
    assert device_memory(recorded, BARE, PlanOptions()).parts["teacher"] == 0
    assert device_memory(trace, BARE, PlanOptions()).parts["teacher"] == trace.constant[Category.TEACHER] > 0


def test_recording_is_the_fullest_moment_where_the_teacher_is_large(trace: StepTrace) -> None:
    with torch.device("meta"):
        teacher = ToyNetwork(hidden=4096)
    train = TrainSpec(batch_size=8, teacher=TeacherSpec(outputs="recorded"))
    recorded = trace_step(make_workload(teacher=teacher), train, 8, DeviceKind.GPU)
    use = device_memory(recorded, BARE, PlanOptions())
    assert use.phase is Phase.RECORDING
    assert use.parts["teacher"] == 4 * num_parameters(teacher)
    assert use.parts["optimizer"] == 0
    assert use.parts["weights"] == trace.constant[Category.WEIGHTS]
    assert recorded.constant[Category.TEACHER] == 0
    shared = device_memory(recorded, BARE, PlanOptions(4, Sharding.FSDP))
    assert shared.parts["teacher"] == num_parameters(teacher)


def test_the_fullest_moment_is_at_least_every_other_one(trace: StepTrace) -> None:
    use = device_memory(trace, BARE, PlanOptions())
    stays = sum(trace.constant.values())
    assert use.num_bytes == stays + max(m.gradients + m.codes + m.activations + m.temporary for m in trace.moments)


def test_the_reserve_of_a_device_is_added(trace: StepTrace) -> None:
    bare = device_memory(trace, BARE, PlanOptions()).num_bytes
    reserving = dataclasses.replace(BARE, reserved_bytes=1000, gap_share=0.05)
    assert device_memory(trace, reserving, PlanOptions()).num_bytes == bare + 1000 + round(0.05 * bare)
    assert all(device.reserved_bytes > 0 for device in DEVICES.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_devices": 0}, "plan.num_devices = 0 .* 1 or more"),
        ({"num_devices": 2}, "plan.sharding = 'none' .* ddp or fsdp for 2 devices"),
        ({"sharding": "fsdp"}, "plan.sharding = 'fsdp' .* none for 1 device"),
        ({"num_devices": 2, "sharding": "zero"}, "plan.sharding = 'zero' .* none, ddp, fsdp"),
    ],
)
def test_impossible_options_are_refused(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanOptions(**values)
