"""Laws of recorded outputs where something happens: signals, dying processes, damage, other settings and other data."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from recorded_cases import (
    CHANGES,
    NUM_HELD_OUT,
    NUM_PARTS,
    NUM_STEPS,
    CountingTask,
    assert_same,
    facts,
    manifest,
    weights,
)
from torch import Tensor
from toy import ToyTask

from fraqat.distill import Batch, Distiller, StepRecord, TeacherSpec
from fraqat.distill import recording as recording_module
from fraqat.errors import DataError, InterruptedRunError


@pytest.fixture
def wanted(make_distiller) -> tuple[dict[str, Tensor], list[tuple[Any, ...]]]:
    """The run whose teacher computes at every step."""
    distiller = make_distiller(folder="computed", **{**CHANGES, "teacher": TeacherSpec()})
    distiller.run()
    return weights(distiller), facts(distiller.folder)


def stopped(make_distiller, at: int, **changes: Any) -> Distiller:
    """A run whose teacher receives SIGTERM at a call."""
    task = CountingTask(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    distiller = make_distiller(task=task, **{**CHANGES, **changes})
    with pytest.raises(InterruptedRunError, match=r"while the teacher's outputs were recorded, after step \d+ of 18"):
        distiller.run()
    assert distiller.step == 0
    return distiller


def test_a_signal_while_recording_keeps_what_was_recorded(make_distiller, wanted) -> None:
    num_before = NUM_HELD_OUT + 7
    stopped(make_distiller, num_before)
    task = CountingTask()
    distiller = make_distiller(task=task, **CHANGES)
    distiller.run()
    assert task.num_calls == (NUM_STEPS - 4) * NUM_PARTS  # the signal came in the fourth step, which was ended
    assert_same(weights(distiller), wanted[0])
    assert facts(distiller.folder) == wanted[1]


def test_a_process_that_dies_while_recording_loses_one_file(make_distiller, wanted, monkeypatch) -> None:
    def die() -> None:
        raise KeyError("killed")

    monkeypatch.setattr(recording_module, "_FILE_BYTES", 100)  # a step has 64 bytes: a file for every second one
    distiller = make_distiller(task=CountingTask(NUM_HELD_OUT + 2 * 5, die), **CHANGES)
    with pytest.raises(KeyError, match="killed"):
        distiller.run()
    folder = distiller.folder / "teacher_outputs"
    (folder / ".step.0123.part").write_bytes(b"half")
    (folder / "unlisted.safetensors").write_bytes(b"written, and not listed yet")
    task = CountingTask()
    seen: list[set[str]] = []
    distiller = make_distiller(
        task=task, on_step=lambda record: seen.append({path.name for path in folder.iterdir()}), **CHANGES
    )
    distiller.run()
    assert task.num_calls == (NUM_STEPS - 4) * NUM_PARTS
    assert not any("unlisted" in name or ".part" in name for name in seen[0])
    assert_same(weights(distiller), wanted[0])
    assert facts(distiller.folder) == wanted[1]


def test_training_goes_on_from_a_checkpoint_without_the_teacher(make_distiller, wanted) -> None:
    def stop(record: StepRecord) -> None:
        if record.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        make_distiller(task=CountingTask(), on_step=stop, **CHANGES).run()
    task = CountingTask()
    distiller = make_distiller(task=task, **CHANGES)
    distiller.run()
    assert task.num_calls == 0
    assert_same(weights(distiller), wanted[0])
    assert facts(distiller.folder) == wanted[1]


@pytest.mark.parametrize("order", [("computed", "recorded"), ("recorded", "computed")])
def test_a_run_goes_on_with_the_other_setting(make_distiller, wanted, order: tuple[str, str]) -> None:
    def stop(record: StepRecord) -> None:
        if record.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    first, second = ({**CHANGES, "teacher": TeacherSpec(outputs=outputs)} for outputs in order)
    with pytest.raises(InterruptedRunError):
        make_distiller(task=CountingTask(), on_step=stop, **first).run()
    task = CountingTask()
    distiller = make_distiller(task=task, **second)
    distiller.run()
    left = NUM_STEPS - 10
    num_validations = 2  # after step 15, and at the end
    num_held_out = NUM_HELD_OUT * (num_validations if order[1] == "computed" else 1)
    assert task.num_calls == left * NUM_PARTS + num_held_out
    assert_same(weights(distiller), wanted[0])
    assert facts(distiller.folder) == wanted[1]
    assert not (distiller.folder / "teacher_outputs").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_recorded_anew(make_distiller, wanted, monkeypatch, damage: str) -> None:
    monkeypatch.setattr(recording_module, "_FILE_BYTES", 100)
    folder = stopped(make_distiller, NUM_HELD_OUT + 20).folder / "teacher_outputs"
    path = folder / manifest(folder.parent)["files"][2]["name"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-1])
    if damage == "remove":
        path.unlink()
    task = CountingTask()
    distiller = make_distiller(task=task, **CHANGES)
    said: list[str] = []
    distiller.outputs._place.__dict__["say"] = said.append
    distiller.run()
    assert "1 files with recorded outputs are damaged, such as " + path.name in said[0]
    assert task.num_calls == (NUM_STEPS - 11 + 2) * NUM_PARTS
    assert_same(weights(distiller), wanted[0])
    assert facts(distiller.folder) == wanted[1]


def test_a_file_that_is_damaged_while_training_stops_the_run_and_the_next_mends_it(make_distiller, wanted) -> None:
    def damage(record: StepRecord) -> None:
        if record.step == 2:
            distiller.outputs._files._sound.clear()
            distiller.outputs._files._open.clear()
            path = next((distiller.folder / "teacher_outputs").glob("step-*"))
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    distiller = make_distiller(on_step=damage, **CHANGES)
    with pytest.raises(DataError, match=r"with outputs of the teacher, is damaged\. Fix: run the same"):
        distiller.run()
    distiller = make_distiller(**CHANGES)
    distiller.run()
    assert_same(weights(distiller), wanted[0])
    assert facts(distiller.folder) == wanted[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace("step-00000000", "step-00000009", 1), "does not match its checksum"),
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: "[]", "cannot be read"),
    ],
)
def test_a_spoiled_manifest_is_no_manifest(make_distiller, wanted, spoil: Any, message: str) -> None:
    folder = stopped(make_distiller, NUM_HELD_OUT + 8).folder / "teacher_outputs"
    path = folder / "manifest.json"
    path.write_text(spoil(path.read_text()))
    task = CountingTask()
    distiller = make_distiller(task=task, **CHANGES)
    said: list[str] = []
    distiller.outputs._place.__dict__["say"] = said.append
    distiller.run()
    assert message in said[0]
    assert task.num_calls == NUM_STEPS * NUM_PARTS + NUM_HELD_OUT
    assert_same(weights(distiller), wanted[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 5}, "seed was 1234 and is now 5"),
        ({"accumulation": 1}, "accumulation was 2 and is now 1"),
        ({"autocast": "bfloat16"}, "products was"),
        ({"teacher": TeacherSpec("int8", "recorded")}, "teacher_dtype was 'model' and is now 'int8'"),
        ({"fingerprint": {"a": 2}}, "settings.a was 1 and is now 2"),
        ({"hidden": 24}, "settings.models.teacher was"),
    ],
)
def test_outputs_of_other_settings_are_recorded_anew(make_distiller, changes: dict[str, Any], named: str) -> None:
    stopped(make_distiller, NUM_HELD_OUT + 8)
    task = CountingTask()
    distiller = make_distiller(task=task, **{**CHANGES, **changes})
    said: list[str] = []
    distiller.outputs._place.__dict__["say"] = said.append
    distiller.run()
    assert "belong to other settings" in said[0] and named in said[0]
    assert task.num_calls == NUM_STEPS * distiller.spec.accumulation + NUM_HELD_OUT


def test_other_data_than_were_recorded_stop_the_run(make_distiller) -> None:
    class Shifting(ToyTask):
        num_calls = 0

        def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
            self.num_calls += 1
            is_third_of_training = self.num_calls == NUM_HELD_OUT + NUM_STEPS * NUM_PARTS + 3
            return super().make_inputs({"x": batch["x"] + is_third_of_training}, generator)

    with pytest.raises(DataError, match=r"step-00000001/part-0: the data are not those .*outputs: computed"):
        make_distiller(task=Shifting(), **CHANGES).run()
