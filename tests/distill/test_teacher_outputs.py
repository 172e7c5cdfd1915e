"""Laws of recorded outputs of the teacher: the same bits as computed ones, at any interruption, and no teacher in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_cases import (
    CHANGES,
    NUM_HELD_OUT,
    NUM_PARTS,
    NUM_STEPS,
    RECORDED,
    CountingTask,
    assert_same,
    facts,
    manifest,
    weights,
)
from torch import Tensor, nn
from toy import ToyTask, toy_spec, toy_student, toy_teacher

from fraqat import ScheduleSpec, quantize_
from fraqat.distill import Batch, Distiller, LossSpec, Prediction, TeacherSpec, TrainSpec, read_log
from fraqat.distill import recording as recording_module
from fraqat.distill.identity import inputs_identity
from fraqat.distill.recording import host_copy
from fraqat.distill.watch_spec import NonFiniteSpec
from fraqat.errors import ConfigError, NonFiniteLossError, OutputError
from fraqat.nn import serve_widths_


@pytest.mark.parametrize("changes", [{}, {"autocast": "bfloat16"}, {"ema_decay": 0.9}, {"optimizer": "adamw_8bit"}])
def test_a_run_with_recorded_outputs_is_the_same_run(make_distiller, changes: dict[str, Any]) -> None:
    runs: dict[str, Distiller] = {}
    for outputs in ("computed", "recorded"):
        teacher = TeacherSpec(outputs=outputs)
        runs[outputs] = make_distiller(folder=outputs, **{**CHANGES, **changes, "teacher": teacher})
        runs[outputs].run()
    assert_same(weights(runs["recorded"]), weights(runs["computed"]))
    assert facts(runs["recorded"].folder) == facts(runs["computed"].folder)
    (event,) = [event for event in read_log(runs["recorded"].folder) if event["event"] == "recording"]
    assert event["num_steps"] == NUM_STEPS
    assert event["num_bytes"] > NUM_STEPS * 4 * 4 * 4  # batches of four, four float32 outputs


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_outputs_of_a_teacher_in_fewer_bytes_are_recorded_as_it_gives_them(make_distiller, dtype: Any) -> None:
    runs = {
        outputs: make_distiller(folder=outputs, teacher=TeacherSpec(dtype, outputs))
        for outputs in ("computed", "recorded")
    }
    for run in runs.values():
        run.run()
    assert facts(runs["recorded"].folder) == facts(runs["computed"].folder)


def test_the_teacher_is_asked_once_for_every_part_and_leaves_memory(make_distiller) -> None:
    task = CountingTask()
    held: list[int] = []

    def held_bytes() -> int:
        storages = [parameter.untyped_storage() for parameter in distiller.teacher.parameters()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    distiller = make_distiller(task=task, on_step=lambda record: held.append(held_bytes()), **CHANGES)
    parameters = list(distiller.teacher.parameters())
    assert held_bytes() == 4 * sum(parameter.numel() for parameter in parameters)
    distiller.run()
    assert task.num_calls == NUM_STEPS * NUM_PARTS + NUM_HELD_OUT
    assert held == [4 * len(parameters)] * NUM_STEPS
    assert bool(torch.isnan(distiller.teacher(torch.ones(1, 8))).all())


def test_frozen_parameters_that_the_student_shares_stay(tmp_path: Path) -> None:
    found: list[list[tuple[Any, ...]]] = []
    for outputs in ("computed", "recorded"):
        teacher, student = toy_teacher(), toy_student()
        student[0].requires_grad_(False)
        spec = toy_spec(teacher=TeacherSpec(outputs=outputs))
        schedule = ScheduleSpec("fractional").resolve(4.0, 9)
        distiller = Distiller(ToyTask(), teacher, student, schedule, spec, tmp_path / outputs)
        assert student[0].weight.data_ptr() == teacher[0].weight.data_ptr()
        distiller.run()
        assert torch.equal(student[0].weight, toy_teacher()[0].weight)
        found.append(facts(tmp_path / outputs))
    assert found[0] == found[1]


def test_a_teacher_that_has_left_memory_is_refused(make_distiller) -> None:
    distiller = make_distiller(**CHANGES)
    distiller.run()
    with pytest.raises(ConfigError, match=r"teacher = 'without weights' .* Fix: load it again"):
        Distiller(
            ToyTask(), distiller.teacher, toy_student(), distiller.schedule, toy_spec(), distiller.folder / "next"
        )


def test_the_folder_is_there_until_the_run_ends(make_distiller) -> None:
    seen: list[bool] = []
    distiller = make_distiller(on_step=lambda record: seen.append(manifest(distiller.folder) is not None), **CHANGES)
    distiller.run()
    assert seen == [True] * NUM_STEPS
    assert not (distiller.folder / "teacher_outputs").exists()


def test_inputs_are_told_apart_by_values_rows_and_names() -> None:
    x = torch.randn(4, 3)
    same = inputs_identity({"x": x, "texts": ["a", "b"]})
    assert same == inputs_identity({"texts": ["a", "b"], "x": x.clone()})
    others: list[Batch] = [
        {"x": x + 1e-7, "texts": ["a", "b"]},
        {"x": x.flip(0), "texts": ["a", "b"]},
        {"x": x, "texts": ["b", "a"]},
        {"y": x, "texts": ["a", "b"]},
        {"x": x.flatten(), "texts": ["a", "b"]},
        {"x": x.bfloat16(), "texts": ["a", "b"]},
    ]
    assert len({same, *map(inputs_identity, others)}) == 1 + len(others)
    assert inputs_identity({"mask": torch.tensor([True, False]), "scale": torch.tensor(2.0)})


def test_the_limit_says_how_much_is_needed_and_what_to_change(make_distiller) -> None:
    teacher = TeacherSpec(outputs="recorded", outputs_limit_gib=1e-6)
    distiller = make_distiller(**{**CHANGES, "teacher": teacher})
    match = (
        r"train.teacher.outputs_limit_gib = 1e-06 .* outputs of 18 steps of 4 samples, .* take at least \d+ bytes.*"
        r"outputs: computed"
    )
    with pytest.raises(ConfigError, match=match):
        distiller.run()
    assert distiller.step == 0
    assert not list((distiller.folder / "teacher_outputs").glob("step-*"))


def test_a_disk_without_room_is_said_before_it_is_full(make_distiller, monkeypatch) -> None:
    free = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(recording_module.shutil, "disk_usage", lambda path: free)
    distiller = make_distiller(**CHANGES)
    with pytest.raises(OutputError, match=r"need 0.0 MiB more, and 0.0 MiB are free .* Fix: free space"):
        distiller.run()


def test_a_teacher_that_draws_random_numbers_is_refused(make_distiller) -> None:
    class Drawing(ToyTask):
        def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
            return {"output": super().predict(model, inputs)["output"] + torch.rand(())}

    with pytest.raises(ConfigError, match="computed for a teacher that draws random numbers"):
        make_distiller(task=Drawing(), **CHANGES).run()


def test_an_automatic_schedule_is_refused(make_distiller) -> None:
    schedule = ScheduleSpec("automatic").resolve(4.0, 60)
    with pytest.raises(
        ConfigError, match=r"train.teacher.outputs = 'recorded' .* computed with schedule.kind: automatic"
    ):
        make_distiller(schedule=schedule, **CHANGES)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train.on_out_of_memory = 'split' .* stop with train.teacher.outputs: recorded"
    ):
        TrainSpec(teacher=RECORDED, on_out_of_memory="split")
    with pytest.raises(ConfigError, match=r"train.teacher.outputs_limit_gib = 0 .* more than 0 GiB"):
        TeacherSpec(outputs_limit_gib=0)
    with pytest.raises(ConfigError, match=r"train.teacher.outputs = 'cached' .* computed, recorded"):
        TeacherSpec(outputs="cached")  # pyright: ignore[reportArgumentType]


def test_outputs_keep_their_strides(make_distiller) -> None:
    strides: list[tuple[int, ...]] = []

    class Half(ToyTask):
        """Gives every second column, as a view."""

        def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
            return {"output": model(inputs["x"])[:, ::2].t()}

        def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Any) -> Tensor:
            strides.append(teacher["output"].stride())
            return super().loss(student, teacher, inputs, terms)

    computed = make_distiller(task=Half(), folder="computed")
    computed.run()
    expected, strides = strides, []
    distiller = make_distiller(task=Half(), folder="recorded", teacher=RECORDED)
    distiller.run()
    assert set(strides) == {(2, 4)}
    assert strides == expected
    assert facts(distiller.folder) == facts(computed.folder)


def test_copies_on_the_host_are_copies() -> None:
    value = torch.arange(6.0)
    copy = host_copy(value.view(2, 3).t())
    value.zero_()
    assert copy.stride() == (1, 3)
    assert copy.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert host_copy(torch.ones(1, 3).expand(4, 3)).stride() == (3, 1)


class FailingOnce(nn.Module):
    """A student's layer that is infinite in one call."""

    def __init__(self, inner: nn.Module, at: int):
        super().__init__()
        self.inner, self.at, self.num_calls = inner, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += self.training
        return self.inner(x) * (torch.inf if self.training and self.num_calls == self.at else 1)


def test_a_rewind_takes_the_same_outputs_again(tmp_path: Path) -> None:
    found: list[list[tuple[Any, ...]]] = []
    for outputs in ("computed", "recorded"):
        teacher, student = toy_teacher(), toy_student()
        spec = toy_spec(teacher=TeacherSpec(outputs=outputs), on_non_finite=NonFiniteSpec("rewind"))
        schedule = ScheduleSpec("fractional").resolve(4.0, 9)
        student[1] = FailingOnce(student[1], 7)
        warned: list[str] = []
        Distiller(ToyTask(), teacher, student, schedule, spec, tmp_path / outputs, warn=warned.append).run()
        assert len(warned) == 1 and "Going back" in warned[0]
        found.append(facts(tmp_path / outputs))
    assert found[0] == found[1]


def test_outputs_that_are_not_finite_are_named(make_distiller) -> None:
    class Bad(ToyTask):
        def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
            output = super().predict(model, inputs)["output"]
            is_teacher = not any(parameter.requires_grad for parameter in model.parameters())
            return {"output": output * (torch.inf if is_teacher else 1)}

    with pytest.raises(
        NonFiniteLossError, match=r"first in the recorded outputs of the teacher \(step-00000000/part-0\)"
    ):
        make_distiller(task=Bad(), **CHANGES).run()


def test_several_widths_have_one_record(tmp_path: Path) -> None:
    found: list[list[tuple[Any, ...]]] = []
    for outputs in ("computed", "recorded"):
        schedule = ScheduleSpec("several", widths=(8, 4)).resolve(4.0, 9)
        teacher, student = toy_teacher(), toy_teacher()
        quantize_(student)
        serve_widths_(student, schedule.widths)
        spec = toy_spec(teacher=TeacherSpec(outputs=outputs), losses=(LossSpec("mse"), LossSpec("l1", 0.1)))
        Distiller(ToyTask(), teacher, student, schedule, spec, tmp_path / outputs).run()
        found.append(facts(tmp_path / outputs))
    assert found[0] == found[1]
    assert any(fact[0] == "width" for fact in found[0])


def test_the_manifest_lists_every_part_and_every_held_out_batch(make_distiller) -> None:
    distiller = make_distiller(**CHANGES)
    keys: set[str] = set()
    distiller.on_step = lambda record: keys.update(
        key for file in manifest(distiller.folder)["files"] for key in file["keys"]
    )
    distiller.run()
    assert keys == {
        *(f"step-{step:08d}/part-{part}" for step in range(NUM_STEPS) for part in range(NUM_PARTS)),
        *(f"held-out-{number:08d}" for number in range(NUM_HELD_OUT)),
    }
