"""Laws of the heartbeat and of `fraqat status`, which knows a run from its files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fraqat import cli
from fraqat.config import load_recipe
from fraqat.distill import StepRecord
from fraqat.errors import InterruptedRunError, ModelError
from fraqat.workflows import RunFolder, status
from fraqat.workflows.heartbeat import Heartbeat, process_start


def record(step: int, step_ms: float = 100.0, loss: float = 0.5) -> StepRecord:
    return StepRecord(step, 100, 2, 9, 6.0, loss, 1e-4, 1.0, step_ms, 9.5, 80.0, 10**8)


class Clock:
    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", load_recipe("color-digits"))


def beat_of(run: RunFolder) -> dict:
    return json.loads((run.path / "heartbeat.json").read_text())


def change(run: RunFolder, **values) -> None:
    path = run.path / "heartbeat.json"
    path.write_text(json.dumps(beat_of(run) | values))


def test_a_run_is_alive_while_it_beats(run: RunFolder) -> None:
    clock = Clock()
    (run.path / "checkpoints" / "step-00000040").mkdir(parents=True)
    (run.path / "checkpoints" / ".step-00000050.abc.part").mkdir()
    with Heartbeat(run.path, clock) as heartbeat:
        heartbeat.step(record(41))
        clock.now += 30
        found = status(run, clock)
        row = found.to_table().to_json()["rows"][0]
        assert found.exit_code == 0
        assert row == {
            "run": ".",
            "rank": 0,
            "state": "alive",
            "step": 42,
            "of": 100,
            "stage": "3/9",
            "bits": 6.0,
            "loss": 0.5,
            "last sign, s ago": 30,
            "time left": "0:00:10",
            "checkpoint": 40,
        }


def test_silence_is_measured_by_the_pace_of_the_run(run: RunFolder) -> None:
    clock = Clock()
    with Heartbeat(run.path, clock) as heartbeat:
        heartbeat.step(record(1))
        clock.now += 61
        found = status(run, clock)
        assert (found.processes[0].state.value, found.exit_code) == ("stalled", 9)
        assert "silent for 61 s in phase training" in found.processes[0].message
        heartbeat.step(record(2, step_ms=60_000))  # slow steps
        clock.now += 600
        assert status(run, clock).exit_code == 0
        heartbeat.phase("validating")
        clock.now += 3000
        assert status(run, clock).exit_code == 0


def test_beats_are_at_most_one_a_second(run: RunFolder) -> None:
    clock = Clock()
    with Heartbeat(run.path, clock) as heartbeat:
        heartbeat.step(record(0))
        clock.now += 0.5
        heartbeat.step(record(1))
        assert beat_of(run)["step"] == 1
        clock.now += 0.6
        heartbeat.step(record(2, loss=float("nan")))
        assert (beat_of(run)["step"], beat_of(run)["loss"]) == (3, None)


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (InterruptedRunError("stopped by signal 15", 15), "interrupted", "run the same `fraqat train` again"),
        (ModelError("weights are missing. Fix: x."), "failed", "weights are missing"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError"),
    ],
)
def test_the_end_is_told(run: RunFolder, error: Exception, state: str, words: str) -> None:
    with pytest.raises(type(error)), Heartbeat(run.path):
        raise error
    found = status(run)
    assert (found.processes[0].state.value, found.exit_code) == (state, 10)
    assert words in found.processes[0].message


def test_a_killed_process_is_noticed_even_if_its_number_is_used_again(run: RunFolder) -> None:
    waiting = [sys.executable, "-c", "input()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as child, Heartbeat(run.path):
        change(run, pid=child.pid, pid_started=process_start(child.pid))
        assert status(run).exit_code == 0
        child.kill()
        child.wait()
        found = status(run)
        assert found.processes[0].state.value == "failed"
        assert "ended without a word" in found.processes[0].message
        change(run, pid=os.getpid(), pid_started=1)
        assert status(run).exit_code == 10
        change(run, host="elsewhere")
        assert status(run).exit_code == 0
        change(run, time=0.0)
        assert "another machine" in status(run).processes[0].message


def test_every_rank_and_baseline_has_a_row(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = RunFolder.create(run.baseline("dynamic").path, load_recipe("color-digits").baseline("dynamic"))
    baseline.result_path.write_text("{}")
    baseline.student_path.write_bytes(b"")
    beats = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        beats.append(Heartbeat(run.path).__enter__())
    found = status(run)
    assert [(p.run, p.beat.get("rank"), p.state.value) for p in found.processes] == [
        ("baselines/dynamic", None, "finished"),
        (".", 0, "alive"),
        (".", 1, "alive"),
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running"}', '{"time": "x"}', "\x00\xff"])
def test_a_damaged_heartbeat_is_none(run: RunFolder, text: str) -> None:
    (run.path / "heartbeat.json").write_text(text, encoding="latin-1")
    assert [p.state.value for p in status(run).processes] == ["not started"]


def test_a_heartbeat_that_cannot_be_written_stops_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with Heartbeat(run.path) as heartbeat:
        monkeypatch.setattr(Path, "write_text", full)
        heartbeat.step(record(1))
        monkeypatch.undo()
    assert beat_of(run)["state"] == "finished"
    assert not list(run.path.glob(".heartbeat*"))


def test_the_command_prints_and_exits_by_state(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fraqat", "status", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().out

    assert call(str(run.path))[0] == 0
    with Heartbeat(run.path):
        change(run, pid_started=1)
        code, out = call(str(run.path), "--json")
    assert (code, json.loads(out)["tables"][0]["rows"][0]["state"]) == (10, "failed")
    assert call(str(run.path.parent))[0] == 3
