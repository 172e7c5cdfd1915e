"""Laws of the memory options as recipes and commands have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import SHORT, TINY

from fraqat import workflows
from fraqat.config import load_recipe
from fraqat.distill import StoredWeight
from fraqat.errors import ConfigError
from fraqat.workflows import SilentProgress
from fraqat.workflows.sessions import open_session

LEAN = (
    "train.teacher.dtype=int8",
    "train.optimizer=adamw_8bit",
    "train.activation_checkpointing=blocks",
)


def test_a_lean_run_trains_and_leaves_the_session_the_original_teacher(tmp_path: Path) -> None:
    recipe = load_recipe("color-digits", (*SHORT, *LEAN))
    session = open_session(recipe)
    original = {name: value.clone() for name, value in session.teacher.state_dict().items()}
    run = workflows.train(recipe, tmp_path / "run", SilentProgress(), with_baselines=True, session=session)
    assert run.is_finished
    assert not any(isinstance(module, StoredWeight) for module in session.teacher.modules())
    state = session.teacher.state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], original[name]) for name in original)


def test_arms_of_a_recipe_have_one_teacher() -> None:
    change = "baselines.vanilla-qat.train.teacher={dtype: int8}"
    with pytest.raises(ConfigError, match=r"baselines.vanilla-qat.train.teacher = .*int8.* fix|Fix: remove it"):
        load_recipe("color-digits", (*TINY, change))


@pytest.mark.usefixtures("one_block")
def test_a_plan_shows_what_an_option_saves(fraqat) -> None:
    def optimizer(*settings: str) -> dict[str, float]:
        options = [text for setting in settings for text in ("--set", setting)]
        outcome = fraqat("plan", "color-digits", "--json", *options)
        assert outcome.code == 0, outcome.err
        rows = json.loads(outcome.out)["tables"][0]["rows"]
        return {row["quantity"]: row["value"] for row in rows if "optimizer" in row["quantity"]}

    plain, small = optimizer(), optimizer("train.optimizer=adamw_8bit")
    hosted = optimizer("train.optimizer_device=host")
    assert 0.24 < small["memory: optimizer"] / plain["memory: optimizer"] < 0.3
    assert hosted["memory: optimizer"] == 0
    assert hosted["memory of the host: optimizer"] == pytest.approx(2 * plain["memory: optimizer"], rel=0.01)


def test_an_unknown_option_is_named(fraqat) -> None:
    outcome = fraqat("plan", "color-digits", "--set", "train.teacher.dtype=int4")
    assert outcome.code == 2
    assert "train.teacher.dtype" in outcome.err
    assert "int8" in outcome.err
