"""The trials of `faults.py`: each disturbs a run of `fault_child.py` in one way, and says what became of it."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fault_child import ROWS_PER_SHARD, WIDTH, Settings
from fault_data_workers import worker_dies, worker_hangs, worker_hangs_forever
from fault_lab import (
    BROKEN,
    EQUAL,
    STOPPED,
    Lab,
    Outcome,
    checkpoints,
    digest,
    kill,
    messages,
    newest_sound,
    newest_step,
    until,
    wait,
)
from fault_numbers import blown_up, blown_up_and_killed, nan_always, nan_once, nan_once_stop
from fraqat.distill import read_log

_CLONE_NEWNS = 0x20000


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
            until(lambda: not list(place.glob(".*.part")))
        until(lambda: list(place.glob(".*.part")) or os.waitid(os.P_PID, pid, os.WNOHANG | os.WEXITED | os.WNOWAIT))
    time.sleep(lab.random.uniform(0.0, 0.01))
    before = newest_step(settings)
    kill(pid)
    was_in_save = bool(list(place.glob(".*.part")))
    sound = newest_sound(settings)
    if sound < before:
        return Outcome(BROKEN, f"checkpoint {before} was lost, {sound} is the newest")
    found = lab.judge(settings)
    return dataclasses.replace(found, text="killed inside a save" if was_in_save else "killed beside a save")


def preempted(lab: Lab) -> Outcome:
    """SIGTERM, as schedulers send: a checkpoint of that very step, exit code 143."""
    _, span = lab.reference()
    settings = lab.settings(lab.new_folder())
    pid = lab.start(settings)
    until(lambda: (Path(settings.folder) / "log.jsonl").exists() and len(read_log(Path(settings.folder))) > 2)
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
    until(lambda: len(checkpoints(settings)) >= lab.random.randrange(1, 3))
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
    until(lambda: len(checkpoints(settings)) >= 2)
    os.kill(pid, signal.SIGSTOP)
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - left)))
    before = newest_step(settings)
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
        until(lambda: len(checkpoints(settings)) >= 2 and newest_step(settings) >= settings.steps // 3)
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
        next(folder.glob("*.safetensors")).write_bytes(b"x")
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


def shard_lost_while_training(lab: Lab) -> Outcome:
    """A shard cut or removed under a run that reads it: it stops; the next start encodes it again."""
    settings = lab.settings(lab.new_folder(), from_disk=True, step_s=0.02)
    pid = lab.start(settings)
    first = lab.random.randrange(1, 10)
    until(lambda: len(checkpoints(settings)) >= min(first, 2) and newest_step(settings) >= 4 * first)
    shard = lab.random.choice(sorted((Path(settings.folder).parent / "data").glob("*/shard-*")))
    if lab.random.random() < 0.5:
        shard.unlink()
    else:
        os.truncate(shard, lab.random.randrange(shard.stat().st_size))
    code, text = wait(pid), messages(settings)
    last = text.split("error: ")[-1].strip()
    if code == 0:
        is_equal = digest(settings) == lab.reference()[0]
        return Outcome(EQUAL, "it was not read any more") if is_equal else Outcome(BROKEN, "the weights differ")
    if code != 3 or "Fix: run the same command again" not in last or "Traceback" in text:
        return Outcome(BROKEN, f"exit code {code}: {text[-300:]}")
    return lab.judge(dataclasses.replace(settings, step_s=0.0), last)


FAULTS: Mapping[str, tuple[Callable[[Lab], Outcome], float]] = {
    "kill -9 at a random moment": (kill_at_random, 1.0),
    "kill -9 during a save": (kill_in_save, 1.0),
    "kill -9 of the process and its data workers": (kill_all_at_random, 1.0),
    "SIGTERM": (preempted, 1.0),
    "disk full (tmpfs)": (disk_full, 0.5),
    "file larger than allowed (RLIMIT_FSIZE)": (file_too_large, 0.25),
    "newest checkpoint damaged": (newest_checkpoint_damaged, 1.0),
    "all checkpoints damaged": (all_checkpoints_damaged, 0.25),
    "encoded shard damaged before a start": (shard_damaged, 0.5),
    "encoded shard damaged, read while training": (shard_damaged_on_disk, 0.25),
    "encoded shard cut or removed while training": (shard_lost_while_training, 0.5),
    "data workers killed (SIGKILL)": (worker_dies, 1.0),
    "data workers hung (SIGSTOP)": (worker_hangs, 1.0),
    "data worker hangs at the same row for ever": (worker_hangs_forever, 0.25),
    "not finite once, on_non_finite: rewind": (nan_once, 1.0),
    "not finite once, on_non_finite: stop": (nan_once_stop, 0.5),
    "not finite at the same step again, rewind": (nan_always, 0.5),
    "not finite above a rate, lower_rate": (blown_up, 0.5),
    "not finite above a rate, lower_rate, and kill -9": (blown_up_and_killed, 0.5),
}
"""Name -> the trial, and how often it is made for one of `--trials`."""
