"""The parts of a text-to-image pipeline that are exported as graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fraqat.config import ImageRecipe
from fraqat.data.prompts import choose_prompts
from fraqat.export import Inputs, Part
from fraqat.workflows.sessions.base import resolve_source

if TYPE_CHECKING:
    from fraqat.tasks.conditioning import PromptEncoder
    from fraqat.tasks.diffusion import DiffusionTask

_GRAPH_BATCH = 4
_NUM_BATCHES = 2


def image_parts(student: nn.Module, recipe: ImageRecipe, task: DiffusionTask) -> tuple[Part, ...]:
    """`transformer`, and with a picture's autoencoder `text_encoder` and `decoder`.

    Args:
        student: The transformer.
        recipe: Gives pipeline, sampler and prompts.
        task: Gives inputs.
    """
    from fraqat.tasks.conditioning import PromptEncoder
    from fraqat.tasks.image_parts import has_image_decoder
    from fraqat.tasks.pipelines import load_pipeline

    spec = dataclasses.replace(resolve_source(recipe.model), device="cpu")
    pipeline = load_pipeline(spec, dtype=torch.float32, transformer=student)
    if not has_image_decoder(pipeline):
        return (_transformer(student, recipe, task, {}),)
    encoder = PromptEncoder(pipeline, recipe.sampler)
    constants = _sampling_constants(recipe, pipeline, encoder)
    return (
        _transformer(student, recipe, task, constants),
        _text_encoder(recipe, pipeline, encoder),
        _decoder(recipe, task, pipeline, encoder.latent_shape),
    )


def _transformer(student: nn.Module, recipe: ImageRecipe, task: DiffusionTask, constants: dict[str, Any]) -> Part:
    from fraqat.tasks.diffusion import OUTPUT, NamedTransformer

    num_samples = recipe.train.calibration_samples

    def batches() -> list[Inputs]:
        return [dict(batch) for batch in task.calibration_batches(num_samples, _GRAPH_BATCH)]

    names = [name for name in batches()[0] if name not in task.shared_arguments]
    axes = {name: {0: "batch"} for name in names}
    return Part("transformer", NamedTransformer(student), (OUTPUT,), batches, axes, constants)


def _sampling_constants(recipe: ImageRecipe, pipeline: Any, encoder: PromptEncoder) -> dict[str, Any]:
    from fraqat.tasks.image_parts import sampler_steps

    steps = sampler_steps(pipeline, recipe.sampler, encoder.latent_shape)
    shared = {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
        for name, value in encoder.constants.items()
    }
    return {**steps.constants(), "shared_inputs": shared}


def _text_encoder(recipe: ImageRecipe, pipeline: Any, encoder: PromptEncoder) -> Part:
    from fraqat.tasks.image_parts import TextEncoderCall, tokenize, tokenizer_facts

    facts = tokenizer_facts(pipeline, recipe.sampler)
    outputs = tuple(encoder.empty)
    names = [f"{fact.name}.{kind}" for fact in facts for kind in fact.inputs]

    def batches() -> list[Inputs]:
        prompts = _prompts(recipe)
        rows = [prompts[i : i + _GRAPH_BATCH] for i in range(0, len(prompts), _GRAPH_BATCH)]
        return [tokenize(pipeline, facts, each) for each in rows]

    return Part(
        name="text_encoder",
        module=TextEncoderCall(pipeline, recipe.sampler, outputs, encoder.latent_shape),
        outputs=outputs,
        batches=batches,
        dynamic_axes={name: {0: "batch"} for name in names},
        constants={"tokenizers": {fact.name: fact.constants() for fact in facts}, "negative_prompt": ""},
        files={fact.file: fact.json.encode() for fact in facts},
    )


def _prompts(recipe: ImageRecipe) -> Sequence[str]:
    """A few prompts, the empty one among them."""
    from fraqat.data.captioned import held_out_prompts

    num, listed = _GRAPH_BATCH * _NUM_BATCHES - 1, recipe.evaluation.prompts
    chosen = choose_prompts(listed, num) if listed else held_out_prompts(recipe.data, num)
    return [*chosen, *[""] * (num + 1 - len(chosen))]


def _decoder(recipe: ImageRecipe, task: DiffusionTask, pipeline: Any, latent_shape: Sequence[int]) -> Part:
    from fraqat.tasks.image_parts import DecoderCall

    def batches() -> list[Inputs]:
        rows = _some_latents(task, latent_shape)
        return [{"latents": rows[i : i + _GRAPH_BATCH]} for i in range(0, len(rows), _GRAPH_BATCH)]

    return Part(
        name="decoder",
        module=DecoderCall(pipeline, recipe.sampler),
        outputs=("image",),
        batches=batches,
        dynamic_axes={"latents": {0: "batch"}},
    )


def _some_latents(task: DiffusionTask, latent_shape: Sequence[int]) -> Tensor:
    """Noisy latents of the calibration data: what a decoder gets is not worse."""
    from fraqat.tasks.conditioning import LATENTS

    batches = task.calibration_batches(_GRAPH_BATCH * _NUM_BATCHES, _GRAPH_BATCH)
    return torch.cat([batch[LATENTS] for batch in batches]).float().reshape(-1, *latent_shape)
