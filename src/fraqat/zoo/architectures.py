"""The table of what differs between the architectures of the colour-digits pipelines; they share everything else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from fraqat.data.color_digits import IMAGE_SIZE
from fraqat.zoo.color_digits_models import LATENT_CHANNELS, LATENT_SIZE, build_flux, build_pixart, build_sana, build_sd3
from fraqat.zoo.objectives import FlowMatching, Objective, VelocityPrediction
from fraqat.zoo.text_models import CAPTION_TOKENS

Pipeline = Any
"""A diffusers pipeline; their own annotations leave out what their parts and calls return."""

_FLUX: Any = FluxPipeline  # whose static methods that pack latents have the names of private ones

Conditions = Mapping[str, Tensor]
"""Arguments of a transformer that come from the captions, one row for each."""


@dataclass(frozen=True)
class SamplerSettings:
    """How pictures are sampled.

    Args:
        num_steps: denoising steps.
        guidance_scale: weight of classifier-free guidance; above 1 it is on.
        seed: seed of the initial noise.
    """

    num_steps: int
    guidance_scale: float
    seed: int = 0


@dataclass(frozen=True)
class Distillation:
    """How a few-step model is made of its own many-step teacher.

    Args:
        num_pairs: pictures that the teacher draws.
        teacher_steps: its denoising steps.
        teacher_guidance: its classifier-free guidance, which the few-step model then has built in.
        sampler_sigmas: noise levels that the few-step sampler visits.
        num_steps: optimiser steps.
        learning_rate: peak learning rate.
    """

    num_pairs: int
    teacher_steps: int
    teacher_guidance: float
    sampler_sigmas: tuple[float, ...]
    num_steps: int
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        title: what the model card calls it.
        build: builds the untrained pipeline.
        text_encoders: names of the pipeline's text encoders, which are trained with the transformer.
        conditions: the pipeline and N captions to arguments of the transformer.
        level_scale: what the transformer's timestep is for a noise level of 1.
        objective: from the pipeline, what to train.
        num_steps: optimiser steps.
        num_text_steps: in how many of them the text encoders are trained too; None is in all.
        batch_size: latents per step.
        autoencoder_steps: optimiser steps of the autoencoder, where no other architecture has trained it before.
        autoencoder_batch_size: pictures per step of the autoencoder.
        shifts_latents: whether the pipeline takes the mean off the latents before it scales them.
        sampler: recommended settings.
        default_call: the settings of a call that names none.
        arguments: arguments that a call of the pipeline needs besides prompt and sampler settings.
        packed: whether the transformer takes 2x2 patches of latents as a sequence.
        distillation: how the model is made fast; None where it is not.
    """

    title: str
    build: Callable[[], Pipeline]
    text_encoders: tuple[str, ...]
    conditions: Callable[[Pipeline, Sequence[str]], Conditions]
    objective: Callable[[Pipeline], Objective]
    num_steps: int
    sampler: SamplerSettings
    default_call: SamplerSettings
    arguments: Mapping[str, Any]
    level_scale: float = 1000.0
    num_text_steps: int | None = None
    batch_size: int = 64
    autoencoder_steps: int = 1400
    autoencoder_batch_size: int = 32
    shifts_latents: bool = True
    packed: bool = False
    distillation: Distillation | None = None

    def denoise(self, pipeline: Pipeline, noisy: Tensor, level: Tensor, conditions: Conditions) -> Tensor:
        """Runs the transformer.

        Args:
            pipeline: the pipeline.
            noisy: noisy latents, [N, C, H, W].
            level: noise levels as the objective counts them, [N].
            conditions: what `conditions` returned for the N captions.

        Returns:
            Its output, [N, C or 2 C, H, W].
        """
        arguments = {**conditions, "timestep": level * self.level_scale, "return_dict": False}
        if not self.packed:
            return pipeline.transformer(noisy, **arguments)[0]
        height, width = noisy.shape[2:]
        patches = _FLUX._pack_latents(noisy, *noisy.shape)
        places = _FLUX._prepare_latent_image_ids(0, height // 2, width // 2, noisy.device, torch.float32)
        text_places = torch.zeros(conditions["encoder_hidden_states"].shape[1], 3)
        output = pipeline.transformer(patches, img_ids=places, txt_ids=text_places, **arguments)[0]
        scale = pipeline.vae_scale_factor
        return _FLUX._unpack_latents(output, height * scale, width * scale, scale)

    def initial_noise(self, count: int, seed: int) -> Tensor:
        """Draws the latents that sampling starts from.

        Args:
            count: how many, N.
            seed: seed of the generator.

        Returns:
            As the pipeline's argument `latents` wants them: [N, 8, 8, 8], or [N, 16, 32] where they are packed.
        """
        shape = (count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return _FLUX._pack_latents(noise, *shape) if self.packed else noise


def _sana_conditions(pipeline: Pipeline, prompts: Sequence[str]) -> Conditions:
    hidden, mask, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=CAPTION_TOKENS
    )
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def _sd3_conditions(pipeline: Pipeline, prompts: Sequence[str]) -> Conditions:
    hidden, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=CAPTION_TOKENS
    )
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def _pixart_conditions(pipeline: Pipeline, prompts: Sequence[str]) -> Conditions:
    hidden, mask, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=CAPTION_TOKENS
    )
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def _flux_conditions(pipeline: Pipeline, prompts: Sequence[str]) -> Conditions:
    hidden, pooled, _ = pipeline.encode_prompt(list(prompts), None, max_sequence_length=CAPTION_TOKENS)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


_SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}

ARCHITECTURES: dict[str, Architecture] = {
    "sana": Architecture(
        title="Sana",
        build=build_sana,
        text_encoders=("text_encoder",),
        conditions=_sana_conditions,
        objective=lambda _: FlowMatching(),
        num_steps=4000,
        autoencoder_steps=1500,
        autoencoder_batch_size=64,
        shifts_latents=False,
        sampler=SamplerSettings(12, 4.5),
        default_call=SamplerSettings(20, 4.5),
        arguments={
            **_SIZE,
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
    ),
    "sd3": Architecture(
        title="Stable Diffusion 3",
        build=build_sd3,
        text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        conditions=_sd3_conditions,
        objective=lambda _: FlowMatching(centre=0.8),
        num_steps=6000,
        num_text_steps=1500,
        sampler=SamplerSettings(12, 4.0),
        default_call=SamplerSettings(28, 7.0),
        arguments={**_SIZE, "max_sequence_length": CAPTION_TOKENS},
    ),
    "pixart": Architecture(
        title="PixArt-Sigma",
        build=build_pixart,
        text_encoders=("text_encoder",),
        conditions=_pixart_conditions,
        level_scale=1,
        shifts_latents=False,
        objective=lambda pipeline: VelocityPrediction(pipeline.scheduler.betas),
        num_steps=6000,
        num_text_steps=1500,
        sampler=SamplerSettings(12, 4.0),
        default_call=SamplerSettings(20, 4.5),
        arguments={
            **_SIZE,
            "max_sequence_length": CAPTION_TOKENS,
            "use_resolution_binning": False,
            "clean_caption": False,
        },
    ),
    "flux": Architecture(
        title="FLUX.1-schnell",
        build=build_flux,
        text_encoders=("text_encoder", "text_encoder_2"),
        conditions=_flux_conditions,
        level_scale=1.0,
        objective=lambda _: FlowMatching(centre=0.8),
        num_steps=5400,
        num_text_steps=1500,
        sampler=SamplerSettings(4, 0.0),
        default_call=SamplerSettings(28, 3.5),
        arguments={**_SIZE, "max_sequence_length": CAPTION_TOKENS},
        packed=True,
        distillation=Distillation(
            num_pairs=5_000,
            teacher_steps=12,
            teacher_guidance=5.0,
            sampler_sigmas=(1.0, 0.75, 0.5, 0.25),
            num_steps=1200,
        ),
    ),
}
