"""Samples of a data set in an order that only a seed decides, and whose place can be saved exactly.

An order gives tickets: the place of a row, or the row itself where rows are streamed. Tickets are cheap and come from one
place; turning them into samples is the work of the loader's workers.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fraqat.data.bad_samples import BadSampleError, BadSamples
from fraqat.data.records import KEY, Records, RecordsSpec, get_field, open_records
from fraqat.errors import ConfigError, config_error

Sample = dict[str, Any]
"""What one row gives, by column."""

RowReader = Callable[[str, Mapping[str, Any]], Sample]
"""Makes a sample of a key and a row, or raises `BadSampleError`."""


class Ticket(NamedTuple):
    """Stands for one row until a worker reads it."""

    epoch: int
    place: int
    row: Mapping[str, Any] | None = None


class Outcome(NamedTuple):
    """What became of a ticket: a sample, or the reason why there is none."""

    epoch: int
    place: int
    key: str
    sample: Sample | None
    reason: str | None


class TicketOrder(Iterator[Ticket], ABC):
    """Tickets in order. The state says which one comes next, in plain values."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The place after the last ticket."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place."""


class SampleSet(ABC):
    """The samples of one split.

    Args:
        read: Makes samples of rows.
        spec: Gives the name for messages and the limits for bad samples; None allows none.
    """

    def __init__(self, read: RowReader, spec: RecordsSpec | None):
        self._read, self._spec = read, spec

    @property
    @abstractmethod
    def num_samples(self) -> int | None:
        """Samples of one pass, bad ones included, or None where nobody has counted them."""

    @abstractmethod
    def order(self, seed: int | None, *, num_epochs: int | None, after: int = -1) -> TicketOrder:
        """Tickets of all samples, pass after pass.

        Args:
            seed: Decides the order of every pass; None is the stored order.
            num_epochs: Passes; None goes on without end.
            after: In stored order only: begin after the row with this place.
        """

    @abstractmethod
    def key(self, ticket: Ticket, row: Mapping[str, Any]) -> str:
        """Name of a row."""

    @abstractmethod
    def row(self, ticket: Ticket) -> Mapping[str, Any]:
        """The row of a ticket."""

    def fetch(self, ticket: Ticket) -> Outcome:
        """Reads the row of a ticket and makes a sample of it."""
        row = self.row(ticket)
        key = self.key(ticket, row)
        try:
            return Outcome(ticket.epoch, ticket.place, key, self._read(key, row), None)
        except BadSampleError as error:
            return Outcome(ticket.epoch, ticket.place, key, None, str(error))

    def count_bad(self) -> BadSamples:
        """A new count of bad samples with the limits of this data."""
        if self._spec is None:
            return BadSamples("data", 0.0, 0, self.num_samples)
        spec = self._spec
        return BadSamples(f"data.records.path = {spec.path!r}", spec.max_bad_share, spec.max_bad, self.num_samples)


class IndexedSamples(SampleSet):
    """Samples whose rows can be had by number.

    Args:
        rows: All rows.
        indices: Those of this split, in stored order.
        read: Makes samples of rows.
        spec: Of the rows; None for data of the package's own.
    """

    def __init__(self, rows: Any, indices: Sequence[int], read: RowReader, spec: RecordsSpec | None = None):
        super().__init__(read, spec)
        self._rows, self._indices = rows, torch.as_tensor(indices, dtype=torch.int64)

    @property
    def num_samples(self) -> int:
        return len(self._indices)

    def order(self, seed: int | None, *, num_epochs: int | None, after: int = -1) -> TicketOrder:
        kept = self._indices if after < 0 else self._indices[self._indices > after]
        return _IndexOrder(kept, seed, num_epochs)

    def row(self, ticket: Ticket) -> Mapping[str, Any]:
        return self._rows[ticket.place]

    def key(self, ticket: Ticket, row: Mapping[str, Any]) -> str:
        return row_key(row, ticket.place, self._spec)


class StreamedSamples(SampleSet):
    """Samples whose rows come one after the other.

    Shuffling permutes blocks of `shuffle_buffer` samples: unlike a buffer that rows enter and leave one by one, a block can
    be read again from where it starts, so that its place is a few numbers and not its content.

    Args:
        records: All rows.
        side: Take the rows that are held out, or those that are not; None takes both.
        num_samples: Take so many; None takes all.
        read: Makes samples of rows.
        spec: Of the rows.
        is_short: Whether fewer than `num_samples` will do.
    """

    def __init__(
        self,
        records: Records,
        side: bool | None,
        num_samples: int | None,
        read: RowReader,
        spec: RecordsSpec,
        *,
        is_short: bool = True,
    ):
        super().__init__(read, spec)
        self.records, self._side, self._num_samples, self.spec, self._is_short = (
            records,
            side,
            num_samples,
            spec,
            is_short,
        )

    @property
    def num_samples(self) -> int | None:
        return self._num_samples

    def order(self, seed: int | None, *, num_epochs: int | None, after: int = -1) -> TicketOrder:
        return _StreamOrder(self, seed, num_epochs, after)

    def row(self, ticket: Ticket) -> Mapping[str, Any]:
        assert ticket.row is not None
        return ticket.row

    def key(self, ticket: Ticket, row: Mapping[str, Any]) -> str:
        return row_key(row, ticket.place, self.spec)

    def has(self, index: int, row: Mapping[str, Any]) -> bool:
        """Whether a row is on this side of the split."""
        if self._side is None:
            return True
        return is_held_out(row_key(row, index, self.spec), self.spec.validation_share) == self._side

    def check_number(self, num_taken: int) -> None:
        """Called at the end of a pass with the number of rows of this side.

        Raises:
            ConfigError: There are fewer than were asked for.
        """
        if self._num_samples is not None and num_taken < self._num_samples and not self._is_short:
            raise _num_train_error(self._num_samples, num_taken)


def open_samples(
    spec: RecordsSpec,
    read: RowReader,
    columns: Sequence[str],
    *,
    image_column: str | None,
    num_train: int | None,
    num_validation: int | None,
) -> tuple[SampleSet, SampleSet]:
    """Training and held-out samples of stored rows, both in stored order and cut to the numbers asked for.

    Args:
        spec: Where the rows are, and how they are split.
        read: Makes samples of rows.
        columns: That `read` needs.
        image_column: One of them that holds images.
        num_train: None takes all.
        num_validation: At most; None takes all.

    Raises:
        ConfigError: The data is missing, or there are too few rows on a side of the split.
    """
    rows = open_records(spec, spec.split, columns, image_column=image_column)
    held_out_rows, sides = rows, (False, True)
    if spec.validation_split is not None:
        held_out_rows = open_records(spec, spec.validation_split, columns, image_column=image_column)
        sides = (None, None)
    if rows.rows is None:
        train = StreamedSamples(rows, sides[0], num_train, read, spec, is_short=False)
        return train, StreamedSamples(held_out_rows, sides[1], num_validation, read, spec)
    places, held_out = _places(rows, sides[0], spec), _places(held_out_rows, sides[1], spec)
    if num_train is not None and len(places) < num_train:
        raise _num_train_error(num_train, len(places))
    if not held_out:
        raise config_error(
            "data.records.validation_share",
            spec.validation_share,
            allowed=f"a share that holds out at least one of {len(rows.rows)} rows",
            fix="hold out more, or name a validation_split",
        )
    train = IndexedSamples(rows, places[:num_train], read, spec)
    return train, IndexedSamples(held_out_rows, held_out[:num_validation], read, spec)


def row_key(row: Mapping[str, Any], index: int, spec: RecordsSpec | None) -> str:
    """What a row is called: its key column, its own name, or its place."""
    value = get_field(row, spec.key_column) if spec is not None and spec.key_column is not None else row.get(KEY)
    return str(index if value is None else value)


def is_held_out(key: str, share: float) -> bool:
    """Whether a key belongs to the held-out share. Depends on nothing else: not on order, size or seed."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") < share * 2**64


def _places(records: Records, side: bool | None, spec: RecordsSpec) -> list[int]:
    """Numbers of the rows of one side of the split."""
    if side is None:
        return list(range(len(records.rows)))
    return [i for i, key in enumerate(_keys(records, spec)) if is_held_out(key, spec.validation_share) == side]


def _num_train_error(num_train: int, num_rows: int) -> ConfigError:
    return config_error(
        "data.num_train",
        num_train,
        allowed=f"1 to {num_rows}, the rows for training",
        fix=f"set data.num_train: {num_rows}" if num_rows else "use more data or a smaller validation_share",
    )


def _keys(records: Records, spec: RecordsSpec) -> Sequence[str]:
    column = spec.key_column or (KEY if KEY in records.columns else None)
    if column is None:
        return [str(i) for i in range(len(records.rows))]
    return [row_key({column: value}, i, spec) for i, value in enumerate(records.values(column))]


class _IndexOrder(TicketOrder):
    def __init__(self, indices: torch.Tensor, seed: int | None, num_epochs: int | None):
        self._indices, self._seed, self._num_epochs = indices, seed, num_epochs
        self._epoch, self._offset = 0, 0
        self._order = self._shuffled(0)

    def __next__(self) -> Ticket:
        if self._offset == len(self._order):
            if self._is_last() or not len(self._order):
                raise StopIteration
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._shuffled(self._epoch)
        self._offset += 1
        return Ticket(self._epoch, int(self._order[self._offset - 1]))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._offset = state["epoch"], state["offset"]
        self._order = self._shuffled(self._epoch)

    def _is_last(self) -> bool:
        return self._num_epochs is not None and self._epoch + 1 >= self._num_epochs

    def _shuffled(self, epoch: int) -> torch.Tensor:
        if self._seed is None:
            return self._indices
        return self._indices[torch.randperm(len(self._indices), generator=_generator(self._seed, epoch, 0))]


class _StreamOrder(TicketOrder):
    def __init__(self, samples: StreamedSamples, seed: int | None, num_epochs: int | None, after: int):
        self._samples, self._seed, self._num_epochs, self._after = samples, seed, num_epochs, after
        self._start(0)

    def __next__(self) -> Ticket:
        if self._offset == len(self._block):
            self._next_block()
        self._offset += 1
        return self._block[self._offset - 1]

    def state_dict(self) -> dict[str, Any]:
        return {**self._block_start, "offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._number, self._index = state["epoch"], state["block"], state["index"]
        self._num_taken = state["num_taken"]
        self._reader = self._samples.records.read(state["position"])
        self._read_block()
        self._offset = state["offset"]

    def _start(self, epoch: int) -> None:
        self._epoch, self._number, self._index, self._num_taken, self._offset = epoch, 0, 0, 0, 0
        self._reader = self._samples.records.read()
        self._block: list[Ticket] = []
        self._remember_start()

    def _next_block(self) -> None:
        self._number += bool(self._block)
        self._read_block()
        if not self._block:
            is_last = self._num_epochs is not None and self._epoch + 1 >= self._num_epochs
            self._samples.check_number(self._num_taken)
            if is_last or self._num_taken == 0:
                raise StopIteration
            self._start(self._epoch + 1)
            self._read_block()

    def _read_block(self) -> None:
        """Reads the next samples of this side, and puts them in the order of this block."""
        self._remember_start()
        block: list[Ticket] = []
        num_wanted = self._samples.num_samples
        while len(block) < self._samples.spec.shuffle_buffer and (num_wanted is None or self._num_taken < num_wanted):
            row = next(self._reader, None)
            if row is None:
                break
            if self._samples.has(self._index, row):
                self._num_taken += 1
                if self._index > self._after:
                    block.append(Ticket(self._epoch, self._index, row))
            self._index += 1
        self._offset = 0
        self._block = block if self._seed is None else self._permuted(block, self._seed)

    def _permuted(self, block: list[Ticket], seed: int) -> list[Ticket]:
        order = torch.randperm(len(block), generator=_generator(seed, self._epoch, self._number + 1))
        return [block[i] for i in order.tolist()]

    def _remember_start(self) -> None:
        self._block_start = {
            "epoch": self._epoch,
            "block": self._number,
            "index": self._index,
            "num_taken": self._num_taken,
            "position": self._reader.position(),
        }


def _generator(seed: int, *numbers: int) -> torch.Generator:
    """A generator of its own for every pass and block."""
    text = "/".join(str(number) for number in (seed, *numbers))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
