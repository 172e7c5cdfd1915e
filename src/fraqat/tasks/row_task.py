"""What tasks on rows in memory share: they hand the source's batches to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from fraqat.data.loader import TensorRows
from fraqat.distill import Batch, BatchStream


class BatchSource(Protocol):
    """Training and held-out rows, such as a `RowSource`."""

    def train_stream(self, batch_size: int, seed: int) -> BatchStream:
        """Shuffled batches without end."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training rows."""
        ...

    def validation_batches(self, batch_size: int) -> Sequence[Batch]:
        """The held-out rows in order."""
        ...

    def first_rows(self, num_rows: int) -> TensorRows:
        """The first training rows."""
        ...


class RowTask:
    """The data side of a task; a model family adds `predict`, `loss`, and what it does to a batch.

    Args:
        source: Encoded rows.
    """

    def __init__(self, source: BatchSource):
        self.source = source

    def train_stream(self, batch_size: int, seed: int) -> BatchStream:
        """Shuffled batches of rows.

        Raises:
            ConfigError: The batch is larger than the data.
        """
        return self.source.train_stream(batch_size, seed)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training data."""
        return self.source.steps_per_epoch(batch_size)

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """The held-out rows in order."""
        return list(self.source.validation_batches(batch_size))

    def calibration_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """The first training rows."""
        generator = torch.Generator().manual_seed(0)
        return [self.make_inputs(batch, generator) for batch in self.source.first_rows(num_samples).batches(batch_size)]

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The rows as they are; nothing is random."""
        return batch
