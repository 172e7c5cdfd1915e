"""The processes that train one student together: who computes what, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.distributed as dist

from fraqat.distill.spec import ParallelSpec
from fraqat.distill.task import Batch, BatchStream
from fraqat.errors import ConfigError, FraqatError, config_error

_T = TypeVar("_T")
_LOST_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
"""Of gloo, which has no error class of its own for it."""


class Workers:
    """The processes of a run, one of which this is. One alone is the usual case, and talks to nobody.

    Args:
        rank: Number of this process, from 0.
        num: How many there are.
        local_num: How many of them are on this machine.
    """

    def __init__(self, rank: int = 0, num: int = 1, local_num: int = 1):
        self.rank, self.num, self.local_num = rank, num, local_num

    @property
    def is_first(self) -> bool:
        """Whether this process writes reports and talks to people."""
        return self.rank == 0

    def parts(self, num_parts: int) -> range:
        """The parts of a batch that this process computes: as many as every other, one after the other.

        Raises:
            ConfigError: They cannot be shared equally.
        """
        if num_parts % self.num:
            raise config_error(
                "train.accumulation",
                num_parts,
                allowed=f"a multiple of {self.num}, since the parts of a batch are shared equally by {self.num} processes",
                fix=f"set train.accumulation: {self.num * -(-num_parts // self.num)}, or start another number of processes",
            )
        own = num_parts // self.num
        return range(self.rank * own, (self.rank + 1) * own)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, in the order of their ranks; all give equally many."""
        if self.num == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.num)]
        dist.all_gather(found, own)
        return [part.tolist() for part in found]

    def agree(self, signal_number: int, is_busy: bool) -> tuple[int, bool]:
        """A signal that one process has received is everybody's, and one that is busy makes all wait."""
        told = self.gather([signal_number, is_busy])
        return int(max(row[0] for row in told)), any(row[1] for row in told)

    def gather_text(self, text: str) -> list[str]:
        """A text of every process, in the order of their ranks."""
        if self.num == 1:
            return [text]
        found: list[Any] = [None] * self.num
        dist.all_gather_object(found, text)
        return found

    def first(self, run: Callable[[], _T]) -> _T | None:
        """Lets the first process do something while the others wait; its error becomes everybody's.

        Returns:
            What `run` gives, None in the other processes.

        Raises:
            Exception: What `run` raised, whatever it is, in the first process. The others raise a `FraqatError` with the same
                words, and with the same exit code if it is an error of ours.
        """
        return run() if self.num == 1 else self._first(run, is_told=False)

    def tell(self, run: Callable[[], _T]) -> _T:
        """`first`, and everybody gets what `run` gives.

        Args:
            run: Gives plain values, as JSON has them.
        """
        return run() if self.num == 1 else cast(_T, self._first(run, is_told=True))

    def _first(self, run: Callable[[], _T], *, is_told: bool) -> _T | None:
        result: _T | None = None
        failure: BaseException | None = None
        if self.is_first:
            try:
                result = run()
            except BaseException as error:  # noqa: BLE001 - raised again, once the others know that they need not wait
                failure = error
        told: list[Any] = [None if failure is None else _in_words(failure), result if is_told else None]
        dist.broadcast_object_list(told, src=0)
        if failure is not None:
            raise failure
        if told[0] is not None:
            text, exit_code = told[0]
            other = FraqatError(f"process 0: {text}")
            other.exit_code = exit_code
            raise other
        return told[1] if is_told else result


ALONE = Workers()
"""One process."""


@runtime_checkable
class SkippingStream(Protocol):
    """A stream that can pass over a batch without reading it."""

    def skip(self) -> None:
        """The next batch counts as given."""
        ...


class SharedStream:
    """A stream of the parts of batches of which a process takes its own.

    The position is that of the whole stream and the same in every process, so that any number of processes can go on from it.

    Args:
        stream: All parts in order.
        num_parts: Of one batch.
        own: Those that this process computes.
    """

    def __init__(self, stream: BatchStream, num_parts: int, own: range):
        self._stream, self._num_parts, self._own = stream, num_parts, own
        self._iterator: Iterator[Batch] | None = None

    def next_parts(self) -> Iterator[tuple[int, Batch]]:
        """The own parts of the next batch, with their numbers. Afterwards the stream stands behind the whole batch."""
        if self._iterator is None:
            self._iterator = iter(self._stream)
        for number in range(self._num_parts):
            if number in self._own:
                yield number, next(self._iterator)
            elif isinstance(self._stream, SkippingStream):
                self._stream.skip()
            else:
                next(self._iterator)

    def state_dict(self) -> dict[str, Any]:
        """Position of the whole stream."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`; call it before the first part is taken."""
        self._stream.load_state_dict(state)


@contextmanager
def joined(spec: ParallelSpec, device: torch.device) -> Generator[Workers]:
    """Meets the other processes that `torchrun` has started, and parts from them at the end.

    Without `torchrun` (no `WORLD_SIZE`), or where the caller has joined them already, it does nothing.

    Args:
        spec: `mode` and `timeout_s`.
        device: On which this process trains; decides between NCCL and gloo.

    Raises:
        ConfigError: There are several processes and the recipe is for one, or more processes than GPUs.
        FraqatError: Another process has ended, or has not answered in time.
    """
    if dist.is_initialized():
        yield current_workers()
        return
    num = int(os.environ.get("WORLD_SIZE", "1"))
    check_mode(spec, num)
    if num == 1:
        yield ALONE
        return
    _take_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=spec.timeout_s)
    try:
        _meet(backend, timeout)
        yield current_workers()
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise FraqatError(
            f"another process of this run has ended or does not answer ({str(error).splitlines()[0][:200]}): its own message "
            "says why. Fix: mend that, then run the same command again; it goes on from the newest checkpoint."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str, timeout: timedelta) -> None:
    store = _store_of_this_start(timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank, num = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=num)


def _store_of_this_start(timeout: timedelta) -> dist.Store | None:
    """Where the processes leave their addresses, apart from those of earlier starts; None: torch's own place.

    `torchrun` gives processes that it starts again the store of those before, whose addresses are still there: gloo then waits
    for a process that is gone, until its timeout. The starts of one machine have numbers, the same in all of its processes.
    Several machines number them apart; there `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` lets torchrun make a store for each start.
    """
    number = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if number is None or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return None
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"start-{number}", store)


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST_TEXTS)


def _in_words(error: BaseException) -> tuple[str, int]:
    """Text and exit code for processes that cannot see the error itself, and whose own is one of ours."""
    if isinstance(error, FraqatError):
        return str(error), error.exit_code
    kind = type(error).__name__
    return f"{kind}: {error}. Fix: look at the message of that process." if str(error) else kind, FraqatError.exit_code


def check_mode(spec: ParallelSpec, num: int) -> None:
    """Refuses a recipe for one process in several, each of which would train everything.

    Raises:
        ConfigError: It is one.
    """
    if num > 1 and spec.mode == "none":
        raise config_error(
            "train.parallel.mode",
            spec.mode,
            allowed=f"ddp, fsdp2 or hybrid in {num} processes",
            fix="set train.parallel.mode, or start one process",
        )


def is_first_process() -> bool:
    """Whether this is the one process that talks to people, as `torchrun` numbers them; also after they have parted."""
    return int(os.environ.get("RANK", "0")) == 0


def current_workers() -> Workers:
    """The processes of this program: those of torch.distributed, or one alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    num = dist.get_world_size()
    return Workers(dist.get_rank(), num, int(os.environ.get("LOCAL_WORLD_SIZE", num)))


def _take_device(device: torch.device) -> None:
    """Makes the GPU that `torchrun` numbers for this process the one that `cuda` means.

    Raises:
        ConfigError: This machine has fewer GPUs than processes.
    """
    index, has_index = int(os.environ.get("LOCAL_RANK", "0")), cast("int | None", device.index) is not None
    if device.type != "cuda" or has_index:
        return
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"process {index} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. Fix: start "
            "torchrun with --nproc-per-node at most that."
        )
    torch.cuda.set_device(index)
