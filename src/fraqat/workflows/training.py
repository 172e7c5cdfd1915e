"""`fraqat train`: one run, or a run with its baselines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fraqat.analysis import layer_errors
from fraqat.config import Recipe
from fraqat.distill import Distiller, DistillResult, validation_loss
from fraqat.files import atomic_file, write_json_atomic
from fraqat.nn import QuantReport, calibrate_, describe
from fraqat.schedules import Schedule
from fraqat.tasks import architecture_of
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder, method_label
from fraqat.workflows.session import Session


def plan(recipe: Recipe) -> QuantReport:
    """The table of layers that `recipe` leads to, for a dry run. Loads the model, trains nothing."""
    session = Session(recipe)
    _, report = session.new_student(recipe)
    for name in recipe.baselines:
        session.new_student(recipe.baseline(name))
    return report


def train(recipe: Recipe, folder: Path, progress: Progress, *, with_baselines: bool = False) -> RunFolder:
    """Trains a recipe in a folder, or goes on with it; a finished run is left as it is.

    Args:
        recipe: What to do.
        folder: The run folder.
        progress: Told what happens.
        with_baselines: Train the recipe's baselines first, each in `baselines/NAME`.

    Raises:
        FraqatError: See the errors of `Distiller.run` and `RunFolder.create`.
    """
    run = RunFolder.create(folder, recipe)
    session = Session(recipe)
    if with_baselines:
        for name in recipe.baselines:
            _train_one(
                session,
                recipe.baseline(name),
                RunFolder.create(run.baseline(name).path, recipe.baseline(name)),
                progress,
            )
    _train_one(session, recipe, run, progress)
    return run


def resolve_schedule(recipe: Recipe, steps_per_epoch: int) -> Schedule | None:
    """The stages of a run; None if it trains nothing (0 steps)."""
    total = recipe.train.total_steps(steps_per_epoch)
    if total == 0:
        return None
    return recipe.schedule.resolve(recipe.quantization.weight.bits, total, steps_per_epoch)


def _train_one(session: Session, recipe: Recipe, run: RunFolder, progress: Progress) -> None:
    label = recipe.name if "/" in recipe.name else method_label(recipe)
    if run.is_finished:
        progress.say(f"{label}: finished already, nothing to do")
        return
    progress.say(f"{label}: preparing model and data")
    task, teacher = session.task, session.teacher
    student, _ = session.new_student(recipe)
    calibration = task.calibration_batches(recipe.train.calibration_samples, recipe.train.batch_size)
    if num_calibrated := calibrate_(student, lambda batch: task.predict(student, batch), calibration):
        progress.say(f"{label}: static activation ranges of {num_calibrated} layers calibrated")
    schedule = resolve_schedule(recipe, task.steps_per_epoch(recipe.train.batch_size))
    if schedule is None:
        result = DistillResult(0, 0.0, validation_loss(task, teacher, student, recipe.train))
    else:
        stages = ", ".join(f"{stage.bits:g} ({stage.num_steps})" for stage in schedule)
        progress.say(f"{label}: {schedule.total_steps} steps, bits (steps): {stages}")
        distiller = Distiller(
            task,
            teacher,
            student,
            schedule,
            recipe.train,
            run.path,
            fingerprint=recipe.fingerprint(),
            on_step=progress.step,
            warn=progress.warn,
        )
        result = distiller.run()
    _write_result(session, run, student, result)
    progress.say(f"{label}: held-out distillation loss {result.validation_loss:.5f}")


def _write_result(session: Session, run: RunFolder, student: nn.Module, result: DistillResult) -> None:
    state = {name: tensor.detach().contiguous().clone() for name, tensor in student.state_dict().items()}
    with atomic_file(run.student_path) as path:
        save_file(state, path)
    write_json_atomic(run.layers_path, _layer_rows(session, student))
    write_json_atomic(run.result_path, dataclasses.asdict(result))


def _layer_rows(session: Session, student: nn.Module) -> list[dict[str, Any]]:
    batch = session.task.validation_batches(session.recipe.train.batch_size)[0]
    inputs = session.task.make_inputs(batch, torch.Generator().manual_seed(0))
    errors = layer_errors(session.teacher, student, lambda model: session.task.predict(model, inputs))
    table = describe(student, architecture_of(student).families).to_table().to_json()
    rows: list[dict[str, Any]] = table["rows"]
    for row in rows:
        error = errors.get(row["layer"])
        row["weight SQNR, dB"] = error.weight_sqnr_db if error else None
        row["output SQNR, dB"] = error.output_sqnr_db if error else None
    return rows
