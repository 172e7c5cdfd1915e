"""Trainings that give the same result in one process and in several; run as a program, it is one process of several."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from toy import NoisyToy, ToyTask, toy_spec

from fraqat import ScheduleSpec, quantize_
from fraqat.distill import (
    Batch,
    CheckpointStore,
    Distiller,
    ParallelSpec,
    Prediction,
    StepRecord,
    TeacherSpec,
    TimestepImportanceSpec,
    Workers,
    joined,
    read_log,
)
from fraqat.distill.micro_batch import shares_of, split_batch
from fraqat.distill.workers import current_workers
from fraqat.errors import ConfigError, FraqatError, InterruptedRunError
from fraqat.kernels import EngineName
from fraqat.nn import (
    BranchSpec,
    EngineSpec,
    QuantSpec,
    RankSchedule,
    WeightSpec,
    add_branches_,
    initialize_branches_,
    serve_widths_,
)
from fraqat.nn.shards import own
from fraqat.schedules import AutomaticSpec

Job = tuple[str, dict[str, Any], dict[str, Any]]
"""Case, values of `ParallelSpec`, changes of the case; `backend` of torch.compile among them."""
NUM_PARTS = 2
STEPS = 9
"""One of each of the nine stages."""
HIDDEN = 64
EIGHT_BIT_HIDDEN = 128
"""128 x 128 weights in 4 shards are the fewest whose state torchao keeps in 8 bits."""

REFERENCE = EngineSpec(EngineName.REFERENCE)
AUTOMATIC = ScheduleSpec("automatic", automatic=AutomaticSpec(ramp_share=0.8, rise=1.02, window_share=0.02, gain=0.9))
"""Measures often, and has several stages in nine steps."""
SEVERAL = ScheduleSpec("several", widths=(8, 6, 4))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"ema_decay": 0.9, "weight_decay": 0.1, "weight": WeightSpec(range_method="mse")},
    "eight-bit": {"optimizer": "adamw_8bit", "hidden": EIGHT_BIT_HIDDEN, "weight_decay": 0.1},
    "adapted": {"optimizer": "adamw_adapted", "weight": WeightSpec(range_method="learned"), "weight_decay": 0.1},
    "selective": {"train": "blocks"},
    "learned": {"weight": WeightSpec(range_method="learned")},
    "final-grid": {"grid": "final"},
    "reference": {"engine": REFERENCE, "weight": WeightSpec(granularity="group", group_size=8, range_method="mse")},
    "per-tensor": {"weight": WeightSpec(granularity="tensor")},
    "automatic": {"schedule": AUTOMATIC, "ema_decay": 0.9},
    "automatic-learned": {"schedule": AUTOMATIC, "weight": WeightSpec(range_method="learned")},
    "several": {"schedule": SEVERAL, "weight": WeightSpec(range_method="learned")},
    "several-reference": {"schedule": SEVERAL, "weight": WeightSpec(range_method="learned"), "engine": REFERENCE},
    "several-mse": {"schedule": SEVERAL, "weight": WeightSpec(range_method="mse"), "ema_decay": 0.9},
    "recorded": {"teacher": TeacherSpec(outputs="recorded")},
    "rank-decay": {
        "branch": BranchSpec(3, rank_schedule=RankSchedule("linear")),
        "weight": WeightSpec(range_method="learned"),
    },
    "timesteps": {"timestep_importance": TimestepImportanceSpec(bins=3)},
}
"""Options of `train_case` by name."""


class Block(nn.Module):
    """A residual block, one of several that are alike."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(0.1)
        self.outer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[N, hidden] to [N, hidden]."""
        return x + self.outer(self.dropout(nn.functional.silu(self.inner(self.norm(x)))))


class SmallDevices(ToyTask):
    """Processes that hold so many samples of a forward or a backward pass.

    Args:
        limit: Of this process.
        where: `forward` or `backward` pass.
    """

    def __init__(self, limit: int, where: str = "forward"):
        super().__init__(num_rows=20)
        self._limit, self._where = limit, where

    def split_inputs(self, inputs: Batch, num_parts: int) -> list[tuple[Batch, float]]:
        """Pieces with their shares."""
        parts = split_batch(inputs, num_parts)
        return list(zip(parts, shares_of([len(part["x"]) for part in parts]), strict=True))

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """Fails where there are more samples than the device holds."""
        is_too_large = torch.is_grad_enabled() and len(inputs["x"]) > self._limit
        found = super().predict(model, inputs)
        if is_too_large and self._where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if is_too_large:
            found["output"].register_hook(_no_memory)
        return found


def _no_memory(gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Blocks(nn.Module):
    """8 -> hidden -> 4 with two blocks between."""

    def __init__(self, hidden: int):
        super().__init__()
        self.enter = nn.Linear(8, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.leave = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] to [N, 4]."""
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def make_case(
    folder: Path,
    parallel: ParallelSpec,
    *,
    hidden: int = HIDDEN,
    weight: WeightSpec | None = None,
    train: str = "All",
    grid: str = "own",
    branch: BranchSpec | None = None,
    schedule: ScheduleSpec | None = None,
    steps: int = STEPS,
    memory_for: Sequence[int] = (),
    where: str = "forward",
    **changes: Any,
) -> Distiller:
    """The trainer of a case. Clipping is loose, so that the norm's order of sums does not show in the weights."""
    torch.manual_seed(0)
    teacher, student = Blocks(hidden), Blocks(hidden)
    student.load_state_dict(teacher.state_dict())
    quantize_(student, QuantSpec(weight=weight or WeightSpec()))
    add_branches_(student, branch)
    initialize_branches_(student, student, [batch["x"] for batch in ToyTask().calibration_batches(6, 4)])
    if train != "All":
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name.startswith(train))
    stages = (schedule or ScheduleSpec("fractional", grid=grid)).resolve(4.0, steps)
    if stages.widths:
        serve_widths_(student, stages.widths)
    values = {
        "batch_size": 8,
        "accumulation": NUM_PARTS,
        "clip_norm": 1e6,
        "checkpoint_every": 7,
        "autocast": "none",
        **changes,
    }
    spec = toy_spec(parallel=parallel, **values)
    task = ToyTask(num_rows=20) if spec.timestep_importance is None else NoisyToy(num_rows=20)
    if memory_for:
        task = SmallDevices(memory_for[current_workers().rank % len(memory_for)], where)
    return Distiller(task, teacher, student, stages, spec, folder, fingerprint={"case": 1})


def train_case(
    name: str,
    folder: Path,
    parallel: ParallelSpec,
    *,
    stop_after: int | None = None,
    stop_recording: int | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """Trains a case and gives the student with its losses; nothing if it is stopped.

    Args:
        name: Of the case.
        folder: Of the run; one that was stopped goes on.
        parallel: In how many processes.
        stop_after: Step after which the last process receives SIGTERM.
        stop_recording: Batch or part of the recording, counted by process, at which it does.
        changes: Of the case.
    """
    distiller = make_case(folder, parallel, **{**CASES[name], **changes})
    workers = distiller.workers

    def stop(record: StepRecord) -> None:
        if record.step + 1 == stop_after and workers.rank == workers.num - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    distiller.on_step = stop
    make_inputs, num_made = distiller.task.make_inputs, 0

    def make_or_stop(batch: Batch, generator: torch.Generator) -> Batch:
        nonlocal num_made
        num_made += 1
        if num_made == stop_recording and workers.rank == workers.num - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_inputs(batch, generator)

    distiller.task.make_inputs = make_or_stop
    try:
        result = distiller.run()
    except InterruptedRunError:
        assert distiller.step == (stop_after if stop_recording is None else 0)
        return {}
    if distiller.spec.teacher.outputs == "recorded":
        held = {own(p).untyped_storage() for p in distiller.teacher.parameters()}
        assert sum(storage.nbytes() for storage in held) <= 4 * len(held)
    found = {name: value.clone() for name, value in distiller.models.full_state().items()}
    found["validation"] = torch.tensor(result.validation_loss, dtype=torch.float64)
    return found


def job_folder(name: str, values: dict[str, Any], changes: dict[str, Any]) -> str:
    """Where a job leaves its run: the same place for one that stops and one that goes on."""
    return "-".join((name, *(str(value) for value in (*values.values(), *_without_stop(changes).values())))).replace(
        " ", ""
    )


def _without_stop(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key not in ("stop_after", "stop_recording")}


def losses(folder: Path) -> list[float]:
    """Of every step in the log of a run."""
    return [event["loss"] for event in read_log(folder) if event["event"] == "step"]


def run_processes(num: int, out: Path, jobs: list[Job], **environment: str) -> list[tuple[int, str]]:
    """Runs jobs in so many processes over gloo, as `torchrun` would start them: exit code and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        **environment,
    }
    command = [sys.executable, "-W", "error::UserWarning:fraqat", __file__, str(out), json.dumps(jobs)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def spawn(num: int, out: Path, jobs: list[Job]) -> None:
    """Runs jobs in so many processes, none of which may fail."""
    for code, output in run_processes(num, out, jobs):
        assert code == 0, output[-4000:]


FAILURES: dict[str, BaseException] = {
    "value-error": ValueError("no such thing"),
    "config-error": ConfigError("no such setting"),
    "interrupt": KeyboardInterrupt(),
    "exit": SystemExit(3),
}
"""What the first process raises while the others wait for it."""


def failure_as_seen(name: str, workers: Workers) -> list[Any]:
    """Class, text and exit code of the error that this process raises where the first one fails."""

    def fail() -> None:
        raise FAILURES[name]

    try:
        workers.first(fail)
    except BaseException as error:  # noqa: BLE001 - whatever it is
        return [type(error).__name__, str(error), getattr(error, "exit_code", None)]
    return []


def newest_as_seen(folder: Path, workers: Workers) -> list[Any]:
    """Step and a value of the checkpoint that is taken, and what is said of others, where each process sees its own folder."""
    said: list[str] = []
    found = CheckpointStore(folder, {"a": 1}, 5, said.append, workers).load_latest()
    return [found and found.step, found and found.whole()["x"].tolist(), said]


def count_graphs(backend: str) -> Any:
    """Lets this backend make the graphs of `train.compile` from now on; gives what counts them in `frame_count`."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    from fraqat.distill import compiling

    compiling.BACKEND = CompileCounterWithBackend(backend)
    return compiling.BACKEND


def main(out: Path, jobs: list[list[Any]]) -> None:
    """Runs jobs, [case, values of `ParallelSpec`, changes of the case], as one process of several."""
    torch.set_num_threads(1)
    with joined(ParallelSpec("ddp", timeout_s=120), torch.device("cpu")) as workers:
        for name, values, changes in jobs:
            if name == "views":
                found = newest_as_seen(out / changes["case"] / f"view{workers.rank}", workers)
                (out / changes["case"] / f"rank{workers.rank}.json").write_text(json.dumps(found))
                continue
            if name in FAILURES:
                seen = failure_as_seen(name, workers)
                (out / f"{name}-rank{workers.rank}.json").write_text(json.dumps([seen, workers.tell(lambda: [1, "a"])]))
                continue
            folder = out / job_folder(name, values, changes)
            graphs = count_graphs(changes.pop("backend")) if "backend" in changes else None
            found = train_case(name, folder, ParallelSpec(**values), **changes)
            if graphs is not None:
                (folder / f"graphs{workers.rank}.json").write_text(json.dumps(graphs.frame_count))
            if found:
                save_file(found, folder / f"rank{workers.rank}.safetensors")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except FraqatError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
