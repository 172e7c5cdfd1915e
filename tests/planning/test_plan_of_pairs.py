"""Where guidance is learned a sample is two rows of the model, and levels drawn by error end with recorded outputs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from toy_workload import LENGTH, WIDTH, make_inputs, make_student, make_workload, predict

from fraqat.config import load_recipe
from fraqat.distill import TeacherSpec, TimestepImportanceSpec, TrainSpec
from fraqat.errors import ConfigError
from fraqat.planning import DEVICES, Device, DeviceKind, Plan, PlanOptions, Sharding, Workload, plan_training
from fraqat.workflows.planning import plan
from fraqat.workflows.sessions import open_session

pytestmark = pytest.mark.xdist_group("plan")

H100 = DEVICES["H100"]
FULL = dataclasses.replace(H100, memory_bytes=1000, reserved_bytes=0, gap_share=0.0)
TRAIN = TrainSpec(batch_size=32, guidance_scale="auto")


def predict_pairs(model: torch.nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    if "is_guided" not in inputs:
        return predict(model, inputs)
    both = predict(model, {"x": torch.cat([inputs["x"], inputs["x"]])})["output"].float()
    first, second = both.chunk(2)
    return {"output": 2 * first - second}


def pairs(num_rows: int) -> dict[str, torch.Tensor]:
    assert num_rows % 2 == 0
    return {**make_inputs(num_rows // 2), "is_guided": torch.empty(num_rows // 2, device="meta")}


def workload_of_pairs(**changes: Any) -> Workload:
    return dataclasses.replace(make_workload(make_student()), predict=predict_pairs, make_pairs=pairs, **changes)


def plan_of_pairs(train: TrainSpec = TRAIN, device: Device = H100, options: PlanOptions | None = None) -> Plan:
    return plan_training(workload_of_pairs(), train, 100, device, options)


def advice_about(name: str, train: TrainSpec, workload: Workload, device: Device = FULL) -> list[str]:
    return [line for line in plan_training(workload, train, 100, device).advice if line.startswith(name)]


def test_rows_are_counted_and_not_samples() -> None:
    rows = {row["quantity"]: row for row in plan_of_pairs().to_table().to_json()["rows"]}
    assert (rows["batch size"]["value"], rows["batch size"]["unit"]) == (32, "rows of the model, two for each sample")
    assert (rows["micro-batch"]["value"], rows["micro-batch"]["unit"]) == (32, "rows per device and pass")
    alone = {
        row["quantity"]: row for row in plan_training(make_workload(), TRAIN, 1, H100).to_table().to_json()["rows"]
    }
    assert (alone["batch size"]["unit"], alone["micro-batch"]["unit"]) == ("samples", "samples per device and pass")


def test_the_smallest_micro_batch_is_a_pair() -> None:
    (line,) = [line for line in plan_of_pairs(device=FULL).advice if "micro-batch of" in line]
    assert line.startswith("a micro-batch of one sample, which is two rows (raise train.accumulation) saves")
    parts = dataclasses.replace(TRAIN, accumulation=16)  # as many as the advice means, and they can be trained
    assert plan_of_pairs(parts).micro_batch == 2
    assert not [line for line in plan_of_pairs(parts, FULL).advice if "micro-batch of" in line]


def test_parts_that_cannot_be_of_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size = 32 .* a multiple of 2 x accumulation x devices = 64"):
        plan_of_pairs(dataclasses.replace(TRAIN, accumulation=32))
    with pytest.raises(ConfigError, match=r"= 24 .* a multiple of 2 x accumulation x devices = 16"):
        plan_of_pairs(dataclasses.replace(TRAIN, batch_size=24), options=PlanOptions(8, Sharding.DDP))


def test_recorded_outputs_are_of_samples_and_held_out_ones_of_rows() -> None:
    train = dataclasses.replace(TRAIN, teacher=TeacherSpec(outputs="recorded"))
    made = plan_training(workload_of_pairs(), train, 100, H100, num_held_out=10)
    assert made.recorded_bytes == 4 * LENGTH * WIDTH * (100 * 16 + 10)


def test_levels_by_error_end_with_recorded_outputs_and_the_advice_says_so() -> None:
    name = "train.teacher.outputs: recorded"
    draws = dataclasses.replace(make_workload(make_student()), draws_noise_levels=True)
    auto = TrainSpec(batch_size=32, timestep_importance="auto")
    (line,) = advice_about(name, auto, draws)
    assert "(not with an automatic schedule; noise levels no longer follow the student's error) saves" in line
    for workload, train in ((make_workload(make_student()), auto), (draws, TrainSpec(batch_size=32))):
        (line,) = advice_about(name, train, workload)
        assert "student's error" not in line


def test_recorded_outputs_are_no_advice_where_levels_have_to_follow_the_error() -> None:
    draws = dataclasses.replace(make_workload(make_student()), draws_noise_levels=True)
    by_error = TrainSpec(batch_size=32, timestep_importance=TimestepImportanceSpec())
    assert not advice_about("train.teacher.outputs: recorded", by_error, draws)
    cpu = dataclasses.replace(FULL, kind=DeviceKind.CPU)  # the optimizer stays too: training needs more than recording
    (line,), (plain,) = (
        advice_about("all settings of train together", train, wide(draws), cpu)
        for train in (by_error, TrainSpec(batch_size=32))
    )
    assert needed(line) > needed(plain)  # the teacher stays


def wide(workload: Workload) -> Workload:
    """Large enough to be told apart in GiB."""
    student = make_student(num_blocks=3, width=512, hidden=65536)
    inputs = {"make_inputs": lambda n: {"x": torch.empty(n, 64, 512, device="meta")}}
    return dataclasses.replace(workload, student=student, **inputs)


def needed(line: str) -> float:
    return float(re.findall(r"([\d.]+) GiB needed", line)[0])


@pytest.mark.parametrize(
    ("settings", "is_of_pairs", "draws"),
    [
        (("train.guidance_scale=auto",), True, True),
        (("train.guidance_scale=3.0",), True, True),
        ((), False, True),
        (("train.guidance_scale=auto", "sampler.guidance_scale=1.0"), False, True),
        (("train.guidance_scale=auto", "data.learn_from=sampling_path"), False, False),
    ],
)
def test_a_recipe_says_what_is_computed(settings: tuple[str, ...], is_of_pairs: bool, draws: bool) -> None:
    recipe = load_recipe("color-digits", settings)
    workload = open_session(recipe).workload(recipe)
    assert (workload.make_pairs is not None, workload.draws_noise_levels) == (is_of_pairs, draws)


def test_a_step_of_a_recipe_is_of_as_many_rows_as_its_batch() -> None:
    recipe = load_recipe("color-digits", ("train.guidance_scale=auto",))
    workload = open_session(recipe).workload(recipe)
    assert workload.make_pairs is not None
    rows: list[int] = []
    workload.student.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    output = workload.predict(workload.student, workload.make_pairs(8))["output"]
    assert rows == [8] and len(output) == 4 and output.dtype == torch.float32
    assert len(workload.predict(workload.student, workload.make_inputs(8))["output"]) == 8


def test_a_recipe_whose_parts_cannot_be_of_pairs_has_no_plan() -> None:
    settings = ("train.guidance_scale=auto", "train.batch_size=6", "train.accumulation=2")
    with pytest.raises(ConfigError, match=r"train.batch_size = 6 .* a multiple of 2 x accumulation x devices = 4"):
        plan(load_recipe("color-digits", settings), "H100")
