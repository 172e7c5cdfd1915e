"""A step that does not fit in memory: computed again in smaller parts of the same batch, by all processes alike."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fraqat.distill.losses import LossSpec
from fraqat.distill.task import Batch, DistillTask, SplittableTask
from fraqat.distill.watch_spec import OutOfMemory
from fraqat.distill.workers import ALONE, Workers
from fraqat.errors import CheckpointError, DeviceMemoryError, config_error
from fraqat.files import write_json_atomic

_T = TypeVar("_T")
MICRO_BATCH_EVENT = "micro_batch"
SPLIT_FILE = "micro_batch.json"
_CPU_TEXTS = ("can't allocate memory", "not enough memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_TEXTS)


class MicroBatch:
    """How often each part of a batch is halved.

    Attributes:
        num_splits: Pieces of a part; 1 is the part itself.

    Several processes agree after every try: where one has too little memory, all begin anew with smaller pieces. They cannot
    agree where they meet inside the passes, which one that breaks off leaves the others waiting in: it stops, and writes down
    that the next start takes smaller pieces.

    Args:
        action: `stop` or `split`.
        part_size: Samples of a part: `samples_of_part`.
        say: Told about every halving.
        workers: Split alike.
        record: File in which a process that cannot agree with the others leaves the number of pieces; None where it can.
    """

    def __init__(
        self,
        action: OutOfMemory,
        part_size: int,
        say: Callable[[str], None],
        workers: Workers = ALONE,
        record: Path | None = None,
    ):
        self._action, self._part_size, self._say = action, part_size, say
        self._workers, self._record = workers, record
        self.num_splits = 1

    @property
    def size(self) -> int:
        """Samples of a forward pass, at most."""
        return -(-self._part_size // self.num_splits)

    def run(self, compute: Callable[[int], _T], step: int) -> _T:
        """Calls `compute` with the number of pieces, again with twice as many while memory does not suffice.

        torch's random state is put back before a new try, so that it does not count how often one was needed.

        Args:
            compute: All gradients of a step, from none; what it gives is given.
            step: For the message.

        Raises:
            DeviceMemoryError: It does not fit, and may not be split or is a single sample.
        """
        before = _random_state()
        while True:
            found: list[_T] = []
            reason = ""
            try:
                found.append(compute(self.num_splits))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0] or type(error).__name__
            reason = self._told(reason)
            if not reason:
                return found[0]
            # Outside of the handler, whose traceback holds the tensors of the failed try.
            found.clear()
            _release_memory()
            if self._action == "stop" or self.size == 1:
                raise DeviceMemoryError(self._message(step, reason))
            if self._record is not None:
                write_json_atomic(self._record, {"num_splits": 2 * self.num_splits})
                raise DeviceMemoryError(self._message(step, reason))
            self.num_splits *= 2
            self._say(f"out of memory at step {step}: going on with {self.size} samples at a time instead of more")
            _set_random_state(before)

    def _told(self, reason: str) -> str:
        """Why a process has failed, this one or another; empty if none has."""
        if self._workers.num == 1 or self._action == "stop" or self._record is not None:
            return reason
        has_failed = any(row[0] for row in self._workers.gather([bool(reason)]))
        return next(filter(None, self._workers.gather_text(reason))) if has_failed else ""

    def load_record(self) -> bool:
        """Takes up what a process that ran out of memory has left for this start; whether more pieces follow from it.

        Raises:
            CheckpointError: It cannot be read.
        """
        path = self._record
        if path is None:
            return False
        before = self.num_splits
        self.num_splits = max(before, self._workers.tell(lambda: _read_record(path)))
        return self.num_splits > before

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes up the number of pieces of a checkpoint, unless more are needed already."""
        self.num_splits = max(self.num_splits, state["num_splits"])

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        return {"num_splits": self.num_splits}

    def _message(self, step: int, reason: str) -> str:
        fix = "Fix: set train.on_out_of_memory: split, or raise train.accumulation."
        if self.size == 1:
            fix = "A single sample does not fit."
        elif self._record is not None and self._action == "split":
            fix = (
                f"The next start computes at most {-(-self._part_size // (2 * self.num_splits))} at a time. Fix: run the same "
                "command again, or let torchrun do so (--max-restarts)."
            )
        return f"out of memory at step {step} with {self.size} samples at a time ({reason[:200]}). {fix}"


def _read_record(path: Path) -> int:
    if not path.exists():
        return 1
    try:
        return max(1, int(json.loads(path.read_text(encoding="utf-8"))["num_splits"]))
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}. Fix: remove it.") from error


def check_splitting(task: DistillTask, action: OutOfMemory, losses: Sequence[LossSpec]) -> None:
    """Refuses to compute parts in pieces where that cannot be.

    Raises:
        ConfigError: The task has no `split_inputs`, or a loss is no mean over samples.
    """
    if action != "split":
        return
    field = "train.on_out_of_memory"
    if not isinstance(task, SplittableTask):
        raise config_error(field, "split", allowed="stop for a task without split_inputs", fix="add the method")
    if any(
        term.name == "hidden_mse" for term in losses
    ):  # a ratio of two means: that of a batch is not its pieces' mean
        raise config_error(field, "split", allowed="stop with the loss hidden_mse", fix="raise train.accumulation")


def split_batch(inputs: Batch, num_parts: int, shared: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Cuts a batch along its first axis.

    Args:
        inputs: Columns of N values each: tensors [N, ...], or lists of N.
        num_parts: At most N are made; their sizes differ by one at most.
        shared: Columns without such an axis, which every part gets whole.
    """
    num_rows = next(len(value) for name, value in inputs.items() if name not in shared)
    num_parts = min(num_parts, num_rows)
    ends = [num_rows * (i + 1) // num_parts for i in range(num_parts)]
    starts = [0, *ends[:-1]]
    return [
        {name: value if name in shared else value[start:end] for name, value in inputs.items()}
        for start, end in zip(starts, ends, strict=True)
    ]


def shares_of(counts: list[int]) -> list[float]:
    """What each part counts in a mean over all; equal shares where there is nothing to count."""
    total = sum(counts)
    return [count / total if total else 1 / len(counts) for count in counts]


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
