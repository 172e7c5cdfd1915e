"""The sign of life of a training process: `heartbeat.json` in the run's folder, replaced atomically."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fraqat.distill import StepRecord
from fraqat.errors import FraqatError, InterruptedRunError

HEARTBEAT_FILES = "heartbeat*.json"
_LEAST_INTERVAL_S = 1.0
_LEAST_SILENCE_S = 60.0
_STEPS_OF_SILENCE = 20
_PHASE_SILENCE_S = 3600.0
"""Preparing, validating and saving tell nothing until they are done; recording tells at every file."""


class Heartbeat:
    """Says where a process is, at most once a second. Use it as a context around everything that the run does.

    The file holds `state` (`running`, `finished`, `interrupted`, `failed`), `phase`, `step` (finished steps), `total_steps`,
    `stage`, `bits`, `loss`, `left_s`, `time`, `started`, `next_within_s` (silence that is still normal), `pid`, `pid_started`,
    `host`, `rank` and `message`. A file that cannot be written never stops the training: what the run itself has to write will.

    Args:
        folder: The run folder, which exists.
        clock: Seconds since 1970.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        rank = int(os.environ.get("RANK", "0"))
        self._path = folder / ("heartbeat.json" if rank == 0 else f"heartbeat-rank{rank}.json")
        self._clock, self._written = clock, -math.inf
        self._values: dict[str, Any] = {
            "state": "running",
            "phase": "preparing",
            "step": 0,
            "pid": os.getpid(),
            "pid_started": process_start(os.getpid()),
            "host": socket.gethostname(),
            "rank": rank,
            "started": clock(),
            "next_within_s": _PHASE_SILENCE_S,
        }

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state = "finished" if error is None else "failed"
        if isinstance(error, InterruptedRunError | KeyboardInterrupt):
            state = "interrupted"
        message = None if error is None else str(error) if isinstance(error, FraqatError) else repr(error)
        self._values |= {"state": state, "phase": None, "message": message}
        self._write()

    def phase(self, phase: str) -> None:
        """Something else than steps begins."""
        self._values |= {"phase": phase, "next_within_s": _PHASE_SILENCE_S}
        self._write()

    def step(self, record: StepRecord) -> None:
        """After an optimizer step."""
        silence = max(_LEAST_SILENCE_S, _STEPS_OF_SILENCE * record.step_ms / 1000)
        is_first = self._values["phase"] != "training"
        self._values |= {
            "phase": "training",
            "step": record.step + 1,
            "total_steps": record.total_steps,
            "stage": record.stage,
            "num_stages": record.num_stages,
            "bits": record.bits,
            "loss": record.loss if math.isfinite(record.loss) else None,
            "left_s": record.left_s,
            "next_within_s": silence,
        }
        if is_first or self._clock() - self._written >= _LEAST_INTERVAL_S:
            self._write()

    def _write(self) -> None:
        self._written = self._clock()
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps({**self._values, "time": self._written}) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in the kernel's ticks: tells a process from a later one with the same number.

    None where it does not run, or where the system has no /proc.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] == "Z" else int(fields[19])


def is_running(beat: dict[str, Any]) -> bool | None:
    """Whether the process of a heartbeat still runs; None if it is another machine's."""
    if beat["host"] != socket.gethostname():
        return None
    if beat["pid_started"] is not None:
        return process_start(beat["pid"]) == beat["pid_started"]
    try:
        os.kill(beat["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
