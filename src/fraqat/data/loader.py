"""Shuffled batches whose position can be saved and put back exactly. The only home of torchdata."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class TensorRows(Dataset[dict[str, Tensor]]):
    """A data set in memory: named tensors of equal length on the first axis."""

    def __init__(self, columns: Mapping[str, Tensor]):
        self.columns = dict(columns)
        self._length = len(next(iter(self.columns.values())))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """All rows in order; the last batch may be smaller."""
        starts = range(0, len(self), batch_size)
        return [{name: column[i : i + batch_size] for name, column in self.columns.items()} for i in starts]


class ShuffledBatches:
    """Endless batches of whole size, every row once per epoch, in an order that only `seed` decides.

    Args:
        rows: The data.
        batch_size: Rows per batch, at most the number of rows.
        seed: Decides the order of every epoch.
    """

    def __init__(self, rows: TensorRows, batch_size: int, seed: int):
        with warnings.catch_warnings():
            # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates; nothing a user could do about it.
            warnings.filterwarnings("ignore", message=".*set_vital.*", category=UserWarning)
            from torchdata.stateful_dataloader import StatefulDataLoader
            from torchdata.stateful_dataloader.sampler import RandomSampler

            sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(seed))
            # A generator of its own: otherwise every new iterator draws from torch's global one, and a resumed run would
            # see other dropout than an uninterrupted one.
            self._loader = StatefulDataLoader(
                rows, batch_size=batch_size, sampler=sampler, drop_last=True, generator=torch.Generator()
            )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self._loader

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch and the state of the shuffling."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`; call it before iterating."""
        self._loader.load_state_dict(state)
