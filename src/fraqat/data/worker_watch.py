"""Worker processes that hang or die: noticed, ended, and started again at the sample that did not come."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from fraqat.errors import DataError

NUM_RESTARTS = 2
"""Without a sample in between; then the run stops."""

_POLL_S = 5.0
_LOCKED_S = 1.0
_TIMED_OUT = "DataLoader timed out"
_RAISED_INSIDE = "in DataLoader worker process"
_DIED = ("exited unexpectedly", "is killed by signal")


class WorkerRestartWarning(UserWarning):
    """Worker processes were started again."""


@dataclass(frozen=True)
class WorkerSpec:
    """Worker processes of a loader.

    Args:
        num_workers: 0 reads in the main process, which nothing watches.
        timeout_s: Silence after which workers count as hung.
    """

    num_workers: int = 0
    timeout_s: float = 300.0

    @property
    def limit_s(self) -> float:
        """For torch's loader, which takes it for the start of workers too; 0, its word for never, without workers."""
        return self.timeout_s if self.num_workers else 0.0

    @property
    def poll_s(self) -> float:
        """Seconds between two looks at whether the workers are alive."""
        return min(_POLL_S, self.timeout_s)


DEFAULT_WORKERS = WorkerSpec()


def watched(loader: Any, make_loader: Callable[[], Any], spec: WorkerSpec) -> Iterator[tuple[Any, Any]]:
    """Items of a `StatefulDataLoader`, from another one where its workers hang or die.

    Args:
        loader: To begin with; made with `timeout=spec.limit_s`.
        make_loader: Makes another one.
        spec: When to lose patience.

    Yields:
        The loader now in use, and its next item.

    Raises:
        DataError: The workers hang or die at the same sample again and again.
    """
    reason, iterator = _iterate(loader, spec)
    num_restarts, item = 0, None
    while True:
        if reason is None:
            with _Watchdog(iterator, spec) as watchdog:
                reason, item = _next(iterator, spec, watchdog)
        if reason is None:
            if item is _END:
                return
            num_restarts = 0
            yield loader, item
            continue
        if num_restarts == NUM_RESTARTS:
            _end_workers(iterator)
            raise DataError(
                f"{reason}, also after {NUM_RESTARTS} new starts at the same sample. Fix: look at the storage that the data is "
                "on; raise data.worker_timeout_s where reading is slow; set data.num_workers: 0 to see where it hangs, or less "
                "where host memory is short. The run goes on from its newest checkpoint with the same command."
            )
        num_restarts += 1
        warnings.warn(f"{reason}: starting them again at the same sample", WorkerRestartWarning, stacklevel=2)
        state = loader.next_iter_state if iterator is None else loader.state_dict()
        _end_workers(iterator)
        loader = make_loader()
        if state is not None:
            loader.load_state_dict(state)
        reason, iterator = _iterate(loader, spec)


_END = object()


def _iterate(loader: Any, spec: WorkerSpec) -> tuple[str | None, Any]:
    """The loader's iterator, without torch's handler for ended workers, or the reason why there is none.

    The handler raises in the main thread wherever it is, in the middle of an optimizer step too; `_next` looks instead.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if is_main else None
    try:
        iterator = iter(loader)
    except (RuntimeError, EOFError, ConnectionError) as error:
        if _TIMED_OUT in str(error):
            return f"data workers have not started in {spec.timeout_s:g} s (data.worker_timeout_s)", None
        if spec.num_workers and _is_death(error):
            return f"a data worker died ({error})", None
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGCHLD, handler)
    if spec.num_workers:
        iterator._timeout = spec.poll_s
    return None, iterator


def _is_death(error: BaseException) -> bool:
    """Of a worker; a connection to one ends in the middle of a tensor too. What it raised itself is another thing."""
    if _RAISED_INSIDE in str(error):
        return False
    return isinstance(error, EOFError | ConnectionError) or any(words in str(error) for words in _DIED)


class _Watchdog:
    """Ends workers while the main process waits for one that cannot be waited for with a limit.

    A tensor comes as a file descriptor, which its worker hands over when it is asked; one that is stopped never does, and
    torch's own limit covers the queue alone. One that is ended while it asks whether it should end leaves that question locked.
    Use it as a context around the wait.
    """

    def __init__(self, iterator: Any, spec: WorkerSpec):
        self.has_fired = False
        self._iterator = iterator
        self._workers: list[Any] = getattr(iterator, "_workers", [])
        self._timer = threading.Timer(spec.timeout_s + 2 * spec.poll_s, self._fire) if self._workers else None

    def __enter__(self) -> Self:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        self.has_fired = True
        for process in self._workers:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        _unlock(self._iterator)


def _next(iterator: Any, spec: WorkerSpec, watchdog: _Watchdog) -> tuple[str | None, Any]:
    """The next item, or the reason why there is none."""
    hung = f"data workers have given nothing for {spec.timeout_s:g} s (data.worker_timeout_s)"
    start = time.monotonic()
    while True:
        try:
            return None, next(iterator, _END)
        except (RuntimeError, EOFError, OSError) as error:
            text = str(error)
            if watchdog.has_fired:
                return hung, None
            if spec.num_workers and _is_death(error):
                return f"a data worker died ({(text or repr(error)).splitlines()[0]})", None
            if _TIMED_OUT not in text:
                raise
        if time.monotonic() - start >= spec.timeout_s:
            return hung, None


def _unlock(iterator: Any) -> None:
    """Frees the lock of the event that ends workers, where one of them had it when it was ended.

    Workers have it for microseconds, so does the main process; who has it for longer is dead.
    """
    event = getattr(iterator, "_workers_done_event", None)
    if event is not None:
        event._cond._lock.acquire(timeout=_LOCKED_S)
        event._cond._lock.release()


def _end_workers(iterator: Any) -> None:
    """A stopped process does not obey a polite signal."""
    if iterator is None:
        return
    for process in getattr(iterator, "_workers", []):
        with suppress(RuntimeError):
            process.kill()
            process.join(_POLL_S)
    _unlock(iterator)
    with suppress(RuntimeError):
        iterator._shutdown_workers()
