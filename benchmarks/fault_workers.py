"""Trials of `faults.py` with several processes: one of them is killed or hangs, and `torchrun` starts all of them again.

Run as a program, it is one of these processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fault_child import FaultTask, Settings, build
from fault_lab import BROKEN, EQUAL, TIMEOUT_S, Lab, Outcome, digest, messages, wait
from fraqat import QuantSpec, ScheduleSpec, WeightSpec, quantize_
from fraqat.distill import Distiller, ParallelSpec, StepRecord, TrainSpec, joined, read_log
from fraqat.errors import FraqatError
from fraqat.files import atomic_file, folder_lock, save_tensors, write_json_atomic
from fraqat.numerics import RangeMethod
from fraqat.schedules import LearningRateSpec, ScheduleKind

NUM_PROCESSES, NUM_RESTARTS = 2, 3
SHARE_AT_START = 0.25
"""Of the kills: before the first step, while the processes start and meet."""
_STEP_S = 0.05
_HANG_TIMEOUT_S = 15
"""`train.parallel.timeout_s` where a process hangs; `torchrun` then takes 30 s more until it kills one that ignores SIGTERM."""


def start(settings: Settings) -> int:
    """`torchrun` with its processes, in a group of their own."""
    folder = Path(settings.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder.parent / "settings.json", dataclasses.asdict(settings))
    options = (
        "--standalone",
        "--nproc-per-node",
        NUM_PROCESSES,
        "--max-restarts",
        NUM_RESTARTS,
        "--monitor-interval",
        0.2,
    )
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, folder.parent / "settings.json"]
    with (folder.parent / "errors.txt").open("ab") as errors:
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=errors,
            stderr=errors,
            process_group=0,
        )
    process.returncode = 0  # `wait` asks for its end, not the object
    return process.pid


def kill_a_process(lab: Lab, **parallel: Any) -> Outcome:
    """kill -9 of one of two processes at a moment of the run; `torchrun` goes on by itself to the same weights."""
    return _disturb(lab, signal.SIGKILL, parallel)


def hang_a_process(lab: Lab, **parallel: Any) -> Outcome:
    """One of two processes is stopped for ever; the other one says so after the timeout, and `torchrun` starts both again."""
    return _disturb(lab, signal.SIGSTOP, {**parallel, "timeout_s": _HANG_TIMEOUT_S}, says="does not answer")


def _disturb(lab: Lab, number: signal.Signals, parallel: Mapping[str, Any], says: str = "") -> Outcome:
    wanted, span = _reference(lab, parallel)
    settings, pid, processes = _at_a_moment(lab, parallel, span)
    while len(processes) < NUM_PROCESSES:  # it had ended: the undisturbed run was slower, and this is no trial
        if wait(pid) != 0:
            return Outcome(BROKEN, f"ended undisturbed: {messages(settings)[-600:]}")
        settings, pid, processes = _at_a_moment(lab, parallel, _span(settings))
    os.kill(lab.random.choice(processes), number)
    num_steps = _num_steps(settings)
    code = wait(pid)
    has_restarted = set(_pids(settings)) - set(processes)
    if not has_restarted:
        return Outcome(BROKEN, f"exit code {code}, nobody was started again: {messages(settings)[-300:]}")
    if says not in messages(settings):
        return Outcome(BROKEN, f"nobody said {says!r}: {messages(settings)[-600:]}")
    return _judge(settings, code, wanted, f"{number.name} {'while training' if num_steps else 'before the first step'}")


def _at_a_moment(lab: Lab, parallel: Mapping[str, Any], span: float) -> tuple[Settings, int, list[int]]:
    """A new run at a moment of its start or of the `span` seconds of its training: its settings, `torchrun`, its processes."""
    settings = _settings(lab, lab.new_folder(), parallel)
    pid = start(settings)
    if lab.random.random() < SHARE_AT_START:
        _wait_for(lambda: len(_children(pid)) == NUM_PROCESSES)
        time.sleep(lab.random.uniform(0.0, 4.0))
    else:
        _wait_for(lambda: _num_steps(settings) > 0)
        time.sleep(lab.random.uniform(0.0, span))
    return settings, pid, _children(pid)


def _judge(settings: Settings, code: int, wanted: str, text: str) -> Outcome:
    if code != 0:
        return Outcome(BROKEN, f"exit code {code}: {messages(settings)[-600:]}")
    if digest(settings) != wanted:
        return Outcome(BROKEN, f"{text}: the weights differ")
    steps = [event["step"] for event in read_log(Path(settings.folder)) if event["event"] == "step"]
    return (
        Outcome(EQUAL, text)
        if steps == list(range(settings.steps))
        else Outcome(BROKEN, f"the log has {len(steps)} steps")
    )


def _settings(lab: Lab, folder: Path, parallel: Mapping[str, Any]) -> Settings:
    return lab.settings(folder, step_s=_STEP_S, train={"accumulation": NUM_PROCESSES, "parallel": dict(parallel)})


def _reference(lab: Lab, parallel: Mapping[str, Any]) -> tuple[str, float]:
    """Digest of the undisturbed run's weights, and the seconds of its training; made once."""
    folder = lab.root / "-".join(("undisturbed", *map(str, parallel.values()))) / "run"
    settings = _settings(lab, folder, parallel)
    if not (folder / "student.safetensors").exists():
        code = wait(start(settings))
        assert code == 0, messages(settings)
    return digest(settings), _span(settings)


def _span(settings: Settings) -> float:
    """Seconds from the first step of a run that has ended to its end."""
    folder = Path(settings.folder)
    return (folder / "student.safetensors").stat().st_mtime - (folder / "first_step").stat().st_mtime


def _num_steps(settings: Settings) -> int:
    return sum(event["event"] == "step" for event in read_log(Path(settings.folder)))


def _pids(settings: Settings) -> list[int]:
    return [int(path.suffix[1:]) for path in Path(settings.folder).parent.glob("process.*")]


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(number) for number in found.split()]


def _wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)


def train(settings: Settings) -> None:
    """Trains together with the other processes to the end, or goes on; the first one writes `student.safetensors`."""
    torch.set_num_threads(1)
    folder, values = Path(settings.folder), dict(settings.train)
    parallel = ParallelSpec(**values.pop("parallel"))
    (folder.parent / f"process.{os.getpid()}").touch()
    with joined(parallel, torch.device("cpu")) as workers:
        workers.first(lambda: folder.mkdir(parents=True, exist_ok=True))
        teacher, student = build(), build()
        quantize_(student, QuantSpec(weight=WeightSpec(range_method=RangeMethod.MSE)))
        spec = TrainSpec(
            batch_size=settings.batch_size,
            learning_rate=LearningRateSpec(peak=3e-3),
            checkpoint_every=settings.checkpoint_every,
            validate_every=25,
            tensorboard=False,
            autocast="none",
            ema_decay=0.9,
            parallel=parallel,
            **values,
        )
        schedule = ScheduleSpec(ScheduleKind.FRACTIONAL).resolve(4.0, settings.steps)

        def on_step(record: StepRecord) -> None:
            if record.step == 0 and workers.is_first:
                (folder / "first_step").touch()
            time.sleep(settings.step_s)

        with folder_lock(folder) if workers.is_first else nullcontext():
            distiller = Distiller(FaultTask(settings), teacher, student, schedule, spec, folder, on_step=on_step)
            distiller.run()
            state = distiller.models.full_state(keeps=workers.is_first)
            workers.first(lambda: _save(state, folder / "student.safetensors"))


def _save(state: Mapping[str, torch.Tensor], target: Path) -> None:
    with atomic_file(target) as path:
        save_tensors(state, path)


def main() -> None:
    """One of the processes, with the settings in the file that is its argument."""
    try:
        train(Settings(**json.loads(Path(sys.argv[1]).read_text())))
    except FraqatError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


WORKER_FAULTS: Mapping[str, tuple[Callable[[Lab], Outcome], float]] = {
    "kill -9 of one of two processes, ddp": (lambda lab: kill_a_process(lab, mode="ddp"), 0.5),
    "kill -9 of one of two processes, fsdp2 with codes": (
        lambda lab: kill_a_process(lab, mode="fsdp2", gather="codes"),
        0.5,
    ),
    "one of two processes hangs (SIGSTOP), ddp": (lambda lab: hang_a_process(lab, mode="ddp"), 0.25),
    "one of two processes hangs (SIGSTOP), fsdp2 with codes": (
        lambda lab: hang_a_process(lab, mode="fsdp2", gather="codes"),
        0.25,
    ),
}
"""As `FAULTS` of `fault_trials.py`."""

if __name__ == "__main__":
    main()
