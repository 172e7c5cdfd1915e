"""What the trainer needs from a model family. Families live in `fraqat.tasks`; the trainer knows none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""Tensors of one batch, the batch on the first axis."""


class BatchStream(Protocol):
    """An endless stream of training batches that can be saved and put back."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position, made of tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the position back; the next batch is the one that would have come."""
        ...


class DistillTask(Protocol):
    """One model family on one data set."""

    def train_stream(self, batch_size: int, seed: int) -> BatchStream:
        """The training data, shuffled by `seed`."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches of one pass over the training data."""
        ...

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """Held-out data, the same at every call."""
        ...

    def calibration_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """Inputs for static activation ranges, spread as the inputs at run time are."""
        ...

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Adds what is drawn at random (noise, timesteps, dropped captions) from `generator` alone."""
        ...

    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The output that is distilled."""
        ...
