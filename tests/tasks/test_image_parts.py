"""A pipeline as numbers: sampler and tokenizers give what the pipeline itself gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fraqat.config import load_recipe
from fraqat.errors import ModelError
from fraqat.tasks.conditioning import PromptEncoder, call_pipeline
from fraqat.tasks.diffusion import predict_output
from fraqat.tasks.image_parts import (
    SamplerSteps,
    TextEncoderCall,
    sampler_steps,
    tokenize,
    tokenizer_facts,
    with_arguments,
)
from fraqat.tasks.pipelines import load_pipeline
from fraqat.tasks.tokenizer_files import tokenizer_json
from fraqat.workflows.sessions import open_session

pytestmark = pytest.mark.xdist_group("diffusion")
PROMPT = "a green three on yellow"
RECIPES = ("color-digits", "pixart-sigma-tiny", "sd3.5-medium-tiny", "flux-schnell-tiny")


def opened(name: str) -> tuple[Any, Any]:
    """Pipeline and sampler of a recipe, in four steps."""
    recipe = load_recipe(name, ("sampler.num_steps=4",))
    return load_pipeline(open_session(recipe).model_spec), recipe.sampler


def sampled(pipeline: Any, steps: SamplerSteps, conditioning: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Latents as a program without the pipeline computes them."""
    known, num = [noise], 1 if steps.guidance_scale == 1 else 2
    for row, time in zip(steps.coefficients, steps.timesteps, strict=False):
        latents = sum(weight * part for weight, part in zip(row, known, strict=False))
        inputs = {"hidden_states": latents.expand(num, *noise.shape[1:]), "timestep": torch.full((num,), time)}
        with torch.no_grad():
            found = predict_output(pipeline.transformer, {**inputs, **conditioning})["output"]
        known.append(found[:1] if num == 1 else found[1:] + steps.guidance_scale * (found[:1] - found[1:]))
    return sum(weight * part for weight, part in zip(steps.coefficients[-1], known, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_sampling_by_coefficients_equals_the_pipeline(name: str, sqnr_db: Any) -> None:
    pipeline, sampler = opened(name)
    encoder = PromptEncoder(pipeline, sampler)
    steps = sampler_steps(pipeline, sampler, encoder.latent_shape)
    facts = tokenizer_facts(pipeline, sampler)
    prompts = [PROMPT] if steps.guidance_scale == 1 else [PROMPT, ""]
    call = TextEncoderCall(pipeline, sampler, tuple(encoder.empty), encoder.latent_shape)
    found = call(**tokenize(pipeline, facts, prompts))
    conditioning = dict(zip(encoder.empty, found, strict=True))
    for column, value in encoder.encode(prompts).items():
        assert sqnr_db(value.double(), conditioning[column].double()) > 100
    noise = torch.randn(1, *encoder.latent_shape)
    with torch.no_grad():
        wanted = call_pipeline(
            pipeline,
            [PROMPT],
            with_arguments(sampler, latents=noise),
            guidance_scale=sampler.guidance_scale,
            generators=[torch.Generator()],
            output_type="latent",
        ).images
    assert sqnr_db(wanted, sampled(pipeline, steps, {**conditioning, **encoder.constants}, noise)) > 90


def test_random_scheduler_is_refused() -> None:
    pipeline, sampler = opened("sd3.5-medium-tiny")
    shape = PromptEncoder(pipeline, sampler).latent_shape
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, stochastic_sampling=True
    )
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler cannot be written down as numbers"):
        sampler_steps(pipeline, sampler, shape)


def test_prompt_that_the_pipeline_rewrites_is_refused() -> None:
    pipeline, sampler = opened("color-digits")
    pipeline._text_preprocessing = lambda text, **arguments: [f"a photo of {each}" for each in text]
    with pytest.raises(ModelError, match="only spaces and case may change"):
        tokenizer_facts(pipeline, sampler)


def test_tokenizer_file_has_no_padding_of_earlier_calls() -> None:
    pipeline, sampler = opened("color-digits")
    tokenizer_facts(pipeline, sampler)
    values = json.loads(tokenizer_json(pipeline.tokenizer))
    assert values["padding"] is None
    assert values["truncation"] is None
    assert values["model"]["vocab"]["seven"]


def test_tokenizer_without_a_file_is_refused() -> None:
    with pytest.raises(ModelError, match=r"object cannot be written as tokenizer\.json"):
        tokenizer_json(object())
