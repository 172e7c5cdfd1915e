"""What processes of a training step send each other: bytes of real gloo processes against the model on paper, then the model's
step on 8, 64 and 512 GPUs.

Part one trains a small student of the package's own kind in 1, 2 and 4 processes and counts the bytes of every tensor that one
process hands to a collective in one optimizer step (`torch.utils._python_dispatch` sees each call). Part two takes the shapes
of a recipe's student and teacher, the compute time of `fraqat plan` and the links below, and prints the table of
docs/parallel.md. Nothing of part two has run on such a machine.

    python benchmarks/parallel_step.py --measure --out docs/results/parallel_bytes.jsonl
    python benchmarks/parallel_step.py --recipe flux-schnell --out docs/results/parallel_step.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fraqat import __version__, quantize_
from fraqat.config import load_recipe
from fraqat.data.loader import ShuffledBatches, TensorRows
from fraqat.distill import (
    Batch,
    Distiller,
    LossSpec,
    ParallelSpec,
    Prediction,
    StepRecord,
    TrainSpec,
    distillation_loss,
    joined,
)
from fraqat.nn import quantized_layers
from fraqat.nn.integer import why_not_integer
from fraqat.planning import Phase, find_device, plan_training
from fraqat.planning.communication import Links, Traffic, parameter_groups, step_time, step_traffic
from fraqat.schedules import Schedule, Stage
from fraqat.table import Table
from fraqat.workflows.sessions import open_session

_GIB = 2**30
NUM_PARTS = 4
MODES: dict[str, ParallelSpec] = {
    "ddp": ParallelSpec("ddp"),
    "fsdp2, weights": ParallelSpec("fsdp2"),
    "fsdp2, weights, teacher sharded": ParallelSpec("fsdp2", teacher="shard"),
    "fsdp2, codes": ParallelSpec("fsdp2", gather="codes"),
    "fsdp2, codes, reduced for every part": ParallelSpec("fsdp2", gather="codes", reduce="part"),
    "hybrid, groups of 2, codes": ParallelSpec("hybrid", shards=2, gather="codes"),
}
# Eight GPUs of a machine by NVLink (450 GB/s each way, data sheet), a 400 Gb/s adapter for each to other machines (DGX H100).
LINKS = Links(node_size=8, inside_bytes_per_s=450e9, outside_bytes_per_s=50e9)


class Block(nn.Module):
    """A feed-forward block with a norm."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width] to [N, width]."""
        return x + self.outer(nn.functional.gelu(self.inner(self.norm(x))))


class Small(nn.Module):
    """Three blocks between two layers; 98 rows of the widest divide among 2 processes and not among 4."""

    def __init__(self, width: int = 98):
        super().__init__()
        self.enter, self.leave = nn.Linear(16, width), nn.Linear(width, 16)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 16] to [N, 16]."""
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class RandomTask:
    """Vectors without meaning."""

    def __init__(self) -> None:
        self.rows = TensorRows({"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(0))})

    def train_stream(self, batch_size: int, seed: int) -> ShuffledBatches:
        """Shuffled rows."""
        return ShuffledBatches(self.rows, batch_size, seed)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches."""
        return len(self.rows) // batch_size

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """The first rows."""
        return list(self.rows.first(8).batches(batch_size))

    def calibration_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """The first rows."""
        return self.validation_batches(batch_size)

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The rows as they are."""
        return batch

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """The model's output."""
        return {"output": model(inputs["x"])}

    def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        """Their distance."""
        return distillation_loss(student["output"], teacher["output"], terms)


class CountCollectives(TorchDispatchMode):
    """Adds up what is handed to collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[str, int] = {"gathered": 0, "scattered": 0, "reduced": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::_allgather_base_"):
            self._add("gathered", [args[0]])
        elif name.startswith("c10d::_reduce_scatter_base_"):
            self._add("scattered", [args[1]])
        elif name.startswith("c10d::allreduce_"):
            self._add("reduced", args[0])
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, tensors: Sequence[Tensor]) -> None:
        self.num_bytes[kind] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def models() -> tuple[nn.Module, nn.Module]:
    """Teacher and student of part one."""
    torch.manual_seed(0)
    teacher, student = Small(), Small()
    student.load_state_dict(teacher.state_dict())
    quantize_(student)
    return teacher, student


def measured(parallel: ParallelSpec, folder: Path) -> dict[str, int]:
    """Bytes of the third step of a run, as this process sees it. All processes use one folder."""
    count = CountCollectives()

    def on_step(record: StepRecord) -> None:
        if record.step == 1:
            count.__enter__()
        if record.step == 2:
            count.__exit__(None, None, None)

    teacher, student = models()
    spec = TrainSpec(
        batch_size=8,
        accumulation=NUM_PARTS,
        autocast="none",
        tensorboard=False,
        parallel=parallel,
        checkpoint_every=100,
    )
    schedule = Schedule((Stage(0, 4.0, 0, 3),))
    Distiller(RandomTask(), teacher, student, schedule, spec, folder, on_step=on_step).run()
    return count.num_bytes


def worker(out: Path, names: list[str]) -> None:
    """One process of several."""
    torch.set_num_threads(1)
    with joined(ParallelSpec("ddp", timeout_s=300), torch.device("cpu")) as workers:
        found = {name: measured(MODES[name], out.parent / str(i)) for i, name in enumerate(names)}
        if workers.is_first:
            out.write_text(json.dumps(found))


def start(num: int, names: list[str]) -> dict[str, dict[str, int]]:
    """Runs modes in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--worker", str(out), *names]
        processes = [
            subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(num)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"processes ended with {codes}")
        return json.loads(out.read_text())


def alone() -> dict[str, int]:
    """Bytes of one process."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(ParallelSpec(), Path(folder))


def expected(parallel: ParallelSpec, num: int) -> Traffic:
    """The model's bytes for part one."""
    teacher, student = models()
    coded = [f"{name}.weight" for name, _ in quantized_layers(student)] if parallel.gather == "codes" else []
    student_groups, teacher_groups = parameter_groups(student, coded), parameter_groups(teacher.requires_grad_(False))
    return step_traffic(student_groups, teacher_groups, parallel, num, NUM_PARTS // num)


def compare(out: Path | None) -> Table:
    """Part one."""
    rows: list[tuple[Any, ...]] = []
    for num in (1, 2, 4):
        names = [name for name in MODES if num > 1 and not (name.startswith("hybrid") and num < 4)]
        found = start(num, names) if names else {"one process": alone()}
        for name, values in found.items():
            model = expected(MODES[name], num) if name in MODES else Traffic()
            pairs = [
                ("gathered", values["gathered"], model.gathered + model.teacher),
                ("scattered", values["scattered"], model.scattered),
                ("reduced", values["reduced"], model.reduced),
            ]
            rows.append((num, name, *(value for _, seen, said in pairs for value in (seen, said))))
            write(out, {"num": num, "mode": name, **{kind: {"measured": a, "model": b} for kind, a, b in pairs}})
    columns = ("processes", "mode", "gathered", "model", "scattered", "model", "reduced", "model")
    return Table("Bytes of one process and step", columns, tuple(rows))


def project(recipe_name: str, device_name: str, out: Path | None) -> Table:
    """Part two."""
    recipe = load_recipe(recipe_name, ("train.batch_size=1", "train.accumulation=1"))
    batch = load_recipe(recipe_name).train.batch_size
    session, device = open_session(recipe), find_device(device_name)
    plan = plan_training(session.workload(recipe), recipe.train, 1, device)
    part_s = sum(plan.phase_times_s[phase] for phase in (Phase.TEACHER, Phase.FORWARD, Phase.BACKWARD))
    update_s = plan.phase_times_s[Phase.UPDATE]
    student = session.planned_student(recipe)
    teacher = session.known.build().to(recipe.model.dtype).requires_grad_(False)
    coded = [f"{name}.weight" for name, layer in quantized_layers(student) if not why_not_integer(layer.spec)]
    floats, codes, teachers = parameter_groups(student), parameter_groups(student, coded), parameter_groups(teacher)
    rows: list[tuple[Any, ...]] = []
    for num in (8, 64, 512):
        parts = max(1, batch // num)
        for name, parallel in (
            ("fsdp2, float32 weights", ParallelSpec("fsdp2", teacher="shard")),
            ("fsdp2, codes", ParallelSpec("fsdp2", teacher="shard", gather="codes")),
            ("hybrid of 8, float32 weights", ParallelSpec("hybrid", shards=8)),
            ("hybrid of 8, codes", ParallelSpec("hybrid", shards=8, gather="codes")),
        ):
            if parallel.mode == "hybrid" and num == 8:
                continue
            groups = codes if parallel.gather == "codes" else floats
            traffic = step_traffic(groups, teachers, parallel, num, parts)
            shards = num if parallel.mode == "fsdp2" else 8
            time = step_time(traffic, parallel, num, LINKS, parts * part_s + update_s / shards)
            values = (
                *(num, parts * num, name, traffic.gathered / _GIB, traffic.teacher / _GIB),
                *(
                    (traffic.scattered + traffic.reduced) / _GIB,
                    time.compute_s,
                    time.gather_s,
                    time.reduce_s,
                    time.step_s,
                ),
            )
            rows.append(values)
            record = {**dataclasses.asdict(traffic), **dataclasses.asdict(time), "step_s": time.step_s}
            write(
                out, {"recipe": recipe_name, "device": device.name, "num": num, "parts": parts, "mode": name, **record}
            )
    columns = (
        *("GPUs", "batch", "mode", "student gathered, GiB", "teacher gathered, GiB", "gradients, GiB"),
        *("compute, s", "gather, s", "reduce, s", "step, s"),
    )
    return Table(f"A step of {recipe_name} on {device.name}s, on paper", columns, tuple(rows))


def write(out: Path | None, values: dict[str, Any]) -> None:
    """Appends a line."""
    if out is not None:
        about = {"fraqat": __version__, "torch": torch.__version__, "machine": platform.machine()}
        with out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**about, **values}) + "\n")


def main() -> None:
    """Runs one part."""
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="compare bytes of 1, 2 and 4 processes with the model")
    parser.add_argument("--recipe", help="print the step of this recipe on 8, 64 and 512 GPUs")
    parser.add_argument("--device", default="H200")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    options = parser.parse_args()
    if options.measure:
        print(compare(options.out))
    if options.recipe:
        print(project(options.recipe, options.device, options.out))


if __name__ == "__main__":
    main()
