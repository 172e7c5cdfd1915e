"""Pairs of noise and picture from a many-step teacher, which make a few-step student.

A student that learns to go straight from the noise to the picture that its teacher ends at has straight paths, which
few Euler steps follow well (rectified flow, https://arxiv.org/abs/2209.03003). The teacher's guidance is in the pairs
and so ends up in the student.
"""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fraqat.zoo.architectures import Architecture, Distillation, Pipeline
from fraqat.zoo.color_digits_models import LATENT_CHANNELS, LATENT_SIZE

_BATCH_SIZE = 128


@torch.no_grad()
def guided_flow(
    architecture: Architecture,
    pipeline: Pipeline,
    noise: Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """Follows the guided velocity from noise to latents in equal Euler steps.

    Args:
        architecture: the pipeline's row of the table; a flow model.
        pipeline: the pipeline.
        noise: [N, C, H, W].
        prompts: N captions.
        steps: how many steps.
        guidance: weight of classifier-free guidance.

    Returns:
        Latents, [N, C, H, W].
    """
    sample = noise
    sigmas = torch.linspace(1, 0, steps + 1)
    with torch.autocast("cpu", torch.bfloat16):
        conditions = architecture.conditions(pipeline, [*prompts, *[""] * len(prompts)])
    for sigma, following in pairwise(sigmas):
        with torch.autocast("cpu", torch.bfloat16):
            both = architecture.denoise(pipeline, sample.repeat(2, 1, 1, 1), sigma.expand(2 * len(noise)), conditions)
        wanted, empty = both.float().chunk(2)
        sample = sample + (following - sigma) * torch.lerp(empty, wanted, guidance)
    return sample


def teacher_pairs(
    architecture: Architecture,
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: Distillation,
    seed: int,
    file: Path,
) -> tuple[Tensor, Tensor]:
    """Draws the teacher's pictures, or reads those that an earlier run has drawn.

    Args:
        architecture: the pipeline's row of the table.
        pipeline: the teacher.
        prompts: captions, one for each pair.
        settings: how the teacher samples.
        seed: seed of the noise.
        file: where the pairs are kept, a safetensors file.

    Returns:
        Noise and latents, each [N, C, H, W].
    """
    noise = torch.randn(
        len(prompts), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed)
    )
    if not file.exists():
        start, parts = time.monotonic(), []
        for first in range(0, len(prompts), _BATCH_SIZE):
            chosen = slice(first, first + _BATCH_SIZE)
            parts.append(
                guided_flow(
                    architecture,
                    pipeline,
                    noise[chosen],
                    prompts[chosen],
                    steps=settings.teacher_steps,
                    guidance=settings.teacher_guidance,
                )
            )
            if len(parts) % 20 == 0:
                minutes = (time.monotonic() - start) / 60
                print(f"{first + _BATCH_SIZE}/{len(prompts)} pairs {minutes:.1f} min", flush=True)
        safetensors.torch.save_file({"latents": torch.cat(parts)}, file)
    return noise, safetensors.torch.load_file(file)["latents"]
