"""Every recipe is dry-run at full size, without weights or network."""

from __future__ import annotations

import pytest

from fraqat.config import load_recipe, recipe_names
from fraqat.workflows import layers, open_session, stages

FULL_SIZE = {  # recipe -> billions of parameters of the part that is quantized, as published
    "sd3.5-medium": 2.2,
    "sana-600m": 0.6,
    "pixart-sigma": 0.6,
    "flux-schnell": 12.0,
    "gemma-2-2b-it": 2.6,
    "speecht5": 0.14,
}


def test_every_full_size_recipe_has_a_tiny_twin() -> None:
    assert set(recipe_names()) == {*FULL_SIZE, *(f"{name}-tiny" for name in FULL_SIZE), "color-digits"}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_layers_are_right_without_weights(name: str) -> None:
    recipe = load_recipe(name)
    report = layers(recipe)
    assert report.num_model_parameters == pytest.approx(FULL_SIZE[name] * 1e9, rel=0.05)
    assert report.num_quantized_weights > 0.7 * report.num_model_parameters
    families = {row.family for row in report.quantized}
    assert {"FF", "Attn"} <= families
    labels = {row.name: row.spec.activation.bits for row in report.quantized if row.spec and row.spec.activation}
    wide = [layer for layer, bits in labels.items() if bits == 16]
    if recipe.task == "language":
        assert wide == []
        assert [row.name for row in report.rows if row.spec is None] == ["lm_head"]
    else:
        assert len(wide) == 1
        assert wide[0].endswith(("proj_out", "feat_out"))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_schedules_are_the_papers(name: str) -> None:
    table = stages(load_recipe(name))
    main = [row for row in table.rows if row[0] == "fraqat"]
    assert [row[2] for row in main] == [8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4]
    lengths = [row[3] for row in main]
    assert lengths[-1] / sum(lengths) == pytest.approx(14 / 25, abs=0.01)
    vanilla = [row for row in table.rows if row[0] == "vanilla-qat"]
    assert [(row[2], row[3]) for row in vanilla] == [(4, sum(lengths))]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in FULL_SIZE])
def test_tiny_recipes_are_those_of_the_zoo(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model.source.startswith("zoo:")
    assert set(recipe.baselines) == {"dynamic", "vanilla-qat"}
    assert layers(recipe).quantized


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_tiny_twin_has_its_large_ones_architecture(name: str) -> None:
    large, tiny = (open_session(load_recipe(n)).known for n in (name, f"{name}-tiny"))
    assert large.class_name == tiny.class_name
