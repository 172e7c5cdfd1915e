"""Trains the denoiser and the text encoders of a colour-digits pipeline, together."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fraqat.zoo.architectures import Architecture, Conditions, Pipeline
from fraqat.zoo.objectives import Objective

_EMA_DECAY = 0.998
_WEIGHT_DECAY = 0.01
_PRINT_EVERY = 50


@dataclass(frozen=True)
class TransformerSettings:
    """How the denoiser is trained.

    Args:
        num_steps: optimiser steps.
        num_text_steps: in how many of them, the first ones, the text encoders are trained too; None is in all. Frozen
            encoders read every caption once, which saves a third of the time.
        batch_size: latents per step.
        learning_rate: peak, reached after `num_warmup_steps`, then cosine decay to a hundredth of it.
        num_warmup_steps: steps of linear warmup.
        caption_dropout: share of captions replaced by the empty one, which classifier-free guidance needs.
        checkpoint_every: steps between checkpoints.
        seed: seed of batches, noise levels and noise.
    """

    num_steps: int
    num_text_steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    num_warmup_steps: int = 100
    caption_dropout: float = 0.1
    checkpoint_every: int = 200
    seed: int = 0


@dataclass(frozen=True)
class TransformerResult:
    """What the training of the denoiser came to.

    Args:
        num_steps: optimiser steps.
        minutes: wall-clock time, over all resumptions.
        loss: mean loss of the last tenth of the steps.
    """

    num_steps: int
    minutes: float
    loss: float


@dataclass(frozen=True)
class CaptionedLatents:
    """What a denoiser is trained on.

    Args:
        latents: clean latents as the denoiser sees them, [N, C, H, W].
        prompts: N captions.
        noise: the noise that belongs to each, same shape as `latents`, where a teacher has paired them; None draws it
            anew each time.
    """

    latents: Tensor
    prompts: Sequence[str]
    noise: Tensor | None = None

    def draw(self, batch_size: int, dropout: float, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Draws a batch.

        Args:
            batch_size: how many.
            dropout: share of captions replaced by the empty one.
            generator: source of randomness.

        Returns:
            Latents, noise and captions.
        """
        chosen = torch.randint(len(self.latents), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < dropout
        latents = self.latents[chosen]
        noise = torch.randn(latents.shape, generator=generator) if self.noise is None else self.noise[chosen]
        pairs: list[tuple[int, bool]] = list(zip(chosen.tolist(), dropped.tolist(), strict=True))
        return latents, noise, ["" if empty else self.prompts[index] for index, empty in pairs]


class _Captions:
    """What the transformer is given for captions: computed anew while the encoders learn, looked up afterwards."""

    def __init__(self, architecture: Architecture, pipeline: Pipeline, prompts: Sequence[str]) -> None:
        self._architecture, self._pipeline = architecture, pipeline
        self._place = {prompt: index for index, prompt in enumerate(("", *dict.fromkeys(prompts)))}
        self._table: Conditions | None = None

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        if self._table is None:
            return self._architecture.conditions(self._pipeline, prompts)
        rows = [self._place[prompt] for prompt in prompts]
        return {name: values[rows] for name, values in self._table.items()}

    @torch.no_grad()
    def freeze(self) -> None:
        if self._table is None:
            for name in self._architecture.text_encoders:
                getattr(self._pipeline, name).requires_grad_(False)
            self._table = self._architecture.conditions(self._pipeline, list(self._place))


class _Run:
    """Everything that a checkpoint holds, and one optimiser step on it."""

    def __init__(self, parts: nn.ModuleDict, settings: TransformerSettings) -> None:
        self.model = parts.train()
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=_WEIGHT_DECAY,
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.losses: list[float] = []
        self.minutes = 0.0
        self._settings = settings

    def step(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(len(self.losses) + 1, self._settings)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
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
        self.generator.set_state(state["generator"])
        self.losses, self.minutes = state["losses"], state["minutes"]
        print(f"resumed at step {len(self.losses)}", flush=True)


def trained_parts(architecture: Architecture, pipeline: Pipeline) -> nn.ModuleDict:
    """Collects the parts of a pipeline that are trained together.

    Args:
        architecture: its row of the table.
        pipeline: the pipeline.

    Returns:
        Transformer and text encoders, by their names in the pipeline.
    """
    return nn.ModuleDict({name: getattr(pipeline, name) for name in ("transformer", *architecture.text_encoders)})


def train_transformer(
    architecture: Architecture,
    pipeline: Pipeline,
    data: CaptionedLatents,
    objective: Objective,
    settings: TransformerSettings,
    checkpoint: Path,
) -> TransformerResult:
    """Trains transformer and text encoders of the pipeline in place; they end with averaged weights.

    Args:
        architecture: the pipeline's row of the table.
        pipeline: the pipeline; its autoencoder is not used.
        data: latents and captions.
        objective: what the transformer learns to predict.
        settings: how to train.
        checkpoint: file that training resumes from when it exists, and that is rewritten as training goes on.

    Returns:
        Steps, minutes and final loss.
    """
    run = _Run(trained_parts(architecture, pipeline), settings)
    captions = _Captions(architecture, pipeline, data.prompts)
    if checkpoint.exists():
        run.load(checkpoint)
    start = time.monotonic() - 60 * run.minutes
    for step in range(len(run.losses) + 1, settings.num_steps + 1):
        if settings.num_text_steps is not None and step > settings.num_text_steps:
            captions.freeze()
        latents, noise, prompts = data.draw(settings.batch_size, settings.caption_dropout, run.generator)
        # The flash kernel's backward pass is several times slower than plain matmuls at these sizes on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            denoise = partial(architecture.denoise, pipeline, conditions=captions(prompts))
            loss = objective.loss(denoise, latents, noise, run.generator)
        run.step(loss)
        run.minutes = (time.monotonic() - start) / 60
        if step % _PRINT_EVERY == 0:
            recent = sum(run.losses[-_PRINT_EVERY:]) / _PRINT_EVERY
            print(f"{checkpoint.stem} {step}/{settings.num_steps} loss {recent:.4f} {run.minutes:.1f} min", flush=True)
        if step % settings.checkpoint_every == 0 or step == settings.num_steps:
            run.save(checkpoint)
    run.model.load_state_dict(run.average, strict=False)
    run.model.requires_grad_(True).eval()
    tail = run.losses[-max(1, settings.num_steps // 10) :]
    return TransformerResult(len(run.losses), run.minutes, sum(tail) / len(tail))


def load_average(architecture: Architecture, pipeline: Pipeline, checkpoint: Path) -> int:
    """Puts the averaged weights of a checkpoint into the pipeline, to look at a training that still runs.

    Args:
        architecture: the pipeline's row of the table.
        pipeline: the pipeline; changed in place.
        checkpoint: file that `train_transformer` wrote.

    Returns:
        The step of the checkpoint.
    """
    state = torch.load(checkpoint, weights_only=True)
    trained_parts(architecture, pipeline).load_state_dict(state["average"], strict=False)
    return len(state["losses"])


def _learning_rate(step: int, settings: TransformerSettings) -> float:
    """Linear warmup, then cosine decay; of the step alone, so that a finished training can be made longer."""
    if step <= settings.num_warmup_steps:
        factor = step / settings.num_warmup_steps
    else:
        share = (step - settings.num_warmup_steps) / (settings.num_steps - settings.num_warmup_steps)
        factor = 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2
    return settings.learning_rate * factor
