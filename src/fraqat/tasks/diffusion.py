"""Text-to-image diffusion transformers as a task for the trainer, and sampling from them.

Shape suffixes: N samples, C latent channels, H and W latent height and width, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fraqat.data.captioned import CaptionedImages, DataSpec, load_training_images, load_validation_images
from fraqat.data.loader import ShuffledBatches, TensorRows
from fraqat.distill import Batch
from fraqat.errors import config_error
from fraqat.tasks.families import NUM_TRAIN_TIMESTEPS, architecture_of
from fraqat.tasks.spec import SamplerSpec

_ENCODE_BATCH = 256


class DiffusionTask:
    """Distils the velocity prediction of a flow-matching transformer on encoded pictures.

    Latents and text embeddings are computed once, when they are first asked for.

    Args:
        pipeline: Gives the text encoder, the autoencoder and the transformer's class.
        data: Pictures and captions.
        sampler: Gives the distribution of the noise levels.
    """

    def __init__(self, pipeline: DiffusionPipeline, data: DataSpec, sampler: SamplerSpec):
        self.data, self.sampler = data, sampler
        self._pipeline = pipeline
        empty, empty_mask = encode_prompts(pipeline, [""], sampler)
        self._empty_LD, self._empty_mask_L = empty[0], empty_mask[0]

    @cached_property
    def _train(self) -> TensorRows:
        return self._encode(self._pipeline, load_training_images(self.data))

    @cached_property
    def _validation(self) -> TensorRows:
        return self._encode(self._pipeline, load_validation_images(self.data))

    def train_stream(self, batch_size: int, seed: int) -> ShuffledBatches:
        """Shuffled batches of encoded pictures.

        Raises:
            ConfigError: The batch is larger than the data.
        """
        if batch_size > self.data.num_train:
            raise config_error(
                "train.batch_size",
                batch_size,
                allowed=f"at most data.num_train = {self.data.num_train}",
                fix="use less",
            )
        return ShuffledBatches(self._train, batch_size, seed)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training data."""
        return max(1, self.data.num_train // batch_size)

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """The held-out pictures in order."""
        return list(self._validation.batches(batch_size))

    def calibration_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """The first training pictures, with noise levels spread over the whole of (0, 1)."""
        rows = TensorRows({name: column[:num_samples] for name, column in self._train.columns.items()})
        generator = torch.Generator().manual_seed(0)
        return [self.make_inputs(batch, generator) for batch in rows.batches(batch_size)]

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Drops captions and adds noise: x = (1 - sigma) latents + sigma noise, timestep = 1000 sigma."""
        latents_NCHW = batch["latents"]
        num = len(latents_NCHW)
        sigma_N = torch.rand(num, generator=generator)
        if self.sampler.timesteps == "logit_normal":
            sigma_N = torch.sigmoid(torch.randn(num, generator=generator))
        noise_NCHW = torch.randn(latents_NCHW.shape, generator=generator)
        is_dropped_N = torch.rand(num, generator=generator) < self.data.caption_dropout
        return {
            "hidden_states": torch.lerp(latents_NCHW, noise_NCHW, sigma_N.view(-1, 1, 1, 1)),
            "timestep": NUM_TRAIN_TIMESTEPS * sigma_N,
            "encoder_hidden_states": torch.where(is_dropped_N.view(-1, 1, 1), self._empty_LD, batch["text"]),
            "encoder_attention_mask": torch.where(is_dropped_N.view(-1, 1), self._empty_mask_L, batch["text_mask"]),
        }

    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The predicted velocity, [N, C, H, W]."""
        parameter = next(model.parameters())
        moved = {name: tensor.to(parameter.device) for name, tensor in inputs.items()}
        cast = {
            name: tensor.to(parameter.dtype) if name != "timestep" and tensor.is_floating_point() else tensor
            for name, tensor in moved.items()
        }
        with _attention_kernel(parameter.device):
            return model(**cast, return_dict=False)[0]

    @torch.no_grad()
    def _encode(self, pipeline: DiffusionPipeline, data: CaptionedImages) -> TensorRows:
        vae = pipeline.vae
        parts = data.images.to(vae.dtype).split(_ENCODE_BATCH)
        latents = torch.cat([vae.encode(part.to(vae.device)).latent.float().cpu() for part in parts])
        latents *= vae.config.scaling_factor
        distinct = sorted(set(data.prompts))
        text, mask = encode_prompts(pipeline, distinct, self.sampler)
        row = torch.tensor([distinct.index(prompt) for prompt in data.prompts])
        return TensorRows({"latents": latents, "text": text[row], "text_mask": mask[row]})


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], sampler: SamplerSpec) -> tuple[Tensor, Tensor]:
    """Text embeddings [N, L, D] float32 and mask [N, L] of prompts."""
    arguments = {
        "do_classifier_free_guidance": False,
        "max_sequence_length": sampler.max_sequence_length,
        **architecture_of(pipeline.transformer).encode_arguments,
    }
    parts = [
        pipeline.encode_prompt(list(prompts[i : i + _ENCODE_BATCH]), **arguments)[:2]
        for i in range(0, len(prompts), _ENCODE_BATCH)
    ]
    return torch.cat([text for text, _ in parts]).float().cpu(), torch.cat([mask for _, mask in parts]).cpu()


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
        [N, 3, height, width] float32 in [0, 1].
    """
    arguments = architecture_of(pipeline.transformer).call_arguments
    original, call = pipeline.transformer, cast(Any, pipeline)
    pipeline.transformer = transformer
    try:
        parts: list[Tensor] = []
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
            output = call(
                prompt=part,
                generator=generators,
                num_inference_steps=sampler.num_steps,
                guidance_scale=sampler.guidance_scale,
                height=sampler.height,
                width=sampler.width,
                max_sequence_length=sampler.max_sequence_length,
                output_type="pt",
                **arguments,
            )
            parts.append(output.images.float().cpu())
            on_done(start + len(part))
        return torch.cat(parts)
    finally:
        pipeline.transformer = original


def _attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU the backward pass of the fused attention kernel is several times slower than plain products at small sizes."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
