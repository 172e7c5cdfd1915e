"""What the trainer needs from a model family. Families live in `fraqat.tasks`; the trainer knows none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fraqat.distill.losses import LossSpec

Batch = Mapping[str, Any]
"""One batch by column, the batch on the first axis: tensors, and texts where a task encodes them itself."""

Prediction = Mapping[str, Tensor]
"""What a model's forward pass gives for distillation, by name."""

LOSS_WEIGHT, TIMESTEP_BIN = "loss_weight", "timestep_bin"
"""Columns that inputs of a `TimestepTask` may have: what a sample's loss counts, and the part of the distribution of noise
levels that it was drawn from. They are no arguments of a model."""


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

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """The outputs that are distilled."""
        ...

    def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        """Weighted sum of the terms, a mean over the batch, 0-dim float32.

        Args:
            student: With gradient.
            teacher: Without.
            inputs: What both predictions were made from; masks are here.
            terms: At least one.
        """
        ...


@runtime_checkable
class SplittableTask(Protocol):
    """A task whose batches can be computed in smaller pieces than they are drawn in."""

    def split_inputs(self, inputs: Batch, num_parts: int) -> list[tuple[Batch, float]]:
        """Cuts what `make_inputs` gave into pieces.

        Returns:
            Each piece, and its share of the loss: the loss of the whole is the sum of shares times losses.
        """
        ...


@runtime_checkable
class TimestepTask(Protocol):
    """A task on noisy samples.

    Its `predict` passes over the columns `LOSS_WEIGHT` and `TIMESTEP_BIN`, and its `loss` is the mean over the batch of each
    sample's loss times its `LOSS_WEIGHT`.
    """

    @property
    def draws_noise_levels(self) -> bool:
        """Whether levels are drawn in training; not where they belong to the data."""
        ...

    def make_inputs_at(self, batch: Batch, place_N: Tensor, generator: torch.Generator) -> Batch:
        """`make_inputs` with given noise levels.

        Args:
            batch: N samples.
            place_N: Places in [0, 1] in the distribution of levels, from the least noise to the most: uniform places give what
                `make_inputs` draws from.
            generator: For everything else.
        """
        ...

    def sample_errors(self, student: Prediction, teacher: Prediction) -> Tensor:
        """Mean squared difference of the outputs of each sample, [N] float32."""
        ...


@runtime_checkable
class ConstantOutputs(Protocol):
    """A task whose predictions hold something that does not depend on the batch, such as the weight of a head."""

    @property
    def constant_outputs(self) -> frozenset[str]:
        """Names in what `predict` gives."""
        ...
