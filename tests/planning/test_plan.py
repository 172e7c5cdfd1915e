"""Laws of a whole plan, and of its advice."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from torch import nn
from toy_workload import LENGTH, WIDTH, make_student, make_workload, num_parameters, predict

from fraqat.distill import TeacherSpec, TrainSpec
from fraqat.errors import ConfigError
from fraqat.planning import DEVICES, Device, Phase, Plan, PlanOptions, Sharding, Workload, plan_training

pytestmark = pytest.mark.xdist_group("plan")  # one worker traces the wide model

H100 = DEVICES["H100"]
TRAIN = TrainSpec(batch_size=32)


def tight(num_bytes: int) -> Device:
    return dataclasses.replace(H100, memory_bytes=num_bytes, reserved_bytes=0, gap_share=0.0)


def plan(device: Device = H100, train: TrainSpec = TRAIN, options: PlanOptions | None = None) -> Plan:
    return plan_training(make_workload(make_student()), train, 100, device, options)


def test_a_plan_that_fits_has_no_warning() -> None:
    made = plan()
    assert made.fits
    assert made.warnings == ()
    assert made.num_parameters == num_parameters(make_student())
    assert made.hours == pytest.approx(100 * made.step_s / 3600)


def test_the_table_holds_numbers_for_machines() -> None:
    table = plan().to_table()
    rows = {row["quantity"]: row["value"] for row in json.loads(json.dumps(table.to_json()))["rows"]}
    assert rows["batch size"] == 32
    assert rows["memory in all"] == pytest.approx(sum(v for k, v in rows.items() if k.startswith("memory: ")))
    assert rows["time of a step"] == pytest.approx(sum(v for k, v in rows.items() if k.startswith("time: ")))
    assert rows["fits"] is True
    assert "memory: codes" in str(table)


@pytest.fixture(scope="module")
def wide() -> Workload:
    """Large enough for advice to be told apart in GiB."""
    student = make_student(num_blocks=3, width=512, hidden=2048)
    inputs = make_workload(student)
    return dataclasses.replace(inputs, make_inputs=lambda n: {"x": torch.empty(n, 4096, 512, device="meta")})


@pytest.fixture(scope="module")
def wide_plan(wide: Workload) -> Plan:
    return plan_training(wide, TRAIN, 100, tight(1000))


@pytest.mark.parametrize(
    ("name", "options", "changes"),
    [
        ("train.teacher.outputs: recorded", PlanOptions(), {"teacher": TeacherSpec(outputs="recorded")}),
        ("train.teacher.dtype: bfloat16", PlanOptions(), {"teacher": TeacherSpec("bfloat16")}),
        ("train.teacher.dtype: int8", PlanOptions(), {"teacher": TeacherSpec("int8")}),
        ("train.optimizer: adamw_8bit", PlanOptions(), {"optimizer": "adamw_8bit"}),
        ("train.optimizer_device: host", PlanOptions(), {"optimizer_device": "host"}),
        ("train.activation_checkpointing: blocks", PlanOptions(), {"activation_checkpointing": "blocks"}),
        ("a micro-batch of one sample", PlanOptions(), {"accumulation": 32}),
    ],
)
def test_advice_keeps_its_word(
    wide: Workload, wide_plan: Plan, name: str, options: PlanOptions, changes: dict[str, Any]
) -> None:
    line = next(line for line in wide_plan.advice if line.startswith(name))
    promised = float(re.findall(r"([\d.]+) GiB needed", line)[0])
    train = dataclasses.replace(TRAIN, **changes)
    reached = plan_training(wide, train, 100, tight(2**60), options).memory.num_bytes / 2**30
    assert reached == pytest.approx(promised, abs=0.06, rel=0.05)


def test_all_settings_together_need_least(wide_plan: Plan) -> None:
    needed = [float(number) for line in wide_plan.advice[:-1] for number in re.findall(r"([\d.]+) GiB needed", line)]
    together = next(line for line in wide_plan.advice if line.startswith("all settings of train together"))
    assert float(re.findall(r"([\d.]+) GiB", together)[0]) == min(needed)


def test_an_optimizer_on_the_host_is_a_row_of_its_own(wide: Workload) -> None:
    train = dataclasses.replace(TRAIN, optimizer_device="host")
    made = plan_training(wide, train, 100, H100)
    assert made.memory.parts["optimizer"] == 0
    num_tensors = len(list(wide.student.parameters()))
    assert made.memory.host_bytes == (8 + 4 + 4) * made.num_trained + 4 * num_tensors
    assert "memory of the host: optimizer" in str(made.to_table())
    assert "host" not in str(plan().to_table())


def test_what_does_not_fit_says_by_how_much_and_how_many_devices_would_do() -> None:
    needed = plan(tight(2**40)).memory.num_bytes
    made = plan(tight(needed - 1))
    assert not made.fits
    assert made.warnings[0].startswith("does not fit: 0.0 GiB more than one H100 has")
    assert made.advice[-1].startswith("fsdp over 2 devices at the same micro-batch: 0.0 GiB needed on each")
    assert plan(tight(1000)).advice[-1] == "fsdp alone does not make it fit on up to 64 devices"


def test_parts_cost_time_and_not_memory() -> None:
    whole, parts = plan(), plan(train=TrainSpec(batch_size=64, accumulation=2))
    assert parts.micro_batch == whole.micro_batch == 32
    assert parts.step_s == pytest.approx(2 * whole.step_s, rel=0.2)


def test_devices_share_the_batch_and_wait_for_each_other() -> None:
    slow_link = dataclasses.replace(H100, link_bytes_per_s=1.0)
    ddp = plan(slow_link, options=PlanOptions(4, Sharding.DDP))
    assert ddp.micro_batch == 8
    gradients = 4 * ddp.num_trained
    backward_s = next(seconds for phase, seconds in ddp.phase_times_s.items() if phase.value == "backward")
    assert ddp.communication_s == pytest.approx(2 * gradients * 3 / 4 - backward_s, rel=1e-6)
    assert plan(options=PlanOptions(4, Sharding.DDP)).communication_s == 0
    assert plan(slow_link, options=PlanOptions(4, Sharding.FSDP)).communication_s > ddp.communication_s


@pytest.mark.parametrize("train", [TrainSpec(batch_size=6, accumulation=3), TrainSpec(batch_size=2)])
def test_a_batch_that_cannot_be_divided_is_refused(train: TrainSpec) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size = \d .* a multiple of accumulation x devices = \d+"):
        plan(train=train, options=PlanOptions(4, Sharding.DDP))


def test_models_that_cannot_be_trained_are_refused() -> None:
    with torch.device("meta"):
        floating = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="call quantize_ first"):
        plan_training(make_workload(floating), TRAIN, 1, H100)
    with pytest.raises(ConfigError, match="something to train"):
        plan_training(make_workload(make_student().requires_grad_(False)), TRAIN, 1, H100)


def test_a_teacher_of_another_kind_is_taken_as_it_is() -> None:
    with torch.device("meta"):
        teacher = nn.Linear(32, 32, dtype=torch.bfloat16)
    student = make_student()
    made = plan_training(
        Workload(student, make_workload().predict, make_workload().make_inputs, teacher=teacher), TRAIN, 1, H100
    )
    assert made.memory.parts["teacher"] == 2 * num_parameters(teacher)


def test_a_plan_counts_what_is_recorded_before_training() -> None:
    train = dataclasses.replace(TRAIN, accumulation=2, teacher=TeacherSpec(outputs="recorded"))
    computed = plan(train=dataclasses.replace(TRAIN, accumulation=2))
    made = plan_training(make_workload(), train, 100, H100, num_held_out=10)
    bfloat16, float32 = 2, 4
    assert made.recorded_bytes == LENGTH * WIDTH * (100 * 32 * bfloat16 + 10 * float32)
    assert made.memory.parts["teacher"] == 0 < computed.memory.parts["teacher"]
    assert Phase.TEACHER not in made.phase_times_s
    assert made.recording_s == pytest.approx(100 * computed.phase_times_s[Phase.TEACHER])
    assert made.hours == pytest.approx(computed.hours, rel=0.01)
    rows = {row["quantity"]: row["value"] for row in made.to_table().to_json()["rows"]}
    assert rows["disk: outputs of the teacher"] == pytest.approx(made.recorded_bytes / 2**30)
    assert rows["recording before the first step"] == made.recording_s
    assert "disk" not in str(computed.to_table()) and "recording" not in str(computed.to_table())
    assert "refused" not in str(made.to_table())
    limited = dataclasses.replace(train, teacher=TeacherSpec(outputs="recorded", outputs_limit_gib=1e-6))
    assert "refused: outputs of the teacher take 0.0 GiB; train.teacher.outputs_limit_gib is 1e-06" in str(
        plan(train=limited).to_table()
    )


def test_devices_share_what_is_recorded() -> None:
    train = dataclasses.replace(TRAIN, teacher=TeacherSpec(outputs="recorded"))
    device = dataclasses.replace(H100, operation_s=0.0)  # the toy's time would be that of starts alone
    alone, shared = plan(device, train), plan(device, train, PlanOptions(4, Sharding.FSDP))
    assert alone.recorded_bytes == shared.recorded_bytes
    assert alone.recording_s > shared.recording_s


def test_outputs_that_do_not_depend_on_the_batch_stay_in_memory_and_not_on_disk() -> None:
    def with_head(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
        return {**predict(model, inputs), "head": model.head.weight}

    def loss(student: Any, teacher: Any, inputs: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(
            student["output"].float() @ teacher["head"].float(), teacher["output"].float()
        )

    train = dataclasses.replace(TRAIN, teacher=TeacherSpec(outputs="recorded"))
    workload = Workload(
        make_student(), with_head, make_workload().make_inputs, loss, constant_outputs=frozenset({"head"})
    )
    made = plan_training(workload, train, 100, H100)
    assert made.recorded_bytes == plan(train=train).recorded_bytes
    assert made.memory.parts["teacher"] == 4 * WIDTH * WIDTH
