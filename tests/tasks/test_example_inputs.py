"""What a plan calls a transformer with has the names and shapes of what its pipeline calls it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import tiny_sampler

from fraqat.tasks.conditioning import nested, record_calls
from fraqat.tasks.diffusion import predict_output
from fraqat.tasks.example_inputs import example_inputs
from fraqat.tasks.known import KNOWN_MODELS, describe_model


def test_names_and_shapes_are_those_of_the_pipeline(
    architecture_name: str, saved_pipeline: Callable[[str], Path], tiny_pipeline: Any
) -> None:
    sampler = tiny_sampler(architecture_name)
    known = describe_model(str(saved_pipeline(architecture_name)))
    expected = record_calls(tiny_pipeline, ["a", "b"], sampler, guidance_scale=1.0, num_calls=1)[0].tensors
    found = example_inputs(tiny_pipeline.transformer, known, sampler, 2, "cpu")
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    with torch.no_grad():
        output = tiny_pipeline.transformer(**nested(found), return_dict=False)[0]
    assert output.shape[0] == 2


def test_full_size_transformers_run_on_the_meta_device() -> None:
    from fraqat.config import load_recipe

    for name in ("sd3.5-medium", "sana-600m", "pixart-sigma", "flux-schnell"):
        recipe: Any = load_recipe(name)
        known = KNOWN_MODELS[recipe.model.source]
        transformer = known.build()
        inputs = example_inputs(transformer, known, recipe.sampler, 1)
        output = predict_output(transformer, inputs)["output"]
        assert output.shape == inputs["hidden_states"].shape
