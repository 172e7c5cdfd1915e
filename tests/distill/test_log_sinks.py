"""Where scalars go, and the profiler's files."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from fraqat.distill import ProfileSpec, WandbSpec, read_log
from fraqat.distill.step_times import StepTimes
from fraqat.errors import ConfigError, OutputError
from fraqat.schedules import ScheduleSpec

SCALARS = {
    f"train/{name}"
    for name in ("loss", "bits", "learning_rate", "gradient_norm", "stage", "step_ms", "samples_per_s", "memory_bytes")
}


class FakeRun:
    def __init__(self, **arguments):
        self.arguments, self.rows, self.is_finished = arguments, [], False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch):
    """The part of wandb's interface that is used."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.runs = []
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **values: values

    def init(**arguments):
        module.runs.append(FakeRun(**arguments))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_slow_first_step_does_not_count_for_the_time_that_is_left() -> None:
    schedule = ScheduleSpec("constant").resolve(target_bits=4, total_steps=10)
    times = StepTimes(batch_size=1, device=torch.device("cpu"))
    milliseconds = (60_000, 1000, 1000)
    records = [times.record(i, schedule, schedule.stage_at(i), 0.0, 0.0, 0.0, ms) for i, ms in enumerate(milliseconds)]
    assert [record.left_s for record in records] == pytest.approx([540, 8, 7])


def test_steps_tell_throughput_and_memory(make_distiller, tmp_path: Path) -> None:
    make_distiller(steps=9).run()
    steps = [e for e in read_log(tmp_path / "run") if e["event"] == "step"]
    for step in steps:
        assert step["samples_per_s"] == pytest.approx(4000 / step["step_ms"])
        assert step["memory_bytes"] > 10**7


def test_tensorboard_has_every_scalar(make_distiller, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    make_distiller(steps=9, tensorboard=True, log_code_flips=True).run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == SCALARS | {"validation/loss", "codes/all", "codes/-"}


def test_wandb_gets_the_same_scalars_and_one_run_for_a_folder(make_distiller, wandb) -> None:
    spec = WandbSpec(project="tests", mode="offline")
    make_distiller(steps=9, wandb=spec, fingerprint={"bits": 4}).run()
    (run,) = wandb.runs
    assert run.is_finished
    assert run.arguments["mode"] == "offline"
    assert run.arguments["config"] == {"bits": 4}
    assert run.arguments["settings"] == {"disable_git": True, "disable_code": True, "console": "off"}
    steps = [row for row in run.rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(9))
    assert set(steps[0]) == SCALARS | {"step"}
    make_distiller(steps=9, wandb=spec, fingerprint={"bits": 4}).run()
    assert wandb.runs[1].arguments["id"] == run.arguments["id"]


def test_wandb_that_is_missing_or_refuses_is_said(make_distiller, wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments):
        raise wandb.Error("api_key not configured")

    wandb.init = refuse
    with pytest.raises(OutputError, match=r"api_key not configured.*wandb login"):
        make_distiller(wandb=WandbSpec()).run()
    monkeypatch.setattr("fraqat.distill.scalar_sinks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.wandb = 'fraqat' .* pip install 'fraqat\[wandb\]'"):
        make_distiller(wandb=WandbSpec()).run()


def test_chosen_steps_are_profiled(make_distiller, tmp_path: Path) -> None:
    make_distiller(steps=9, profile=ProfileSpec(first_step=3, num_steps=2, memory=True)).run()
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps-3-4.json.gz", "steps-3-4.txt"]
    trace = json.loads(gzip.decompress((folder / "steps-3-4.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::mm" in names or "aten::linear" in names
    assert "Self CPU" in (folder / "steps-3-4.txt").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProfileSpec(first_step=-1), "train.profile.first_step = -1"),
        (lambda: ProfileSpec(num_steps=0), "train.profile.num_steps = 0"),
        (lambda: WandbSpec(project=""), "train.wandb.project = ''"),
        (lambda: WandbSpec(mode="loud"), "train.wandb.mode = 'loud' .* online, offline"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
