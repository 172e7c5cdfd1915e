"""Trains the autoencoders of the colour-digits pipelines."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

_LATENT_NOISE = 0.15  # noise that the decoder learns to undo, relative to unit-variance latents
_STATISTICS_WEIGHT = 0.02

Autoencoder = Any
"""`diffusers.AutoencoderDC` or `AutoencoderKL`, whose own annotations leave out what their calls return."""


@dataclass(frozen=True)
class AutoencoderResult:
    """What the training of the autoencoder came to.

    Args:
        num_steps: optimiser steps.
        minutes: wall-clock time.
        psnr_db: reconstruction of pictures from the test digits, in dB over the range [-1, 1].
    """

    num_steps: int
    minutes: float
    psnr_db: float


def train_autoencoder(
    autoencoder: Autoencoder, images: Tensor, test_images: Tensor, *, num_steps: int, batch_size: int, seed: int
) -> AutoencoderResult:
    """Trains the autoencoder in place and sets its config so that latents as the denoiser sees them have unit variance.

    The loss is L1 + squared error of the reconstruction from noisy latents, and a term that draws each latent
    channel towards mean 0 and variance 1, which keeps the latents easy for the denoiser. The posterior of a
    variational autoencoder ends with exactly that noise as its standard deviation, wherever the picture.

    Args:
        autoencoder: the model, float32.
        images: training pictures, [N, 3, H, W] in [-1, 1].
        test_images: other pictures to report on, same layout.
        num_steps: optimiser steps.
        batch_size: pictures per step.
        seed: seed of the batches and the noise.

    Returns:
        Steps, minutes and test PSNR.
    """
    start = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps, pct_start=0.1)
    autoencoder.train().to(memory_format=torch.channels_last)
    for step in range(1, num_steps + 1):
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            loss, error = _loss(autoencoder, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps:
            minutes = (time.monotonic() - start) / 60
            print(
                f"autoencoder step {step}/{num_steps} loss {loss.item():.4f} mse {error.item():.5f} {minutes:.1f} min",
                flush=True,
            )
    autoencoder.eval().to(memory_format=torch.contiguous_format)
    _set_statistics(autoencoder, images[:4096])
    psnr_db = reconstruction_psnr_db(autoencoder, test_images)
    return AutoencoderResult(num_steps, (time.monotonic() - start) / 60, psnr_db)


def _loss(autoencoder: Autoencoder, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    latents = _bare_latents(autoencoder, batch.contiguous(memory_format=torch.channels_last)).float()
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    statistics = (variance - 1).square().mean() + mean.square().mean()
    noise = torch.randn(latents.shape, generator=generator) * _LATENT_NOISE
    output = autoencoder.decode(latents + noise).sample.float()
    error = F.mse_loss(output, batch)
    return F.l1_loss(output, batch) + error + _STATISTICS_WEIGHT * statistics, error.detach()


def _bare_latents(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Latents before any scaling; those of a variational autoencoder are the mean of its posterior."""
    output = autoencoder.encode(images)
    return output.latent_dist.mode() if isinstance(autoencoder, AutoencoderKL) else output.latent


@torch.no_grad()
def _set_statistics(autoencoder: Autoencoder, images: Tensor) -> None:
    """Writes scaling and shift into the config, and the posterior's width into a variational encoder's last layer."""
    latents = torch.cat([_bare_latents(autoencoder, part) for part in images.split(512)])
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item())
    if isinstance(autoencoder, AutoencoderKL):
        autoencoder.register_to_config(shift_factor=latents.mean().item())
        channels = latents.shape[1]
        last: Any = autoencoder.encoder.conv_out  # its second half of channels is the posterior's log variance
        last.weight[channels:] = 0
        last.bias[channels:] = 2 * math.log(_LATENT_NOISE)


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor, batch_size: int = 512) -> Tensor:
    """Encodes pictures to latents as the diffusion model sees them: shifted and scaled as the config says.

    Args:
        autoencoder: the model.
        images: [N, 3, H, W] in [-1, 1].
        batch_size: pictures at a time.

    Returns:
        Latents, [N, C, H / 4, W / 4] float32.
    """
    shift = getattr(autoencoder.config, "shift_factor", None) or 0.0
    scaling = autoencoder.config.scaling_factor
    return torch.cat([(_bare_latents(autoencoder, part) - shift) * scaling for part in images.split(batch_size)])


@torch.no_grad()
def reconstruction_psnr_db(autoencoder: Autoencoder, images: Tensor) -> float:
    """Measures how well pictures survive encoding and decoding.

    Args:
        autoencoder: the model.
        images: [N, 3, H, W] in [-1, 1].

    Returns:
        Peak signal-to-noise ratio in dB; the peak is 2, the width of the range.
    """
    output = autoencoder.decode(_bare_latents(autoencoder, images)).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / F.mse_loss(output, images))).item()
