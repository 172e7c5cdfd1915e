"""Presets: methods as defaults of a recipe."""

import pytest

from fraqat.config import load_values
from fraqat.errors import ConfigError
from fraqat.export import target_named
from fraqat.schedules import ScheduleSpec

IMAGE = {"model": {"source": "x"}, "sampler": {"height": 32, "width": 32}}


def test_a_preset_is_the_default_of_what_the_recipe_does_not_set() -> None:
    values = {"name": "own", "preset": "fraqat", **IMAGE, "train": {"steps": 50}}
    recipe = load_values(values)
    assert recipe.label == "fraqat"
    assert recipe.train.betas == (0.5, 0.999) and recipe.train.steps == 50
    assert recipe.quantization.weight.range_method == "learned"
    assert recipe.schedule.kind == "constant"
    changed = load_values(values | {"train": {"steps": 50, "betas": [0.8, 0.99]}})
    assert changed.train.betas == (0.8, 0.99)


def test_a_schedule_of_the_recipe_replaces_that_of_a_preset() -> None:
    values = {"name": "own", "preset": "final-grid", **IMAGE, "train": {"steps": 50}}
    assert load_values(values).schedule == ScheduleSpec("fractional", grid="final")
    assert load_values(values | {"schedule": {"kind": "simple"}}).schedule == ScheduleSpec("simple")


def test_the_paper_preset_is_the_paper() -> None:
    recipe = load_values({"name": "own", "preset": "paper", **IMAGE, "train": {"steps": 50}})
    assert recipe.quantization.weight.range_method == "max_abs"
    assert recipe.train.learning_rate.kind == "constant"
    assert [stage[0] for stage in recipe.schedule.lengths(4)] == [8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4]


def test_a_target_decides_before_a_preset() -> None:
    recipe = load_values({"name": "own", "preset": "fraqat", "target": "gguf", **IMAGE, "train": {"steps": 50}})
    assert recipe.quantization.weight.range_method == target_named("gguf").defaults["weight"].get(
        "range_method", "learned"
    )


@pytest.mark.parametrize("name", ["best", "torchao-qat", "lapq"])
def test_an_impossible_preset_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"preset.*{name}.*allowed"):
        load_values({"name": "own", "preset": name, **IMAGE, "train": {"steps": 50}})


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = load_values({"name": "own", "preset": "fraqat", **IMAGE, "train": {"steps": 50}})
    assert load_values(recipe.to_values()) == recipe
    assert recipe.with_method("vanilla-qat", {"schedule": {"kind": "constant"}}).schedule.grid == "own"
