"""What each memory option of training saves, and what it costs. See docs/memory.md.

Two parts, each on one thread of a CPU. `kept`: bytes that a forward pass of a real class with random weights (the cases of
planner_error.py, two blocks of each kind) leaves for the backward pass under bfloat16 autocast, seconds of that backward
pass, and whether the gradients are the same bits as without checkpointing. `train`: the demo's recipe for some steps with one
option changed, its held-out loss against the original teacher, bytes of teacher and optimizer state, CPU seconds of the whole
run and the teacher's share of them. Prints tables and appends one JSON line per row.

    python benchmarks/training_memory.py --out docs/results/training_memory.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fraqat import __version__
from fraqat.config import load_recipe
from fraqat.distill import Distiller, TeacherSpec, checkpoint_blocks_, store_weights_, validation_loss
from fraqat.nn import IntegerLayers, quantize_
from fraqat.planning.recorder import StepRecorder
from fraqat.table import Table
from fraqat.workflows.sessions import open_session
from fraqat.workflows.training import resolve_schedule
from planner_error import CASES, ZOO, Case, build, predict

MODELS: Mapping[str, tuple[Case, Mapping[str, Any]]] = {
    "zoo:color-digits-sana": (ZOO, {}),
    "sana": (CASES["sana"], {"num_layers": 2}),
    "sd3": (CASES["sd3"], {"num_layers": 2, "dual_attention_layers": [0]}),
    "pixart": (CASES["pixart"], {"num_layers": 2}),
    "flux": (CASES["flux"], {"num_layers": 2, "num_single_layers": 2}),
    "gemma2": (CASES["gemma2"], {"num_hidden_layers": 2}),
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "teacher bfloat16": {"teacher": TeacherSpec("bfloat16")},
    "teacher int8": {"teacher": TeacherSpec("int8")},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "blocks": {"activation_checkpointing": "blocks"},
}
NUM_STEPS, NUM_SAMPLES = 30, 2
_MIB = 2**20


def forward_and_backward(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[int, float, list[Tensor]]:
    """Bytes that the forward pass leaves, seconds of the backward pass, gradients."""
    model.zero_grad()
    gc.collect()
    recorder = StepRecorder()
    with recorder:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = predict(model, inputs)
            loss = torch.stack([value.float().square().mean() for value in outputs.values()]).sum()
        del outputs
        gc.collect()
        kept = recorder.num_bytes()
    start = time.process_time()
    loss.backward()
    backward_s = time.process_time() - start
    return kept, backward_s, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def measure_kept() -> Iterator[dict[str, Any]]:
    """Rows of the first part."""
    for name, (case, changes) in MODELS.items():
        torch.manual_seed(0)
        model = build(case, changes)
        quantize_(model)
        model.train()
        inputs = case.inputs(NUM_SAMPLES)
        fake, fake_s, _ = forward_and_backward(model, inputs)
        layers = IntegerLayers(model)
        forward_and_backward(model, inputs)  # chooses engines
        plain, plain_s, gradients = forward_and_backward(model, inputs)
        checkpoint_blocks_(model)
        blocks, blocks_s, again = forward_and_backward(model, inputs)
        layers.release_()
        yield {
            "part": "kept",
            "model": name,
            "fake_quantized_bytes": fake,
            "integer_bytes": plain,
            "blocks_bytes": blocks,
            "backward_s": {"fake_quantized": fake_s, "integer": plain_s, "blocks": blocks_s},
            "gradients_are_equal": all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True)),
        }


class TimedTask:
    """A task that adds up the CPU time of one model's predictions."""

    def __init__(self, inner: Any, timed: nn.Module):
        self.inner, self.timed, self.spent_s = inner, timed, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """Of the inner task."""
        start = time.process_time()
        output = self.inner.predict(model, inputs)
        if model is self.timed:
            self.spent_s += time.process_time() - start
        return output


def measure_training() -> Iterator[dict[str, Any]]:
    """Rows of the second part."""
    settings = ("data.num_train=1024", "data.num_validation=128", f"train.steps={NUM_STEPS}", "train.tensorboard=false")
    recipe = load_recipe("color-digits", settings)
    session = open_session(recipe)
    schedule = resolve_schedule(recipe, 1)
    assert schedule is not None
    for name, changes in OPTIONS.items():
        student, _ = session.new_student(recipe)
        teacher = session.load_model(torch.float32)
        task: Any = TimedTask(session.task, teacher)
        with tempfile.TemporaryDirectory() as folder:
            train = dataclasses.replace(recipe.train, **changes)
            distiller: Any = Distiller(task, teacher, student, schedule, train, Path(folder))
            start = time.process_time()
            distiller.run()
            run_s = time.process_time() - start
        yield {
            "part": "train",
            "option": name,
            "num_steps": NUM_STEPS,
            "validation_loss": validation_loss(session.task, session.teacher, student, recipe.train),
            "teacher_bytes": distiller.teacher_memory.num_bytes,
            "state_bytes": sum(t.numel() * t.itemsize for t in distiller.optimizer.state_tensors()),
            "run_s": run_s,
            "teacher_share": task.spent_s / run_s,
        }
    yield from _teacher_errors(session)


def _teacher_errors(session: Any) -> Iterator[dict[str, Any]]:
    """SQNR of the output of a teacher in fewer bytes, under autocast as in training."""
    inputs = session.task.make_inputs(session.task.validation_batches(64)[0], torch.Generator().manual_seed(0))
    outputs: dict[str, Tensor] = {}
    for dtype in ("model", "bfloat16", "int8"):
        teacher = session.load_model(torch.float32).eval().requires_grad_(False)
        store_weights_(teacher, dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs[dtype] = session.task.predict(teacher, inputs)["output"].double()
    for dtype in ("bfloat16", "int8"):
        noise = float((outputs["model"] - outputs[dtype]).square().sum())
        signal = float(outputs["model"].square().sum())
        sqnr_db = 10 * math.log10(signal / noise) if noise else None
        yield {"part": "teacher", "dtype": dtype, "output_sqnr_db": sqnr_db, "is_equal": noise == 0}


def to_tables(records: list[dict[str, Any]]) -> list[Table]:
    """Both parts for a reader."""
    kept = tuple(
        (
            r["model"],
            r["fake_quantized_bytes"] / _MIB,
            r["integer_bytes"] / _MIB,
            r["blocks_bytes"] / _MIB,
            r["backward_s"]["integer"],
            r["backward_s"]["blocks"],
            r["gradients_are_equal"],
        )
        for r in records
        if r["part"] == "kept"
    )
    columns = ("model", "fake quantization, MiB", "integer, MiB", "blocks, MiB", "backward, s", "blocks, s", "equal")
    names = ("option", "validation_loss", "teacher_bytes", "state_bytes", "run_s", "teacher_share")
    trained = tuple(tuple(r[name] for name in names) for r in records if r["part"] == "train")
    errors = tuple((r["dtype"], r["output_sqnr_db"], r["is_equal"]) for r in records if r["part"] == "teacher")
    return [
        Table("Kept for the backward pass", columns, kept),
        Table(f"{NUM_STEPS} steps of color-digits", names, trained),
        Table("Teacher in fewer bytes", ("dtype", "output SQNR, dB", "equal"), errors),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines, one per row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    common = {
        "benchmark": "training_memory",
        "fraqat": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "commit": commit.stdout.strip(),
    }
    records: list[dict[str, Any]] = []
    for measure in (measure_kept, measure_training):
        for record in measure():
            records.append(record)
            if arguments.out is not None:
                with arguments.out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({**common, **record}) + "\n")
    print("\n\n".join(map(str, to_tables(records))))


if __name__ == "__main__":
    main()
