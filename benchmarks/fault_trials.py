"""The trials of `faults.py`: each disturbs a run of `fault_child.py` in one way, and says what became of it."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fault_child import ROWS_PER_SHARD, WIDTH, Settings, run_in_fork
from fraqat.distill import CheckpointStore, read_log

TIMEOUT_S = 300
EQUAL, STOPPED, BROKEN = "equal", "stopped", "broken"
_CLONE_NEWNS = 0x20000


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

    def expect_stop(self, settings: Settings, code: int, words: str) -> str | Outcome:
        """Runs with the fault; the message if it stopped as it should."""
        found = self.finish(settings)
        text = messages(settings)
        last = text.split("error: ")[-1]
        if found != code or words not in last or "Traceback" in text:
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


def _newest_step(settings: Settings) -> int:
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


def kill_at_random(lab: Lab, *, group: bool = False, **changes: Any) -> Outcome:
    """kill -9 at a moment of the whole run."""
    _, span = lab.reference(**changes)
    settings = lab.settings(lab.new_folder(), **changes)
    pid = lab.start(settings)
    time.sleep(lab.random.uniform(0.0, span))
    kill(pid, group=group)
    return lab.judge(settings, **changes)


def kill_all_at_random(lab: Lab) -> Outcome:
    """kill -9 of the process and its data workers."""
    return kill_at_random(lab, group=True, num_workers=2)


def kill_in_save(lab: Lab) -> Outcome:
    """kill -9 while a checkpoint is being written; the one before must still be sound."""
    settings = lab.settings(lab.new_folder())
    pid = lab.start(settings)
    place = Path(settings.folder) / "checkpoints"
    for number in range(lab.random.randrange(1, 12)):
        if number:
            _until(lambda: not list(place.glob(".*.part")))
        _until(lambda: list(place.glob(".*.part")) or os.waitid(os.P_PID, pid, os.WNOHANG | os.WEXITED | os.WNOWAIT))
    time.sleep(lab.random.uniform(0.0, 0.01))
    before = _newest_step(settings)
    kill(pid)
    was_in_save = bool(list(place.glob(".*.part")))
    sound = newest_sound(settings)
    if sound < before:
        return Outcome(BROKEN, f"checkpoint {before} was lost, {sound} is the newest")
    found = lab.judge(settings)
    return dataclasses.replace(found, text="killed inside a save" if was_in_save else "killed beside a save")


def _until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.0005)


def preempted(lab: Lab) -> Outcome:
    """SIGTERM, as schedulers send: a checkpoint of that very step, exit code 143."""
    _, span = lab.reference()
    settings = lab.settings(lab.new_folder())
    pid = lab.start(settings)
    _until(lambda: (Path(settings.folder) / "log.jsonl").exists() and len(read_log(Path(settings.folder))) > 2)
    time.sleep(lab.random.uniform(0.0, 0.5 * span))
    os.kill(pid, signal.SIGTERM)
    code = wait(pid)
    steps = [event["step"] for event in read_log(Path(settings.folder)) if event["event"] == "step"]
    if code != 143 or newest_sound(settings) != max(steps) + 1:
        return Outcome(BROKEN, f"exit code {code}, checkpoint {newest_sound(settings)} of {max(steps) + 1} steps")
    return lab.judge(settings)


def file_too_large(lab: Lab) -> Outcome:
    """A limit on the size of files (RLIMIT_FSIZE) that the next checkpoint breaks."""
    settings = lab.settings(lab.new_folder(), step_s=0.02)
    pid = lab.start(settings)
    _until(lambda: len(checkpoints(settings)) >= lab.random.randrange(1, 3))
    kill(pid)
    before = newest_sound(settings)
    limited = dataclasses.replace(settings, step_s=0.0, file_limit=lab.random.randrange(100_000, 400_000))
    said = lab.expect_stop(limited, 6, "files saved earlier are untouched")
    if isinstance(said, Outcome):
        return said
    if newest_sound(settings) < before:
        return Outcome(BROKEN, "an earlier checkpoint was lost")
    return lab.judge(dataclasses.replace(settings, step_s=0.0), said)


def disk_full(lab: Lab) -> Outcome:
    """A small file system (tmpfs in a mount namespace of its own), filled until the next checkpoint has no room."""
    settings = lab.settings(lab.new_folder())
    lab.reference()
    left = lab.random.randrange(0, 900_000)
    report = Path(settings.folder).parent / "outcome.json"
    supervisor = os.fork()
    if supervisor == 0:
        outcome = Outcome(BROKEN, "no outcome")
        try:
            outcome = _on_small_disk(lab, settings, left)
        finally:
            report.write_text(json.dumps(dataclasses.asdict(outcome)))
            os._exit(0)
    os.waitpid(supervisor, 0)
    return Outcome(**json.loads(report.read_text()))


def _on_small_disk(lab: Lab, settings: Settings, left: int) -> Outcome:
    folder = Path(settings.folder)
    folder.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    size = b"size=16m"
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC: nobody else sees what is mounted here
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, private, None):
        return Outcome(STOPPED, "not possible here: mounting needs rights")
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, size):
        return Outcome(STOPPED, "not possible here: mounting needs rights")
    pid = lab.start(settings)
    _until(lambda: len(checkpoints(settings)) >= 2)
    os.kill(pid, signal.SIGSTOP)
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - left)))
    before = _newest_step(settings)
    os.kill(pid, signal.SIGCONT)
    code, text = wait(pid), messages(settings)
    if code == 0:
        return Outcome(EQUAL, "there was room enough")
    if code != 6 or "the disk is full" not in text or "Traceback" in text:
        return Outcome(BROKEN, f"exit code {code}: {text[-600:]}")
    if newest_sound(settings) < before:
        return Outcome(BROKEN, f"checkpoint {before} was lost")
    filler.unlink()
    return lab.judge(settings, text.split("error: ")[-1].strip())


def _half_run(lab: Lab, **changes: Any) -> Settings:
    """A run that was killed with two checkpoints on disk; a copy, so that it is trained once."""
    source = lab.root / "half"
    if not source.exists():
        settings = lab.settings(source / "run", step_s=0.01)
        pid = lab.start(settings)
        _until(lambda: len(checkpoints(settings)) >= 2 and _newest_step(settings) >= settings.steps // 3)
        kill(pid)
        newest_sound(settings)  # removes what the kill left half-written
    folder = lab.new_folder()
    shutil.copytree(source, folder.parent)
    (folder.parent / "errors.txt").unlink(missing_ok=True)
    return lab.settings(folder, **changes)


def _damage(lab: Lab, folder: Path) -> str:
    """Flips a byte, cuts or removes a file of a checkpoint."""
    path = lab.random.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    how = lab.random.choice(("flip", "cut", "remove"))
    if how == "flip":
        data[lab.random.randrange(len(data))] ^= 1 << lab.random.randrange(8)
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[: lab.random.randrange(len(data))])
    else:
        path.unlink()
    return f"{how} {path.name}"


def newest_checkpoint_damaged(lab: Lab) -> Outcome:
    """A byte flipped, a file cut or removed in the newest checkpoint: the one before is used."""
    settings = _half_run(lab)
    how = _damage(lab, checkpoints(settings)[-1])
    found = lab.judge(settings)
    return dataclasses.replace(found, text=how if found.kind == EQUAL else f"{how}: {found.text}")


def all_checkpoints_damaged(lab: Lab) -> Outcome:
    """The same in every checkpoint: a message; without them the run begins anew."""
    settings = _half_run(lab)
    for folder in checkpoints(settings):
        next(folder.glob("part-*.safetensors")).write_bytes(b"x")
    said = lab.expect_stop(settings, 4, "Fix:")
    if isinstance(said, Outcome):
        return said
    shutil.rmtree(Path(settings.folder) / "checkpoints")
    return lab.judge(settings, said)


def shard_damaged(lab: Lab) -> Outcome:
    """A shard of the encoded data flipped, cut or removed before a start: it is encoded again."""
    settings = _half_run(lab)
    shard = lab.random.choice(sorted((Path(settings.folder).parent / "data").glob("*/shard-*")))
    folder = shard.parent / "one"
    folder.mkdir()
    shard.rename(folder / shard.name)
    how = _damage(lab, folder)
    for path in folder.iterdir():
        path.rename(shard)
    return dataclasses.replace(lab.judge(settings), text=how)


def shard_damaged_on_disk(lab: Lab) -> Outcome:
    """A flipped byte in a shard that is read while training: found at its first use; the next start encodes it again."""
    settings = _half_run(lab, from_disk=True)
    shard = lab.random.choice(sorted((Path(settings.folder).parent / "data").glob("*/shard-*")))
    data = bytearray(shard.read_bytes())
    data[-1 - lab.random.randrange(ROWS_PER_SHARD * WIDTH)] ^= 4  # a number: a damaged header is found at the start
    shard.write_bytes(data)
    said = lab.expect_stop(settings, 3, "Fix: run the same command again")
    return said if isinstance(said, Outcome) else lab.judge(settings, said)


def _workers_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(number) for number in found.split()]


def _signal_a_worker(lab: Lab, number: int) -> Outcome:
    lab.reference(num_workers=2)
    settings = lab.settings(lab.new_folder(), num_workers=2, step_s=0.02)
    pid = lab.start(settings)
    _until(lambda: len(checkpoints(settings)) >= 1)
    os.kill(lab.random.choice(_workers_of(pid)), number)
    code = wait(pid)
    if code != 0 or "starting them again" not in messages(settings):
        return Outcome(BROKEN, f"exit code {code}: {messages(settings)[-300:]}")
    is_equal = digest(settings) == lab.reference(num_workers=2)[0]
    return Outcome(EQUAL) if is_equal else Outcome(BROKEN, "the weights differ")


def worker_hangs(lab: Lab) -> Outcome:
    """A data worker is stopped (SIGSTOP): it is ended and another one goes on."""
    return _signal_a_worker(lab, signal.SIGSTOP)


def worker_dies(lab: Lab) -> Outcome:
    """kill -9 of a data worker."""
    return _signal_a_worker(lab, signal.SIGKILL)


def worker_hangs_forever(lab: Lab) -> Outcome:
    """A row that is never read, whoever tries."""
    settings = lab.settings(lab.new_folder(), num_workers=2, worker_timeout_s=2.0, hangs_at=lab.random.randrange(96))
    said = lab.expect_stop(settings, 3, "Fix: look at the storage")
    usual = lab.settings(Path(settings.folder), num_workers=2)
    return said if isinstance(said, Outcome) else lab.judge(usual, said, num_workers=2)


def nan_once(lab: Lab) -> Outcome:
    """A NaN that does not come again, `rewind`: back to the newest checkpoint, in the same process."""
    train = {"on_non_finite": {"action": "rewind"}}
    settings = lab.settings(lab.new_folder(), nan_at=lab.random.randrange(60), train=train)
    return lab.judge(settings)


def nan_once_stop(lab: Lab) -> Outcome:
    """The same with `stop`."""
    settings = lab.settings(lab.new_folder(), nan_at=lab.random.randrange(1, 60))
    said = lab.expect_stop(settings, 5, "Fix:")
    return said if isinstance(said, Outcome) else lab.judge(dataclasses.replace(settings, nan_at=None), said)


def nan_always(lab: Lab) -> Outcome:
    """A NaN that comes again at the same step, `rewind`: it stops, and nothing is lost."""
    train = {"on_non_finite": {"action": "rewind"}}
    settings = lab.settings(lab.new_folder(), nan_at=lab.random.randrange(60), nan_times=99, train=train)
    said = lab.expect_stop(settings, 5, "came again at the same step")
    return said if isinstance(said, Outcome) else lab.judge(dataclasses.replace(settings, nan_at=None), said)


def rate_too_high(lab: Lab) -> Outcome:
    """NaN as long as the rate is above half of its peak, `lower_rate`: it ends at the lower one, the same in a second run."""
    train = {"on_non_finite": {"action": "lower_rate", "rate_factor": 0.6}}
    changes: dict[str, Any] = {"nan_at": lab.random.randrange(60), "blow_up_over": 2e-3, "train": train}
    return lab.judge(lab.settings(lab.new_folder(), **changes), **changes)


FAULTS: Mapping[str, tuple[Callable[[Lab], Outcome], float]] = {
    "kill -9 at a random moment": (kill_at_random, 1.0),
    "kill -9 during a save": (kill_in_save, 1.0),
    "kill -9 of the process and its data workers": (kill_all_at_random, 0.25),
    "SIGTERM": (preempted, 0.25),
    "disk full (tmpfs)": (disk_full, 0.25),
    "file larger than allowed (RLIMIT_FSIZE)": (file_too_large, 0.25),
    "newest checkpoint damaged": (newest_checkpoint_damaged, 1.0),
    "all checkpoints damaged": (all_checkpoints_damaged, 0.1),
    "encoded shard damaged before a start": (shard_damaged, 0.5),
    "encoded shard damaged, read while training": (shard_damaged_on_disk, 0.25),
    "data worker stopped": (worker_hangs, 0.15),
    "data worker killed": (worker_dies, 0.15),
    "data worker hangs at the same row for ever": (worker_hangs_forever, 0.1),
    "NaN once, on_non_finite: rewind": (nan_once, 0.5),
    "NaN once, on_non_finite: stop": (nan_once_stop, 0.25),
    "NaN at the same step again, rewind": (nan_always, 0.25),
    "rate too high, lower_rate": (rate_too_high, 0.25),
}
"""Name -> the trial, and how often it is made for one of `--trials`."""
