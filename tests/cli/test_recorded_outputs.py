"""Laws of recorded outputs of the teacher as recipes and commands have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SHORT, SHORT_ARGUMENTS, TINY, TINY_ARGUMENTS

from fraqat import workflows
from fraqat.config import load_recipe
from fraqat.distill import StepRecord, read_log
from fraqat.errors import ConfigError
from fraqat.workflows import RunFolder, SilentProgress
from fraqat.workflows.sessions import open_session

RECORDED = "train.teacher.outputs=recorded"


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(e["event"], e["step"], e["loss"]) for e in read_log(folder) if e["event"] in ("step", "validation")]


@pytest.mark.xdist_group("cli")  # one worker makes the finished run
def test_a_run_with_baselines_records_the_outputs_of_each_and_is_the_same(finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe("color-digits", (*TINY, RECORDED))
    assert recipe.fingerprint() == RunFolder(finished).recipe().fingerprint()
    session = open_session(recipe)
    original = {name: value.clone() for name, value in session.teacher.state_dict().items()}
    run = workflows.train(recipe, tmp_path / "run", SilentProgress(), with_baselines=True, session=session)
    for name in (".", *(f"baselines/{name}" for name in recipe.baselines)):
        assert losses(run.path / name) == losses(finished / name)
        assert not (run.path / name / "teacher_outputs").exists()
    results = [json.loads((folder / "result.json").read_text()) for folder in (run.path, finished)]
    assert results[0]["validation_loss"] == results[1]["validation_loss"]
    layers = [json.loads((folder / "layers.json").read_text()) for folder in (run.path, finished)]
    assert layers[0] == layers[1]
    state = session.teacher.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.items())


def test_a_run_that_fails_leaves_the_session_a_teacher(tmp_path: Path) -> None:
    class Failing(SilentProgress):
        def step(self, record: StepRecord) -> None:
            raise KeyError("failed")

    recipe = load_recipe("color-digits", (*SHORT, RECORDED))
    session = open_session(recipe)
    with pytest.raises(KeyError, match="failed"):
        workflows.train(recipe, tmp_path / "run", Failing(), session=session)
    assert (tmp_path / "run" / "teacher_outputs" / "manifest.json").is_file()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in session.teacher.parameters())


def test_pictures_that_are_encoded_while_training_have_recorded_outputs(tmp_path: Path) -> None:
    settings = (*SHORT, "baselines={}", "data.cache=false", "train.batch_size=4")
    for outputs in ("computed", "recorded"):
        recipe = load_recipe("color-digits", (*settings, f"train.teacher.outputs={outputs}"))
        workflows.train(recipe, tmp_path / outputs, SilentProgress())
    assert losses(tmp_path / "recorded") == losses(tmp_path / "computed")


def test_an_automatic_schedule_is_refused_when_a_recipe_is_read() -> None:
    with pytest.raises(
        ConfigError, match=r"train.teacher.outputs = 'recorded' .* computed with schedule.kind: automatic"
    ):
        load_recipe("color-digits", (*TINY, RECORDED, "schedule={kind: automatic}", "train.steps=90"))


def test_a_comparison_refuses_other_programs(fraqat, tmp_path: Path) -> None:
    arguments = ("--set", RECORDED, "--out", tmp_path / "compared", "--methods", "fraqat,torchao-qat")
    outcome = fraqat("compare", "color-digits", *TINY_ARGUMENTS, *arguments)
    assert outcome.code == 2
    assert "computed for method torchao-qat" in outcome.err
    assert not (tmp_path / "compared").exists()


def test_a_comparison_of_our_methods_leaves_no_outputs_and_is_the_same(fraqat, tmp_path: Path) -> None:
    found: list[Any] = []
    for outputs in ("computed", "recorded"):
        setting = f"train.teacher={{dtype: int8, outputs: {outputs}}}"
        arguments = ("--methods", "dynamic,vanilla-qat", "--seeds", "1", "--rates", "1e-3", "--quiet", "--json")
        folder = tmp_path / outputs
        outcome = fraqat("compare", "color-digits", *SHORT_ARGUMENTS, "--set", setting, "--out", folder, *arguments)
        assert outcome.code == 0, outcome.err
        methods = json.loads((folder / "comparison.json").read_text())["methods"]
        found.append([[(r["choice_loss"], r["test_loss"]) for r in method["records"]] for method in methods])
        assert not list(folder.rglob("teacher_outputs"))
    assert found[0] == found[1]


@pytest.mark.usefixtures("one_block")
def test_a_plan_counts_recorded_outputs(fraqat) -> None:
    def rows(*settings: str) -> dict[str, Any]:
        options = [text for setting in settings for text in ("--set", setting)]
        outcome = fraqat("plan", "color-digits", "--json", *options)
        assert outcome.code == 0, outcome.err
        return {row["quantity"]: row["value"] for row in json.loads(outcome.out)["tables"][0]["rows"]}

    computed, recorded = rows(), rows(RECORDED)
    assert recorded["memory: teacher"] == 0 < computed["memory: teacher"]
    assert recorded["memory in all"] < computed["memory in all"]
    recipe = load_recipe("color-digits")
    samples = recipe.train.steps * recipe.train.batch_size + 2 * recipe.data.num_validation  # held-out ones in float32
    latents = 4 * 16 * 16
    assert recorded["disk: outputs of the teacher"] * 2**30 == pytest.approx(samples * latents * 2, rel=0.6)
