"""Laws of noise levels drawn by the student's error: no bias, the same draws in a resumed run, refusals that say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import NoisyToy, ToyTask, toy_spec, toy_student, toy_teacher

from fraqat import ScheduleSpec
from fraqat.config import load_recipe
from fraqat.distill import Distiller, LossSpec, TeacherSpec, TimestepImportance, TimestepImportanceSpec, read_log
from fraqat.distill.importance import importance_phrase, make_importance
from fraqat.distill.parts import part_inputs
from fraqat.distill.task import LOSS_WEIGHT, TIMESTEP_BIN
from fraqat.errors import CheckpointError, ConfigError

BINS = 4
ERRORS = [1.0, 4.0, 0.0, 25.0]


def importance(errors: list[float] = ERRORS, **changes: Any) -> TimestepImportance:
    """One that has seen `errors`, one sample of each part."""
    made = TimestepImportance(TimestepImportanceSpec(**{"bins": BINS, **changes}))
    made.update_([[*errors, *(1.0 for _ in errors)]])
    return made


def test_shares_follow_the_root_of_the_mean_squared_error_above_the_floor() -> None:
    shares = importance(floor=0.2).shares
    assert shares == pytest.approx([0.8 * root / 8 + 0.05 for root in (1, 2, 0, 5)])
    assert importance(floor=1.0).shares == pytest.approx([0.25] * BINS)


def test_means_run_and_leave_out_parts_that_were_not_drawn() -> None:
    made = importance(momentum=0.75)
    made.update_([[8.0, 0, 0, 0, 2, 0, 0, 0], [1.0, 0, 0, 9.0, 1, 0, 0, 1]])  # two parts of a batch
    assert made.state_dict()["means"] == pytest.approx([0.75 + 0.25 * 3, 4.0, 0.0, 0.75 * 25 + 0.25 * 9])


@pytest.mark.parametrize("errors", [[0.0] * BINS, []], ids=["no-error", "unseen"])
def test_without_errors_draws_follow_the_distribution_itself(errors: list[float]) -> None:
    made = importance(errors) if errors else TimestepImportance(TimestepImportanceSpec(bins=BINS))
    _, columns = made.draw(0, 100, torch.Generator().manual_seed(0))
    assert made.shares == [0.25] * BINS and torch.equal(columns[LOSS_WEIGHT], torch.ones(100))


def test_draws_have_their_shares_and_places_are_uniform_inside_a_part() -> None:
    made, num = importance(), 20_000
    place, columns = made.draw(0, num, torch.Generator().manual_seed(0))
    counts = torch.bincount(columns[TIMESTEP_BIN], minlength=BINS) / num
    assert counts.tolist() == pytest.approx(made.shares, abs=0.01)
    assert torch.equal((place * BINS).long(), columns[TIMESTEP_BIN])
    inside = (place * BINS).frac()
    assert float(inside.mean()) == pytest.approx(0.5, abs=0.01) and float(inside.var()) == pytest.approx(
        1 / 12, abs=0.005
    )
    assert float(columns[LOSS_WEIGHT].max()) <= 1 / made.spec.floor + 1e-6


def gradients(loss: str, made: TimestepImportance, num_levels: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected gradient of draws, summed over every level with its probability; and that of the distribution itself."""
    task, (_, columns) = NoisyToy(), made.draw(0, 2000, torch.Generator().manual_seed(0))
    weight_of = {int(b): w for b, w in zip(columns[TIMESTEP_BIN], columns[LOSS_WEIGHT], strict=True)}
    teacher, student = toy_teacher(), toy_student()
    batch, terms = task.validation_batches(3)[0], (LossSpec(loss),)
    expected, wanted = torch.zeros(()), torch.zeros(())
    for level in range(num_levels):
        place, number = torch.full((3,), (level + 0.5) / num_levels, dtype=torch.float64), level * BINS // num_levels
        inputs = task.make_inputs_at(batch, place, torch.Generator().manual_seed(level))
        weighted = {**inputs, LOSS_WEIGHT: weight_of[number].expand(3)}
        for columns_of, probability in ((weighted, made.shares[number] * BINS / num_levels), (inputs, 1 / num_levels)):
            student.zero_grad()
            with torch.no_grad():
                theirs = task.predict(teacher, columns_of)
            task.loss(task.predict(student, columns_of), theirs, columns_of, terms).backward()
            gradient = torch.cat([p.grad.flatten().double() for p in student.parameters()])
            if columns_of is weighted:
                expected = expected + probability * gradient
            else:
                wanted = wanted + probability * gradient
    return expected, wanted


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_the_expected_gradient_is_that_of_the_distribution(loss: str) -> None:
    expected, wanted = gradients(loss, importance())
    assert torch.allclose(expected, wanted, rtol=1e-5, atol=1e-7)


def test_without_weighting_the_gradient_is_another() -> None:
    expected, wanted = gradients("mse", importance(weighting="none"))
    assert float((expected - wanted).norm() / wanted.norm()) > 0.1


def test_a_part_that_is_drawn_again_after_its_step_is_the_same() -> None:
    """A step that ran out of memory is computed again, and an automatic schedule measures its batch once more."""
    task, spec, made = NoisyToy(), toy_spec(timestep_importance=TimestepImportanceSpec(BINS)), importance()
    batch = task.validation_batches(4)[0]
    first = part_inputs(task, spec, 3, 0, batch, made)
    made.update_([[9.0, 0.0, 0.0, 0.0, 1, 0, 0, 0]])
    again, later = part_inputs(task, spec, 3, 0, batch, made), part_inputs(task, spec, 4, 0, batch, made)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(later["x"], first["x"])


def distiller(folder: Path, task: Any = None, on_step: Any = lambda record: None, **changes: Any) -> Distiller:
    values = {"timestep_importance": TimestepImportanceSpec(BINS), "batch_size": 8, **changes}
    stages = ScheduleSpec("constant").resolve(4, 12)
    return Distiller(
        task or NoisyToy(), toy_teacher(), toy_student(), stages, toy_spec(**values), folder, on_step=on_step
    )


def crash(record: Any) -> None:
    if record.step == 9:
        raise RuntimeError("crash")


@pytest.mark.parametrize("options", [{}, {"accumulation": 2, "on_out_of_memory": "split"}], ids=["plain", "parts"])
def test_an_interrupted_run_ends_bitwise_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = distiller(tmp_path / "whole", **options)
    whole.run()
    with pytest.raises(RuntimeError, match="crash"):
        distiller(tmp_path / "cut", on_step=crash, **options).run()
    resumed = distiller(tmp_path / "cut", **options)
    resumed.run()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], value), name
    logs = [[e for e in read_log(tmp_path / name) if e["event"] == "timesteps"] for name in ("whole", "cut")]
    assert logs[0] == logs[1] and [event["step"] for event in logs[0]] == [4, 9, 11]
    shares = list(logs[0][-1]["shares"].values())
    assert sum(shares) == pytest.approx(1) and max(shares) > 1.2 * min(shares)


def test_a_step_in_pieces_notes_the_errors_of_the_whole(tmp_path: Path) -> None:
    whole = distiller(tmp_path / "a", autocast="none")
    pieces = distiller(tmp_path / "b", autocast="none", on_out_of_memory="split")
    pieces.micro_batch.num_splits = 4
    for one in (whole, pieces):
        one.run()
    means = [one._gradients.importance.state_dict()["means"] for one in (whole, pieces)]
    assert means[0] == pytest.approx(means[1], rel=1e-2)


def test_a_task_without_noise_levels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.timestep_importance = 'set' .* null or auto for ToyTask.*Fix: remove"
    ):
        distiller(tmp_path, ToyTask())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bins": 1}, r"bins = 1 .* 2 or more"),
        ({"momentum": 1.0}, r"momentum = 1.0 .*\[0, 1\)"),
        ({"floor": 0.0}, "floor = 0.0 .* more than 0"),
        ({"weighting": "half"}, "weighting = 'half' .* importance, none"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimestepImportanceSpec(**changes)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("gemma-2-2b-it-tiny", (), "null or auto for task language, which has no timesteps"),
        ("speecht5-tiny", (), "null or auto for task text-to-speech, which has no timesteps"),
        ("color-digits", ("data.learn_from=sampling_path",), "null or auto for data.learn_from: sampling_path"),
        ("color-digits", ("train.teacher.outputs=recorded",), "computed with train.timestep_importance"),
    ],
)
def test_recipes_without_levels_to_draw_are_refused(recipe: str, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, ("train.timestep_importance={}", *settings))


def test_automatic_draws_are_where_training_draws_levels() -> None:
    made = make_importance(NoisyToy(), "auto")
    assert made is not None and made.spec == TimestepImportanceSpec()
    assert make_importance(NoisyToy(), "auto", is_recorded=True) is None
    assert make_importance(ToyTask(), "auto") is None


class PathsToy(NoisyToy):
    draws_noise_levels = False


@pytest.mark.parametrize(
    ("task", "spec", "is_recorded", "phrase"),
    [
        (NoisyToy(), "auto", False, "drawn by the student's error, in 16 parts, with losses weighted back"),
        (
            NoisyToy(),
            TimestepImportanceSpec(bins=4, weighting="none"),
            False,
            "drawn by the student's error, in 4 parts, with losses not weighted back",
        ),
        (
            NoisyToy(),
            "auto",
            True,
            "not drawn by the student's error, which recorded outputs of the teacher cannot follow",
        ),
        (PathsToy(), "auto", False, "those of the sampling paths, not drawn by the student's error"),
        (PathsToy(), "auto", True, "those of the sampling paths, not drawn by the student's error"),
    ],
)
def test_how_levels_are_drawn_can_be_told(task: Any, spec: Any, is_recorded: bool, phrase: str) -> None:
    assert importance_phrase(task, spec, is_recorded=is_recorded) == f"noise levels are {phrase}"


def test_nothing_is_told_of_levels_that_nobody_asks_for_or_that_there_are_none_of() -> None:
    assert importance_phrase(NoisyToy(), None) is None
    assert importance_phrase(ToyTask(), "auto") is None


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("gemma-2-2b-it-tiny", ()),
        ("speecht5-tiny", ()),
        ("color-digits", ("data.learn_from=sampling_path",)),
        ("color-digits", ("train.teacher.outputs=recorded",)),
    ],
)
def test_automatic_draws_are_allowed_everywhere(recipe: str, settings: tuple[str, ...]) -> None:
    assert load_recipe(recipe, ("train.timestep_importance=auto", *settings)).train.timestep_importance == "auto"


@pytest.mark.parametrize(("before", "after"), [("recorded", "computed"), ("computed", "recorded")])
def test_automatic_draws_do_not_change_in_the_middle_of_a_run(tmp_path: Path, before: Any, after: Any) -> None:
    settings: dict[str, Any] = {"timestep_importance": "auto", "checkpoint_every": 2}
    with pytest.raises(RuntimeError, match="crash"):
        distiller(tmp_path, on_step=crash, teacher=TeacherSpec(outputs=before), **settings).run()
    with pytest.raises(
        CheckpointError, match=r"noise levels are drawn by .* Fix: set train\.timestep_importance as it was"
    ):
        distiller(tmp_path, teacher=TeacherSpec(outputs=after), **settings).run()


def test_what_automatic_draws_are_is_part_of_what_a_checkpoint_must_share() -> None:
    def found(recipe: str, *settings: str) -> Any:
        return load_recipe(recipe, settings).fingerprint()["train"]["timestep_importance"]

    auto, recorded = "train.timestep_importance=auto", "train.teacher.outputs=recorded"
    assert found("color-digits", auto) == "auto"
    assert found("color-digits", auto, recorded) is None
    assert found("color-digits", auto, "data.learn_from=sampling_path") is None
    assert found("gemma-2-2b-it-tiny", auto) is None


def test_a_word_that_is_no_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.timestep_importance"):
        load_recipe("color-digits", ("train.timestep_importance=always",))
