"""Trains the denoiser and the text encoder of the colour-digits pipeline, together, with flow matching."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SanaPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fraqat.zoo.color_digits_models import CAPTION_TOKENS

_EMA_DECAY = 0.998
_WEIGHT_DECAY = 0.01
_PRINT_EVERY = 50


@dataclass(frozen=True)
class TransformerSettings:
    """How the denoiser is trained.

    Args:
        num_steps: optimiser steps.
        batch_size: latents per step.
        learning_rate: peak, reached after `num_warmup_steps`, then cosine decay to a hundredth of it.
        num_warmup_steps: steps of linear warmup.
        caption_dropout: share of captions replaced by the empty one, which classifier-free guidance needs.
        sigma_spread: standard deviation of the logit of the noise level.
        checkpoint_every: steps between checkpoints.
        seed: seed of batches, noise levels and noise.
    """

    num_steps: int
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    num_warmup_steps: int = 100
    caption_dropout: float = 0.1
    sigma_spread: float = 1.2
    checkpoint_every: int = 200
    seed: int = 0


@dataclass(frozen=True)
class TransformerResult:
    """What the training of the denoiser came to.

    Args:
        num_steps: optimiser steps.
        minutes: wall-clock time, over all resumptions.
        loss: mean flow-matching loss of the last tenth of the steps.
    """

    num_steps: int
    minutes: float
    loss: float


class _Denoiser(nn.Module):
    """The two trained parts as one module: noisy latents and captions to velocity."""

    def __init__(self, pipeline: SanaPipeline) -> None:
        super().__init__()
        self.text_encoder = pipeline.text_encoder
        self.transformer = pipeline.transformer

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.text_encoder(tokens, attention_mask=mask)[0]
        return self.transformer(
            noisy,
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]


class _CaptionedLatents:
    """Draws batches of (latents, tokens, mask) with caption dropout."""

    def __init__(self, pipeline: SanaPipeline, latents: Tensor, prompts: Sequence[str], dropout: float) -> None:
        distinct = ["", *dict.fromkeys(prompts)]
        place = {prompt: index for index, prompt in enumerate(distinct)}
        encoded = pipeline.tokenizer(
            distinct, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
        )
        self._tokens, self._masks = encoded.input_ids, encoded.attention_mask
        self._caption = torch.tensor([place[prompt] for prompt in prompts])
        self._latents, self._dropout = latents, dropout

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randint(len(self._latents), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < self._dropout
        caption = self._caption[chosen].masked_fill(dropped, 0)
        return self._latents[chosen], self._tokens[caption], self._masks[caption]


class _Run:
    """Everything that a checkpoint holds, and one optimiser step on it."""

    def __init__(self, pipeline: SanaPipeline, settings: TransformerSettings) -> None:
        self.model = _Denoiser(pipeline).train()
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=_WEIGHT_DECAY,
            fused=True,
        )
        self.schedule = _schedule(self.optimizer, settings)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.losses: list[float] = []
        self.minutes = 0.0
        self._sigma_spread = settings.sigma_spread

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        loss = _loss(self.model, batch, self._sigma_spread, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self._update_average(len(self.losses))

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = min(_EMA_DECAY, step / (step + 10))
        for name, value in self.model.named_parameters():
            self.average[name].lerp_(value, 1 - decay)

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
            "minutes": self.minutes,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)  # an interruption while writing leaves the previous checkpoint whole

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.update(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.losses, self.minutes = state["losses"], state["minutes"]
        print(f"resumed at step {len(self.losses)}", flush=True)


def train_transformer(
    pipeline: SanaPipeline,
    latents: Tensor,
    prompts: Sequence[str],
    settings: TransformerSettings,
    checkpoint: Path,
) -> TransformerResult:
    """Trains transformer and text encoder of the pipeline in place; they end with averaged weights.

    With x_0 the latents, e Gaussian noise and sigma in (0, 1), the model sees x = (1 - sigma) x_0 + sigma e at
    timestep 1000 sigma and regresses e - x_0, as Sana does (https://arxiv.org/abs/2410.10629).

    Args:
        pipeline: the pipeline; its autoencoder is not used.
        latents: scaled latents, [N, 8, 8, 8].
        prompts: N captions.
        settings: how to train.
        checkpoint: file that training resumes from when it exists, and that is rewritten as training goes on.

    Returns:
        Steps, minutes and final loss.
    """
    run = _Run(pipeline, settings)
    data = _CaptionedLatents(pipeline, latents, prompts, settings.caption_dropout)
    if checkpoint.exists():
        run.load(checkpoint)
    start = time.monotonic() - 60 * run.minutes
    for step in range(len(run.losses) + 1, settings.num_steps + 1):
        run.step(data.draw(settings.batch_size, run.generator))
        run.minutes = (time.monotonic() - start) / 60
        if step % _PRINT_EVERY == 0:
            recent = sum(run.losses[-_PRINT_EVERY:]) / _PRINT_EVERY
            print(f"transformer step {step}/{settings.num_steps} loss {recent:.4f} {run.minutes:.1f} min", flush=True)
        if step % settings.checkpoint_every == 0 or step == settings.num_steps:
            run.save(checkpoint)
    run.model.load_state_dict(run.average, strict=False)
    run.model.eval()
    tail = run.losses[-max(1, settings.num_steps // 10) :]
    return TransformerResult(len(run.losses), run.minutes, sum(tail) / len(tail))


def load_average(pipeline: SanaPipeline, checkpoint: Path) -> int:
    """Puts the averaged weights of a checkpoint into the pipeline, to look at a training that still runs.

    Args:
        pipeline: the pipeline; changed in place.
        checkpoint: file that `train_transformer` wrote.

    Returns:
        The step of the checkpoint.
    """
    state = torch.load(checkpoint, weights_only=True)
    _Denoiser(pipeline).load_state_dict(state["average"], strict=False)
    return len(state["losses"])


def _loss(
    model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], sigma_spread: float, generator: torch.Generator
) -> Tensor:
    latents, tokens, mask = batch
    sigma = torch.sigmoid(torch.randn(len(latents), generator=generator) * sigma_spread)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    # The flash kernel's backward pass is several times slower than plain matmuls at these sizes on a CPU.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model(noisy, sigma, tokens, mask)
    return F.mse_loss(velocity.float(), noise - latents)


def _schedule(optimizer: torch.optim.Optimizer, settings: TransformerSettings) -> torch.optim.lr_scheduler.LRScheduler:
    decay = settings.num_steps - settings.num_warmup_steps
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=settings.num_warmup_steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, decay, eta_min=settings.learning_rate / 100)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [settings.num_warmup_steps])
