"""`fraqat status`: whether a run lives, from the files in its folder alone."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fraqat.table import Table
from fraqat.workflows.heartbeat import HEARTBEAT_FILES, is_running
from fraqat.workflows.runs import RunFolder

EXIT_STALLED, EXIT_DEAD = 9, 10
_LARGEST = 1e15  # seconds and losses of runs that exist
_COLUMNS = (
    "run",
    "rank",
    "state",
    "step",
    "of",
    "stage",
    "bits",
    "loss",
    "last sign, s ago",
    "time left",
    "checkpoint",
)
_KEYS = ("state", "step", "time", "host", "pid", "pid_started", "rank", "next_within_s")


class RunState(StrEnum):
    """What a run is doing."""

    ALIVE = "alive"
    STALLED = "stalled"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    NOT_STARTED = "not started"

    @property
    def exit_code(self) -> int:
        """0 alive, finished, or waiting to be started; see `EXIT_STALLED`, `EXIT_DEAD`."""
        if self is RunState.STALLED:
            return EXIT_STALLED
        return EXIT_DEAD if self in (RunState.FAILED, RunState.INTERRUPTED) else 0


@dataclass(frozen=True)
class ProcessStatus:
    """One process of a run, or a run without one.

    Args:
        run: Name of the run: `.` or `baselines/NAME`.
        state: See `RunState`.
        beat: Its heartbeat, empty if there is none.
        age_s: Of the heartbeat.
        checkpoint_step: Steps that the newest checkpoint holds; None without one.
        message: What should be known or done.
    """

    run: str
    state: RunState
    beat: dict[str, Any]
    age_s: float | None
    checkpoint_step: int | None
    message: str | None

    def to_row(self) -> tuple[Any, ...]:
        """For a table."""
        beat = self.beat
        stage, num_stages = beat.get("stage"), beat.get("num_stages")
        age = None if self.age_s is None else round(self.age_s)
        left = beat.get("left_s") if self.state is RunState.ALIVE else None
        return (
            self.run,
            beat.get("rank"),
            self.state.value,
            beat.get("step"),
            beat.get("total_steps"),
            None if stage is None or num_stages is None else f"{stage + 1}/{num_stages}",
            beat.get("bits"),
            beat.get("loss"),
            age,
            None if left is None else _duration(left),
            self.checkpoint_step,
        )


@dataclass(frozen=True)
class RunStatus:
    """A run with its baselines."""

    path: Path
    processes: tuple[ProcessStatus, ...]

    @property
    def exit_code(self) -> int:
        """The worst of all processes."""
        return max(process.state.exit_code for process in self.processes)

    def to_table(self) -> Table:
        """A row for every process."""
        notes = tuple(f"{process.run}: {process.message}" for process in self.processes if process.message)
        return Table(f"Status of {self.path}", _COLUMNS, tuple(p.to_row() for p in self.processes), notes)


def status(run: RunFolder, clock: Callable[[], float] = time.time) -> RunStatus:
    """Looks at a run and its baselines. Nothing is changed, and no lock is taken.

    Args:
        run: A run folder, of a run that may be at work.
        clock: Seconds since 1970.
    """
    folders = [("baselines/" + path.name, RunFolder(path)) for path in sorted((run.path / "baselines").glob("*/"))]
    found: list[ProcessStatus] = []
    for name, one in [*folders, (".", run)]:
        if (one.path / "recipe.yaml").is_file():
            found += _processes(name, one, clock())
    return RunStatus(run.path, tuple(found))


def _processes(name: str, run: RunFolder, now: float) -> list[ProcessStatus]:
    newest = _newest_checkpoint(run.path / "checkpoints")
    beats = [beat for path in sorted(run.path.glob(HEARTBEAT_FILES)) if (beat := _read(path)) is not None]
    if run.is_finished or not beats:
        state = RunState.FINISHED if run.is_finished else RunState.NOT_STARTED
        message = (
            None if run.is_finished else "no process has worked here yet; `fraqat train` with its recipe starts it"
        )
        last = beats[0] if beats else {}
        return [ProcessStatus(name, state, last, now - last["time"] if last else None, newest, message)]
    return [_judge(name, beat, now, newest) for beat in sorted(beats, key=lambda beat: beat["rank"])]


def _judge(name: str, beat: dict[str, Any], now: float, newest: int | None) -> ProcessStatus:
    age = now - beat["time"]
    again = "run the same `fraqat train` again to go on from the newest checkpoint"
    running = is_running(beat)

    def found(state: RunState, message: str | None = None) -> ProcessStatus:
        return ProcessStatus(name, state, beat, age, newest, message)

    if beat["state"] == "interrupted":
        return found(RunState.INTERRUPTED, f"stopped by a signal; {again}")
    if beat["state"] == "failed":
        return found(RunState.FAILED, f"{beat.get('message')}")
    if running is False:
        return found(
            RunState.FAILED, f"process {beat['pid']} ended without a word (killed, or out of host memory); {again}"
        )
    if age > beat["next_within_s"]:
        where = f"process {beat['pid']} on {beat['host']}"
        seen = "runs" if running else "may run or not: it is on another machine"
        said = f"silent for {age:.0f} s in phase {beat.get('phase')}, {where} {seen}"
        return found(RunState.STALLED, f"{said}; look at it, end it, then {again}")
    return found(RunState.ALIVE)


def _read(path: Path) -> dict[str, Any] | None:
    """A heartbeat; None where it is damaged, as after a full disk."""
    try:
        beat = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(beat, dict) and all(key in beat for key in _KEYS)
    return beat if is_whole and all(check(beat.get(key)) for key, check in _CHECKS.items()) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "pid", "rank"), _is_count),
    **dict.fromkeys(("time", "next_within_s"), _is_number),
    **dict.fromkeys(("state", "host"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("stage", "num_stages", "total_steps", "pid_started"), _or_none(_is_count)),
    **dict.fromkeys(("bits", "loss", "left_s"), _or_none(_is_number)),
    **dict.fromkeys(("phase", "message"), _or_none(lambda value: isinstance(value, str))),
}


def _newest_checkpoint(folder: Path) -> int | None:
    names = [path.name for path in folder.glob("step-*")] if folder.is_dir() else []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name))]
    return max(steps, default=None)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
