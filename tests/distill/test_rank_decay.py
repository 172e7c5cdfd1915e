"""Training with branches whose rank decays: plain layers are left, a resumed run is the uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyTask, toy_spec, toy_teacher

from fraqat import QuantSpec, ScheduleSpec, WeightSpec, quantize_
from fraqat.distill import Distiller, TrainSpec, optimizers, read_log, validation_loss
from fraqat.nn import BranchSpec, RankSchedule, SmoothingSpec, add_branches_, initialize_branches_, quantized_layers
from fraqat.schedules import LearningRateSpec

pytestmark = pytest.mark.xdist_group("rank-decay")  # one worker trains what is interrupted

STEPS = 12
DECAY = RankSchedule("linear", 0.6)


def decaying(folder: Path, steps: int = STEPS, method: str = "mse", **changes: Any) -> Distiller:
    task, student = ToyTask(), toy_teacher()
    quantize_(student, QuantSpec(weight=WeightSpec(bits=2.5, range_method=method)))
    branch = BranchSpec(3, changes.pop("start", "weight"), rank_schedule=changes.pop("decay", DECAY))
    add_branches_(student, branch, SmoothingSpec(exponents=(0.5,)) if changes.pop("is_smoothed", False) else None)
    initialize_branches_(student, lambda batch: task.predict(student, batch), task.calibration_batches(6, 4))
    on_step = changes.pop("on_step", lambda record: None)
    schedule = changes.pop("schedule", ScheduleSpec("constant")).resolve(2.5, steps)
    return Distiller(task, toy_teacher(), student, schedule, toy_spec(**changes), folder, on_step=on_step)


def plain_student(method: str) -> torch.nn.Module:
    student = toy_teacher()
    quantize_(student, QuantSpec(weight=WeightSpec(bits=2.5, range_method=method)))
    return student


@pytest.mark.parametrize(("method", "start"), [("mse", "weight"), ("learned", "error")])
def test_what_is_left_is_a_plain_student_that_has_learned(tmp_path: Path, method: str, start: str) -> None:
    values = {"learning_rate": LearningRateSpec(peak=5e-3), "batch_size": 16, "checkpoint_every": 80}
    distiller = decaying(tmp_path, 80, method, start=start, validate_every=80, **values)
    untrained = plain_student(method)
    before = validation_loss(distiller.task, toy_teacher(), untrained, TrainSpec(batch_size=4))
    result = distiller.run()
    assert result.validation_loss < 0.8 * before
    plain = plain_student(method)
    plain.load_state_dict(distiller.student.state_dict())
    assert not any("branch" in name for name in distiller.student.state_dict())
    assert validation_loss(distiller.task, toy_teacher(), plain, distiller.spec) == pytest.approx(
        result.validation_loss, rel=1e-5
    )


def test_the_rank_falls_as_scheduled(tmp_path: Path) -> None:
    distiller = decaying(tmp_path)
    seen: list[int] = []
    distiller.on_step = lambda record: seen.append(
        sum(layer.branch.num_active for _, layer in quantized_layers(distiller.student))
    )
    distiller.run()
    wanted = [2 * DECAY.rank_at(3, step, STEPS) for step in range(STEPS)]
    assert seen == wanted and wanted[0] == 6 and wanted[7] > 0 == wanted[8]
    events = [event for event in read_log(tmp_path) if event["event"] == "rank"]
    assert [(e["step"], e["num_left"]) for e in events] == [
        (step, wanted[step]) for step in range(1, STEPS) if wanted[step] != wanted[step - 1]
    ]
    assert sum(event["num_folded"] for event in events) == 6


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned": {"method": "learned", "accumulation": 2},
    "smoothed": {"is_smoothed": True, "start": "error", "decay": RankSchedule("cosine", 0.9)},
    "falling-widths": {"method": "learned", "schedule": ScheduleSpec("fractional")},
    "weight-decay": {"method": "max_abs", "weight_decay": 0.1, "optimizer": "adamw_8bit"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The student of an uninterrupted run, by options."""
    made: dict[str, dict[str, torch.Tensor]] = {}

    def get(name: str) -> dict[str, torch.Tensor]:
        if name not in made:
            distiller = decaying(tmp_path_factory.mktemp(name), **OPTIONS[name])
            distiller.run()
            made[name] = distiller.student.state_dict()
        return made[name]

    return get


@pytest.mark.parametrize(("name", "crash_after"), [*((name, 5) for name in OPTIONS), ("learned", 9)])
def test_an_interrupted_run_ends_bitwise_equal(tmp_path: Path, name: str, crash_after: int, whole: Any) -> None:
    def stop(record: Any) -> None:
        if record.step == crash_after:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        decaying(tmp_path, on_step=stop, **OPTIONS[name]).run()
    resumed = decaying(tmp_path, **OPTIONS[name])
    resumed.run()
    assert resumed.student.state_dict().keys() == whole(name).keys()
    for key, value in whole(name).items():
        assert torch.equal(resumed.student.state_dict()[key], value), key


def test_a_finished_run_that_is_started_again_is_the_same(tmp_path: Path) -> None:
    first = decaying(tmp_path)
    first.run()
    again = decaying(tmp_path)
    again.run()
    for key, value in first.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[key], value), key


@pytest.mark.parametrize("schedule", ["constant", "fractional"])
def test_an_optimizer_with_copies_on_the_host_takes_what_was_folded(
    tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "learned", "schedule": ScheduleSpec(schedule)}
    beside = decaying(tmp_path / "same", **options)
    beside.run()
    monkeypatch.setattr(optimizers, "_is_host", lambda device: False)
    hosted = decaying(tmp_path / "host", optimizer_device="host", **options)
    assert isinstance(hosted.optimizer, optimizers.HostOptimizer)
    hosted.run()
    for key, value in beside.student.state_dict().items():
        assert torch.equal(hosted.student.state_dict()[key], value), key
