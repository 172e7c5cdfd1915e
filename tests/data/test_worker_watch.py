"""Laws of watched data workers: one that hangs or dies costs time, and neither a sample nor the order."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch

from fraqat.data import worker_watch
from fraqat.data.loader import SampleStream
from fraqat.data.samples import IndexedSamples
from fraqat.data.worker_watch import WorkerRestartWarning, WorkerSpec
from fraqat.errors import DataError

NUM_ROWS = 24


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_watch, "_POLL_S", 0.5)


class Rows:
    def __init__(self, hangs_at: int | None = None):
        self.hangs_at = hangs_at

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int):
        if index == self.hangs_at:
            time.sleep(3600)
        return {"x": torch.tensor(index)}


def read(key: str, row):
    return dict(row)


def stream(timeout_s: float, num_epochs: int = 1, **rows) -> SampleStream:
    samples = IndexedSamples(Rows(**rows), range(NUM_ROWS), read)
    return SampleStream(samples, 0, num_epochs=num_epochs, workers=WorkerSpec(2, timeout_s))


def places(source: SampleStream, disturb=None) -> list[int]:
    found: list[int] = []
    for sample in source:
        found.append(int(sample["x"]))
        if disturb is not None and len(found) == 5:
            disturb(source._loader._iterator._workers)
    return found


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_stops_is_replaced_at_the_same_sample(number: int) -> None:
    expected = places(stream(30.0, num_epochs=2))
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.warns(WorkerRestartWarning, match="given nothing for 3 s|a data worker died"):
        found = places(stream(3.0, num_epochs=2), lambda workers: os.kill(workers[0].pid, number))
    assert found == expected
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_worker_that_ends_while_it_asks_whether_to_end_does_not_stop_the_main_process() -> None:
    expected = places(stream(30.0, num_epochs=2))
    samples = stream(3.0, num_epochs=2)

    def disturb(workers: Any) -> None:
        samples._loader._iterator._workers_done_event._cond._lock.acquire()  # as the worker had it, and never gives it back
        os.kill(workers[0].pid, signal.SIGKILL)

    with pytest.warns(WorkerRestartWarning, match="given nothing for 3 s|a data worker died"):
        assert places(samples, disturb) == expected


def test_a_sample_that_never_comes_ends_with_a_message() -> None:
    with (
        pytest.warns(WorkerRestartWarning, match=r"given nothing for 3 s \(data\.worker_timeout_s\)"),
        pytest.raises(
            DataError, match=r"also after 2 new starts at the same sample. Fix: look at the storage"
        ) as error,
    ):
        places(stream(3.0, hangs_at=7))
    assert error.value.exit_code == 3


def test_an_error_inside_a_worker_is_not_taken_for_its_death() -> None:
    class Broken(Rows):
        def __getitem__(self, index: int):
            raise RuntimeError("disk on fire")

    samples = IndexedSamples(Broken(), range(NUM_ROWS), read)
    with pytest.raises(RuntimeError, match="disk on fire"):
        places(SampleStream(samples, 0, num_epochs=1, workers=WorkerSpec(1, 5.0)))
