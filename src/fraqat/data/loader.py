"""Shuffled batches whose position can be saved and put back exactly. The only home of torchdata."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from fraqat.data.bad_samples import BadSamples
from fraqat.data.samples import Outcome, Sample, SampleSet, Ticket, TicketOrder
from fraqat.data.worker_watch import DEFAULT_WORKERS, WorkerSpec, watched
from fraqat.errors import BatchSizeError, CheckpointError, config_error


class Rows(Protocol):
    """Rows that can be had by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


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

    def first(self, num_rows: int) -> TensorRows:
        """The first rows, all of them where there are fewer."""
        return TensorRows({name: column[:num_rows] for name, column in self.columns.items()})


class ShuffledBatches:
    """Endless batches of whole size, every row once per epoch, in an order that only `seed` decides.

    Args:
        rows: The data.
        batch_size: Rows per batch, at most the number of rows.
        seed: Decides the order of every epoch.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int):
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._num_given = 0
        self._orders = self._shuffled()
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            indices = self._next_indices()
            yield default_collate([self._rows[index] for index in indices])

    def skip(self) -> None:
        """Passes over the next batch without reading its rows."""
        self._next_indices()

    def state_dict(self) -> dict[str, Any]:
        """How many batches were given."""
        return {"num_given": self._num_given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        self._num_given = state["num_given"]
        self._orders, self._epoch = self._shuffled(), -1

    def _next_indices(self) -> list[int]:
        epoch, place = divmod(self._num_given, len(self._rows) // self._batch_size)
        while self._epoch < epoch:
            self._epoch, self._order = self._epoch + 1, next(self._orders)
        self._num_given += 1
        return self._order[place * self._batch_size : (place + 1) * self._batch_size].tolist()

    def _shuffled(self) -> Iterator[Tensor]:
        """One permutation for every epoch, all of one generator."""
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield torch.randperm(len(self._rows), generator=generator)


class RowSource:
    """Training and held-out rows in memory, in the parts that a task hands to the trainer.

    Args:
        train: Rows that the student learns from.
        validation: Rows that it never sees.
    """

    def __init__(self, train: TensorRows, validation: TensorRows):
        self.train, self.validation = train, validation

    @property
    def num_train(self) -> int:
        """Rows for training."""
        return len(self.train)

    def train_stream(self, batch_size: int, seed: int) -> ShuffledBatches:
        """Shuffled batches without end.

        Raises:
            BatchSizeError: The batch is larger than the data.
        """
        if batch_size > self.num_train:
            raise BatchSizeError(batch_size, self.num_train)
        return ShuffledBatches(self.train, batch_size, seed)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training rows."""
        return max(1, self.num_train // batch_size)

    def validation_batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """The held-out rows in order."""
        return self.validation.batches(batch_size)

    def first_rows(self, num_rows: int) -> TensorRows:
        """The first training rows, for calibration."""
        return self.train.first(num_rows)


class SampleStream:
    """Samples pass after pass, read by worker processes; bad ones are counted and left out.

    Args:
        samples: Where they come from.
        seed: Decides the order of every pass; None is the stored order.
        num_epochs: Passes; None goes on without end.
        workers: Processes that read and decode.
        after: In stored order only: begin after the row with this place.
    """

    def __init__(
        self,
        samples: SampleSet,
        seed: int | None,
        *,
        num_epochs: int | None,
        workers: WorkerSpec = DEFAULT_WORKERS,
        after: int = -1,
    ):
        self._bad: BadSamples = samples.count_bad()
        self._workers = workers
        self._make_loader = lambda: _stateful_loader(
            _Fetcher(samples),
            batch_size=None,
            sampler=_Tickets(lambda: samples.order(seed, num_epochs=num_epochs, after=after)),
            num_workers=workers.num_workers,
            timeout=workers.limit_s,
            collate_fn=_as_it_is,
        )
        self._loader = self._make_loader()

    def __iter__(self) -> Iterator[Sample]:
        outcome: Outcome
        for loader, outcome in watched(self._loader, self._make_loader, self._workers):
            self._loader = loader
            self._bad.add(outcome.epoch, outcome.key, outcome.reason)
            if outcome.sample is not None:
                yield {"key": outcome.key, "place": outcome.place, **outcome.sample}
        self._bad.finish()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last sample that was given out, and the count of bad ones."""
        return {
            "num_workers": self._workers.num_workers,
            "loader": self._loader.state_dict(),
            "bad": self._bad.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`; call it before iterating.

        Raises:
            CheckpointError: The state is of another number of workers.
        """
        if state["num_workers"] != self._workers.num_workers:
            raise CheckpointError(
                f"data.num_workers = {self._workers.num_workers}, but the checkpoint was made with {state['num_workers']}: "
                f"its place in the data is counted by worker. Fix: set data.num_workers: {state['num_workers']}."
            )
        self._bad.load_state_dict(state["bad"])
        self._loader.load_state_dict(state["loader"])


class SampleBatches:
    """Endless batches of whole size from a data set that is read while training.

    Every sample comes once per pass; a batch may hold the end of one pass and the start of the next.

    Args:
        samples: Where they come from.
        batch_size: Samples per batch.
        seed: Decides the order of every pass.
        collate: Makes a batch of samples.
        workers: Processes that read and decode.
    """

    def __init__(
        self,
        samples: SampleSet,
        batch_size: int,
        seed: int,
        collate: Callable[[Sequence[Sample]], dict[str, Any]],
        *,
        workers: WorkerSpec = DEFAULT_WORKERS,
    ):
        self._stream = SampleStream(samples, seed, num_epochs=None, workers=workers)
        self._batch_size, self._collate = batch_size, collate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batch: list[Sample] = []
        for sample in self._stream:
            batch.append(sample)
            if len(batch) == self._batch_size:
                yield self._collate(batch)
                batch = []
        raise config_error(
            "data.records", "no sample", allowed="a training split with samples", fix="check split and validation_share"
        )

    def state_dict(self) -> dict[str, Any]:
        """Position in the pass and in the stored rows."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`; call it before iterating."""
        self._stream.load_state_dict(state)


class SampleSource:
    """Training and held-out samples that are read while training; the counterpart of `RowSource`.

    Args:
        train: Samples that the student learns from.
        validation: Samples that it never sees.
        collate: Makes a batch of samples.
        workers: Processes that read and decode.
    """

    def __init__(
        self,
        train: SampleSet,
        validation: SampleSet,
        collate: Callable[[Sequence[Sample]], dict[str, Any]],
        *,
        workers: WorkerSpec = DEFAULT_WORKERS,
    ):
        self.train, self.validation = train, validation
        self._collate, self._workers = collate, workers

    @property
    def num_train(self) -> int:
        """Samples for training, with those that will turn out to be bad.

        Raises:
            ConfigError: They are streamed, and nobody has said how many to take.
        """
        if self.train.num_samples is None:
            raise config_error("data.num_train", None, allowed="a number for streamed rows", fix="set data.num_train")
        return self.train.num_samples

    def train_stream(self, batch_size: int, seed: int) -> SampleBatches:
        """Shuffled batches without end.

        Raises:
            BatchSizeError: The batch is larger than the data.
        """
        if batch_size > self.num_train:
            raise BatchSizeError(batch_size, self.num_train)
        return SampleBatches(self.train, batch_size, seed, self._collate, workers=self._workers)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training samples."""
        return max(1, self.num_train // batch_size)

    def validation_batches(self, batch_size: int) -> list[dict[str, Any]]:
        """The held-out samples in order."""
        return self._batches(self.validation, batch_size, None)

    def first_batches(self, num_samples: int, batch_size: int) -> list[dict[str, Any]]:
        """The first training samples in order, for calibration."""
        return self._batches(self.train, batch_size, num_samples)

    def _batches(self, samples: SampleSet, batch_size: int, num_samples: int | None) -> list[dict[str, Any]]:
        stream = SampleStream(samples, None, num_epochs=1, workers=self._workers)
        first = list(itertools.islice(stream, num_samples))
        return [self._collate(first[i : i + batch_size]) for i in range(0, len(first), batch_size)]


class _Tickets:
    """A sampler that hands out tickets, the position of which the loader saves."""

    def __init__(self, start: Callable[[], TicketOrder]):
        self._start = start

    def __iter__(self) -> TicketOrder:
        return self._start()


class _Fetcher(Dataset[Outcome]):
    def __init__(self, samples: SampleSet):
        self._samples = samples

    def __getitem__(self, index: Ticket) -> Outcome:
        return self._samples.fetch(index)


def _as_it_is(outcome: Outcome) -> Outcome:
    return outcome


def _stateful_loader(dataset: Any, **arguments: Any) -> Any:
    """A `StatefulDataLoader` with a generator of its own.

    Otherwise every new iterator draws from torch's global one, and a resumed run would see other dropout than an
    uninterrupted one.
    """
    with warnings.catch_warnings():
        # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates; nothing a user could do about it.
        warnings.filterwarnings("ignore", message=".*set_vital.*", category=UserWarning)
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(dataset, generator=torch.Generator(), **arguments)
