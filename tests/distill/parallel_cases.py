"""Trainings that give the same result in one process and in several; run as a program, it is one process of several."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from toy import ToyTask, toy_spec

from fraqat import ScheduleSpec, quantize_
from fraqat.distill import Batch, Distiller, ParallelSpec, StepRecord, TeacherSpec, joined, read_log
from fraqat.errors import InterruptedRunError
from fraqat.kernels import EngineName
from fraqat.nn import EngineSpec, QuantSpec, WeightSpec
from fraqat.nn.shards import own

NUM_PARTS = 2
STEPS = 9
"""One of each of the nine stages."""
HIDDEN = 64
EIGHT_BIT_HIDDEN = 128
"""128 x 128 weights in 4 shards are the fewest whose state torchao keeps in 8 bits."""

REFERENCE = EngineSpec(EngineName.REFERENCE)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"ema_decay": 0.9, "weight_decay": 0.1, "weight": WeightSpec(range_method="mse")},
    "eight-bit": {"optimizer": "adamw_8bit", "hidden": EIGHT_BIT_HIDDEN, "weight_decay": 0.1},
    "selective": {"train": "blocks"},
    "learned": {"weight": WeightSpec(range_method="learned")},
    "final-grid": {"grid": "final"},
    "reference": {"engine": REFERENCE, "weight": WeightSpec(granularity="group", group_size=8, range_method="mse")},
    "per-tensor": {"weight": WeightSpec(granularity="tensor")},
    "recorded": {"teacher": TeacherSpec(outputs="recorded")},
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
    steps: int = STEPS,
    **changes: Any,
) -> Distiller:
    """The trainer of a case. Clipping is loose, so that the norm's order of sums does not show in the weights."""
    torch.manual_seed(0)
    teacher, student = Blocks(hidden), Blocks(hidden)
    student.load_state_dict(teacher.state_dict())
    quantize_(student, QuantSpec(weight=weight or WeightSpec()))
    if train != "All":
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name.startswith(train))
    schedule = ScheduleSpec("fractional", grid=grid).resolve(4.0, steps)
    values = {
        "batch_size": 8,
        "accumulation": NUM_PARTS,
        "clip_norm": 1e6,
        "checkpoint_every": 7,
        "autocast": "none",
        **changes,
    }
    spec = toy_spec(parallel=parallel, **values)
    return Distiller(ToyTask(num_rows=20), teacher, student, schedule, spec, folder, fingerprint={"case": 1})


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
    return "-".join((name, *(str(value) for value in (*values.values(), *_without_stop(changes).values()))))


def _without_stop(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key not in ("stop_after", "stop_recording")}


def losses(folder: Path) -> list[float]:
    """Of every step in the log of a run."""
    return [event["loss"] for event in read_log(folder) if event["event"] == "step"]


def main(out: Path, jobs: list[list[Any]]) -> None:
    """Runs jobs, [case, values of `ParallelSpec`, changes of the case], as one process of several."""
    torch.set_num_threads(1)
    with joined(ParallelSpec("ddp", timeout_s=120), torch.device("cpu")) as workers:
        for name, values, changes in jobs:
            folder = out / job_folder(name, values, changes)
            found = train_case(name, folder, ParallelSpec(**values), **changes)
            if found:
                save_file(found, folder / f"rank{workers.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
