"""Trains the tiny SpeechT5: spectrogram and stop losses of transformers, with guided attention."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SpeechT5ForTextToSpeech

from fraqat.data.speech import Speech

_IGNORED = -100.0  # what the model's loss takes for padding
_POOL = 4  # batches drawn at a time and sorted by length, so that little is padded
_PRINT_EVERY = 50


@dataclass(frozen=True)
class SpeechTrainingSettings:
    """How the model is trained.

    Args:
        num_steps: optimiser steps.
        batch_size: utterances per step.
        learning_rate: peak, reached after `num_warmup_steps`, then cosine decay to a hundredth of it.
        num_warmup_steps: steps of linear warmup.
        checkpoint_every: steps between checkpoints.
        seed: seed of batches and of the prenet's dropout.
    """

    num_steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    num_warmup_steps: int = 200
    checkpoint_every: int = 200
    seed: int = 0


@dataclass(frozen=True)
class SpeechTrainingResult:
    """What the training came to.

    Args:
        num_steps: optimiser steps.
        minutes: wall-clock time, over all resumptions.
        loss: mean loss of the last tenth of the steps.
    """

    num_steps: int
    minutes: float
    loss: float


class _Run:
    """Everything that a checkpoint holds, and one optimiser step on it."""

    def __init__(
        self, model: SpeechT5ForTextToSpeech, batches: TrainingBatches, settings: SpeechTrainingSettings
    ) -> None:
        self.model, self.batches = model.train(), batches
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.losses: list[float] = []
        self.minutes = 0.0
        self._settings = settings

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(len(self.losses))
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(**self.batches.draw()).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())

    def _learning_rate(self, step: int) -> float:
        settings = self._settings
        warmup = (step + 1) / settings.num_warmup_steps
        progress = (step - settings.num_warmup_steps) / max(1, settings.num_steps - settings.num_warmup_steps)
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return settings.learning_rate * min(warmup, decay)

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "dropout": torch.get_rng_state(),
            "losses": self.losses,
            "minutes": self.minutes,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)  # an interruption while writing leaves the previous checkpoint whole

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["dropout"])
        self.losses, self.minutes = state["losses"], state["minutes"]
        print(f"resumed at step {len(self.losses)}", flush=True)


class TrainingBatches:
    """Endless batches as the model takes them, of utterances of about equal length.

    Args:
        speech: utterances with even numbers of frames.
        tokenizer: of the texts.
        batch_size: utterances per batch.
        seed: seed of the draws.
    """

    def __init__(self, speech: Speech, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int) -> None:
        self._speech, self._tokenizer, self._batch_size = speech, tokenizer, batch_size
        self._lengths = torch.tensor([len(mel) for mel in speech.log_mels])
        self._generator = torch.Generator().manual_seed(seed)
        self._before_pool = self._generator.get_state()
        self._pool: list[list[int]] = []

    def draw(self) -> dict[str, Tensor]:
        """Draws the next batch.

        Returns:
            Arguments of the model's call.
        """
        if not self._pool:
            self._before_pool = self._generator.get_state()
            self._pool = self._draw_pool()
        return model_arguments(self._speech.subset(self._pool.pop(0)), self._tokenizer)

    def _draw_pool(self) -> list[list[int]]:
        drawn = torch.randint(len(self._speech), (_POOL * self._batch_size,), generator=self._generator)
        parts = drawn[self._lengths[drawn].argsort(stable=True)].split(self._batch_size)
        return [parts[place].tolist() for place in torch.randperm(_POOL, generator=self._generator).tolist()]

    def state_dict(self) -> dict[str, Any]:
        """The position: the generator before the current pool (after it when none is left), and how many batches are left."""
        state = self._before_pool if self._pool else self._generator.get_state()
        return {"generator": state, "num_left": len(self._pool)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`; the next batch is the one that would have come."""
        self._generator.set_state(state["generator"])
        self._before_pool = state["generator"]
        self._pool = self._draw_pool()[_POOL - state["num_left"] :] if state["num_left"] else []


def model_arguments(speech: Speech, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Utterances as the model's call takes them for its own loss.

    Args:
        speech: utterances with even numbers of frames.
        tokenizer: of the texts.

    Returns:
        Arguments of the call.
    """
    encoded = tokenizer(list(speech.texts), padding=True, return_tensors="pt")
    labels = torch.nn.utils.rnn.pad_sequence(list(speech.log_mels), batch_first=True, padding_value=_IGNORED)
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": labels,
        "speaker_embeddings": speech.speakers,
    }


def train_speech_model(
    model: SpeechT5ForTextToSpeech,
    tokenizer: PreTrainedTokenizerFast,
    speech: Speech,
    settings: SpeechTrainingSettings,
    checkpoint: Path,
) -> SpeechTrainingResult:
    """Trains the model in place.

    Args:
        model: the model, float32.
        tokenizer: of the texts.
        speech: training utterances.
        settings: how to train.
        checkpoint: file that training resumes from when it exists, and that is rewritten as training goes on.

    Returns:
        Steps, minutes and final loss.
    """
    torch.manual_seed(settings.seed)
    run = _Run(model, TrainingBatches(speech, tokenizer, settings.batch_size, settings.seed), settings)
    if checkpoint.exists():
        run.load(checkpoint)
    start = time.monotonic() - 60 * run.minutes
    for step in range(len(run.losses) + 1, settings.num_steps + 1):
        run.step()
        run.minutes = (time.monotonic() - start) / 60
        if step % _PRINT_EVERY == 0:
            recent = sum(run.losses[-_PRINT_EVERY:]) / _PRINT_EVERY
            print(f"speech step {step}/{settings.num_steps} loss {recent:.4f} {run.minutes:.1f} min", flush=True)
        if step % settings.checkpoint_every == 0 or step == settings.num_steps:
            run.save(checkpoint)
    model.eval()
    tail = run.losses[-max(1, settings.num_steps // 10) :]
    return SpeechTrainingResult(len(run.losses), run.minutes, sum(tail) / len(tail))
