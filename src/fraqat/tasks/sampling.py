"""Samples images from a pipeline with any transformer of its class."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fraqat.tasks.conditioning import call_pipeline
from fraqat.tasks.spec import SamplerSpec


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    transformer: nn.Module,
    prompts: Sequence[str],
    sampler: SamplerSpec,
    *,
    seed: int,
    batch_size: int = 64,
    on_done: Callable[[int], None] = lambda num_done: None,
) -> Tensor:
    """Samples one image per prompt; image i starts from noise of seed `seed + i`, whatever the batch size.

    Args:
        pipeline: Everything but the transformer.
        transformer: The teacher or a student of the same class.
        prompts: N prompts.
        sampler: Steps, guidance, size.
        seed: Seed of the first image.
        batch_size: Images computed at a time.
        on_done: Called with the number of finished images after every batch.

    Returns:
        [N, 3, height, width] float32 in [0, 1]; of a video the first frame.
    """
    parts: list[Tensor] = []
    with _swapped_transformer(pipeline, transformer):
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            output = call_pipeline(
                pipeline,
                part,
                sampler,
                guidance_scale=sampler.guidance_scale,
                generators=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
                output_type="pt",
            )
            images = output.images if hasattr(output, "images") else output.frames[:, 0]
            parts.append(images.float().cpu())
            on_done(start + len(part))
    return torch.cat(parts)


@contextmanager
def _swapped_transformer(pipeline: DiffusionPipeline, transformer: nn.Module) -> Generator[None]:
    """Puts another transformer into the pipeline while the block runs."""
    call = cast(Any, pipeline)
    original = call.transformer
    call.transformer = transformer
    try:
        yield
    finally:
        call.transformer = original
