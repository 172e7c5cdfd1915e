"""`fraqat plan`: length and width."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import TINY_ARGUMENTS

pytestmark = pytest.mark.xdist_group("cli")  # one worker makes the finished run


@pytest.fixture(scope="module")
def pilots(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The finished run, and what it would have been at four thirds of its length."""
    folder = tmp_path_factory.mktemp("pilots") / "longer"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints", "samples", "export", "tensorboard"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  steps: 9\n", "  steps: 12\n", 1))
    result = json.loads((folder / "result.json").read_text())
    result |= {"num_steps": 12, "validation_loss": 0.85 * result["validation_loss"]}
    (folder / "result.json").write_text(json.dumps(result))
    return [finished, folder]


def test_length_and_width_are_further_tables(fraqat) -> None:
    options = ("--pretraining-tokens", "3e8", "--memory-budget", "0.0012", "--json")
    done = fraqat("plan", "pixart-sigma-tiny", *options)
    assert done.code == 0, done.err
    plan, law = json.loads(done.out)["tables"]
    assert plan["title"] == "Plan"
    rows = {row["bits"]: row for row in law["rows"]}
    assert 0 < rows[4.0]["best share"] < rows[2.0]["best share"] < 1
    assert rows[4.0]["best steps"] > 0
    assert rows[2.0]["fits"] and not rows[8.0]["fits"]
    assert any("2509.22935" in note for note in law["notes"])
    assert any("bits, which the law prefers" in note for note in law["notes"])


def test_pilots_predict_loss_and_length(fraqat, pilots: list[Path]) -> None:
    options = [text for path in pilots for text in ("--pilot", path)]
    settings = [*TINY_ARGUMENTS, "--set", "train.steps=18"]
    reached = json.loads((pilots[0] / "result.json").read_text())["validation_loss"]
    done = fraqat("plan", "color-digits", *settings, *options, "--target-loss", reached / 2, "--json")
    assert done.code == 0, done.err
    rows = {row["what"]: row for row in json.loads(done.out)["tables"][1]["rows"]}
    assert rows["planned run"]["steps"] == 18
    assert rows["planned run"]["held-out loss"] < reached
    assert rows["steps for the loss"]["steps"] > 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-loss", "0.1"), "--target-loss = 0.1 is not possible: allowed is a loss where pilots are given"),
        (("--memory-budget", "-1"), "--memory-budget = -1.0 is not possible: allowed is a positive number"),
        (("--pretraining-tokens", "nan"), "--pretraining-tokens = nan is not possible"),
        (("--pretraining-tokens", "5"), "--pretraining-tokens = 5.0 is not possible: allowed is more than"),
    ],
)
def test_impossible_questions_are_refused(fraqat, options: tuple[str, ...], message: str) -> None:
    done = fraqat("plan", "pixart-sigma-tiny", *options)
    assert done.code == 2
    assert message in done.err


def test_pilots_of_another_recipe_are_refused(fraqat, pilots: list[Path]) -> None:
    done = fraqat("plan", "color-digits", "--pilot", pilots[0])
    assert done.code == 2
    assert "differ in train.steps alone" in done.err
    assert "batch_size" in done.err


def test_a_pilot_that_is_no_run_is_refused(fraqat, tmp_path: Path) -> None:
    done = fraqat("plan", "color-digits", "--pilot", tmp_path)
    assert done.code == 3
    assert "is no run folder" in done.err
