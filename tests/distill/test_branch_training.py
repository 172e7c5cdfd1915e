"""SVDQAT on the toy task: both branches train, the loss falls, a resumed run is the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import ToyTask, toy_spec, toy_teacher

from fraqat import QuantSpec, ScheduleSpec, WeightSpec, quantize_
from fraqat.distill import Distiller
from fraqat.nn import BranchSpec, SmoothingSpec, add_branches_, initialize_branches_
from fraqat.schedules import LearningRateSpec


def svdqat(folder: Path, steps: int = 12, method: str = "mse", **changes) -> Distiller:
    task, student = ToyTask(), toy_teacher()
    quantize_(student, QuantSpec(weight=WeightSpec(bits=2.5, range_method=method)))
    add_branches_(student, BranchSpec(1), SmoothingSpec())
    initialize_branches_(student, lambda batch: task.predict(student, batch), task.calibration_batches(6, 4))
    on_step = changes.pop("on_step", lambda record: None)
    schedule = changes.pop("schedule", ScheduleSpec("constant")).resolve(2.5, steps)
    return Distiller(task, toy_teacher(), student, schedule, toy_spec(**changes), folder, on_step=on_step)


@pytest.mark.parametrize("method", ["mse", "learned"])
def test_both_branches_train_and_the_held_out_loss_falls(tmp_path: Path, method: str) -> None:
    rate = LearningRateSpec(peak=2e-3)
    distiller = svdqat(
        tmp_path, 300, method, learning_rate=rate, batch_size=16, checkpoint_every=300, validate_every=300
    )
    before, start = distiller.validate(), {n: t.clone() for n, t in distiller.student.state_dict().items()}
    assert distiller.run().validation_loss < 0.7 * before
    for name, value in distiller.student.state_dict().items():
        is_fixed = name.endswith(("smoothing.scale", "clip_ratio"))
        assert is_fixed or not torch.equal(value, start[name]), name
        assert not name.endswith("smoothing.scale") or torch.equal(value, start[name])


@pytest.mark.parametrize(
    "schedule", [ScheduleSpec("constant"), ScheduleSpec("fractional")], ids=["constant", "fractional"]
)
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "accumulation": 2}], ids=["plain", "averaged"])
def test_an_interrupted_run_ends_bitwise_equal(tmp_path: Path, schedule: ScheduleSpec, options) -> None:
    def stop(record) -> None:
        if record.step == 6:
            raise RuntimeError("crash")

    whole = svdqat(tmp_path / "whole", schedule=schedule, **options)
    whole.run()
    with pytest.raises(RuntimeError, match="crash"):
        svdqat(tmp_path / "cut", schedule=schedule, on_step=stop, **options).run()
    resumed = svdqat(tmp_path / "cut", schedule=schedule, **options)
    resumed.run()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], value), name
