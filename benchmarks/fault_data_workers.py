"""Trials of data workers that hang or die; each says what became of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from fault_child import NUM_ROWS, Settings
from fault_lab import BROKEN, EQUAL, Lab, Outcome, checkpoints, digest, messages, until, wait
from fraqat.distill import read_log

_NUM_WORKERS = 2


def _workers_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(number) for number in found.split()]


def _num_steps(settings: Settings) -> int:
    folder = Path(settings.folder)
    return sum(event["event"] == "step" for event in read_log(folder)) if (folder / "log.jsonl").exists() else 0


def _signal_workers(lab: Lab, number: int) -> Outcome:
    """Signals one worker, or all, at a random moment after the first checkpoint; the same process goes on to the end."""
    wanted, _ = lab.reference(num_workers=_NUM_WORKERS)
    settings = lab.settings(lab.new_folder(), num_workers=_NUM_WORKERS, worker_timeout_s=4.0, step_s=0.02)
    pid = lab.start(settings)
    until(lambda: checkpoints(settings))
    first = lab.random.randrange(settings.checkpoint_every, 3 * settings.steps // 4)
    until(lambda: _num_steps(settings) >= first and _workers_of(pid))
    time.sleep(lab.random.uniform(0.0, settings.step_s))
    workers = _workers_of(pid)
    if not workers:  # between two epochs
        until(lambda: _workers_of(pid))
        workers = _workers_of(pid)
    chosen = workers if lab.random.random() < 0.25 else [lab.random.choice(workers)]
    for worker in chosen:
        os.kill(worker, number)
    code, text = wait(pid), messages(settings)
    if code != 0 or "Traceback" in text:
        return Outcome(BROKEN, f"exit code {code}: {text[-300:]}")
    if digest(settings) != wanted:
        return Outcome(BROKEN, "the weights differ")
    is_noticed = "starting them again" in text
    return Outcome(EQUAL, "started again" if is_noticed else "they had read all that they had to")


def worker_hangs(lab: Lab) -> Outcome:
    """Data workers are stopped (SIGSTOP): they are ended and others go on."""
    return _signal_workers(lab, signal.SIGSTOP)


def worker_dies(lab: Lab) -> Outcome:
    """kill -9 of data workers."""
    return _signal_workers(lab, signal.SIGKILL)


def worker_hangs_forever(lab: Lab) -> Outcome:
    """A row that is never read, whoever tries."""
    row = lab.random.randrange(NUM_ROWS)
    settings = lab.settings(lab.new_folder(), num_workers=_NUM_WORKERS, worker_timeout_s=2.0, hangs_at=row)
    said = lab.expect_stop(settings, 3, "Fix: look at the storage")
    usual = lab.settings(Path(settings.folder), num_workers=_NUM_WORKERS)
    return said if isinstance(said, Outcome) else lab.judge(usual, said, num_workers=_NUM_WORKERS)
