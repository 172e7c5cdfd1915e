"""Where the trials of `faults.py` are made: runs of `fault_child.py`, the undisturbed ones, and what is compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_child import Settings, run_in_fork
from fraqat.distill import CheckpointStore, read_log

TIMEOUT_S = 300
EQUAL, STOPPED, BROKEN = "equal", "stopped", "broken"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one trial: `equal`, `stopped` or `broken`, and the message or the reason."""

    kind: str
    text: str = ""


class Lab:
    """A folder for all trials, and the undisturbed runs that they are compared with.

    Args:
        root: Work folder.
        seed: Decides when and where faults happen.
    """

    def __init__(self, root: Path, seed: int = 0):
        self.root = root
        self.random = random.Random(seed)
        self._references: dict[Any, str] = {}
        self._spans: dict[Any, float] = {}
        self._number = 0

    def new_folder(self) -> Path:
        """A run folder that does not exist yet; encoded data lie beside it."""
        self._number += 1
        return self.root / f"{self._number:04d}" / "run"

    def settings(self, folder: Path, **changes: Any) -> Settings:
        """Of a trial."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Settings(folder=str(folder), **changes)

    def start(self, settings: Settings) -> int:
        """A training process."""
        return run_in_fork(settings, Path(settings.folder).parent / "errors.txt")

    def finish(self, settings: Settings) -> int:
        """Runs a process to its end, and gives its exit code."""
        return wait(self.start(settings))

    def reference(self, **changes: Any) -> tuple[str, float]:
        """Digest of the undisturbed run's weights and its seconds; computed once."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self._references:
            settings = self.settings(self.new_folder(), **changes)
            start = time.monotonic()
            code = self.finish(settings)
            assert code == 0, messages(settings)
            self._references[key] = digest(settings)
            self._spans[key] = time.monotonic() - start
        return self._references[key], self._spans[key]

    def judge(self, settings: Settings, stopped_with: str = "", **changes: Any) -> Outcome:
        """Runs without the fault until it ends, and compares with the undisturbed run."""
        code = self.finish(settings)
        if code != 0:
            return Outcome(BROKEN, f"exit code {code}: {messages(settings)[-300:]}")
        if digest(settings) != self.reference(**changes)[0]:
            return Outcome(BROKEN, "the weights differ")
        steps = [event["step"] for event in read_log(Path(settings.folder)) if event["event"] == "step"]
        if steps != list(range(settings.steps)):
            return Outcome(BROKEN, f"the log has {len(steps)} steps")
        return Outcome(STOPPED, stopped_with) if stopped_with else Outcome(EQUAL)

    def expect_stop(self, settings: Settings, code: int, *words: str) -> str | Outcome:
        """Runs with the fault; the message, which holds one of `words`, if it stopped as it should."""
        found = self.finish(settings)
        text = messages(settings)
        last = text.split("error: ")[-1]
        if found != code or not any(word in last for word in words) or "Traceback" in text:
            return Outcome(BROKEN, f"exit code {found} instead of {code}: {text[-300:]}")
        return last.strip()


def wait(pid: int) -> int:
    """Exit code of a process; 128 + the signal's number if one ended it."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 124


def kill(pid: int, *, group: bool = False) -> None:
    """kill -9, of the process alone or with its workers."""
    (os.killpg if group else os.kill)(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def digest(settings: Settings) -> str:
    """SHA-256 of the weights that a run left."""
    return hashlib.sha256((Path(settings.folder) / "student.safetensors").read_bytes()).hexdigest()


def messages(settings: Settings) -> str:
    """Everything that the processes of a trial said."""
    path = Path(settings.folder).parent / "errors.txt"
    return path.read_text() if path.exists() else ""


def checkpoints(settings: Settings) -> list[Path]:
    """Folders of the checkpoints, oldest first."""
    return sorted((Path(settings.folder) / "checkpoints").glob("step-*"))


def newest_step(settings: Settings) -> int:
    """Steps of the newest checkpoint, sound or not; 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints(settings)), default=0)


def _fingerprint(settings: Settings) -> dict[str, Any]:
    """What the checkpoints of a trial share, of one whose manifest can be read."""
    for folder in checkpoints(settings):
        try:
            return json.loads((folder / "manifest.json").read_text())["fingerprint"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return {}


def newest_sound(settings: Settings) -> int:
    """Steps of the newest sound checkpoint, 0 without one; only while no process is at work there."""
    store = CheckpointStore(Path(settings.folder) / "checkpoints", _fingerprint(settings), warn=lambda text: None)
    loaded = store.load_latest()
    return 0 if loaded is None else loaded.step


def until(is_so: Callable[[], object]) -> None:
    """Waits for something that a process does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.0005)
