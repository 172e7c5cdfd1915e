"""`fraqat train`: one run, or a run with its baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fraqat.analysis import layer_errors
from fraqat.config import Recipe, load_values
from fraqat.distill import (
    ALONE,
    Distiller,
    DistillResult,
    StepRecord,
    Workers,
    guidance_phrase,
    hold_teacher_,
    importance_phrase,
    joined,
    validation_loss,
)
from fraqat.files import atomic_file, folder_lock, save_tensors, write_json_atomic
from fraqat.nn import QuantReport, describe, merge_adapters_
from fraqat.schedules import Schedule, StageUnit
from fraqat.table import Table
from fraqat.workflows.calibration import calibrated_student
from fraqat.workflows.heartbeat import Heartbeat
from fraqat.workflows.out_of_memory import explain_out_of_memory
from fraqat.workflows.progress import Progress, SilentProgress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import Session, open_session

_LAYER_SAMPLES = 4
_PATHS = (
    "model.source",
    "model.single_file",
    "data.records.path",
    "quantization.layer_widths.table",
    "data.speakers_file",
    "evaluation.prompts.source",
    "evaluation.recognizer",
    "evaluation.vocoder",
    "evaluation.lm_eval.include_path",
)


def layers(recipe: Recipe) -> QuantReport:
    """The table of layers that `recipe` leads to, for a dry run; from the model's configuration, without its weights."""
    session = open_session(recipe)
    report = session.layers(recipe)
    for name in recipe.baselines:
        session.layers(recipe.baseline(name))
    for method in (recipe, *(recipe.baseline(name) for name in recipe.baselines)):
        session.check(method)
    return report


def stages(recipe: Recipe) -> Table:
    """The stages of a recipe and of its baselines, for a dry run; loads nothing."""
    steps_per_epoch = max(1, (recipe.num_train or recipe.train.batch_size) // recipe.train.batch_size)
    main = resolve_schedule(recipe, steps_per_epoch)
    shared_steps = main.total_steps if main else None
    rows: list[tuple[object, ...]] = []
    notes: list[str] = []
    for method in (*(recipe.baseline(name) for name in recipe.baselines), recipe):
        schedule = resolve_schedule(method, steps_per_epoch, shared_steps)
        if schedule is None:
            rows.append((method.label, None, method.quantization.final_bits, 0, None))
            continue
        rate = method.train.learning_rate
        is_list = schedule.automatic is not None or schedule.widths
        bits = _bits_list(schedule.choices or schedule.widths) if is_list else None
        rows += [
            (method.label, s.index + 1, bits or s.bits, s.num_steps, rate.at(s.first_step, schedule)) for s in schedule
        ]
        if is_list:
            notes.append(f"{method.label}: {_stages_phrase(schedule)}.")
    return Table(
        "Stages", ("method", "stage", "bits", "steps", "learning rate at its start"), tuple(rows), tuple(notes)
    )


def train(
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    with_baselines: bool = False,
    session: Session[Any] | None = None,
) -> RunFolder:
    """Trains a recipe in a folder, or goes on with it; a finished run is left as it is.

    Args:
        recipe: What to do.
        folder: The run folder.
        progress: Told what happens.
        with_baselines: Train the recipe's baselines first, each in `baselines/NAME`.
        session: Models and data of the recipe, if they are loaded already.

    Raises:
        FraqatError: See the errors of `Distiller.run` and `RunFolder.create`.
    """
    recipe = with_absolute_paths(recipe)
    with joined(recipe.train.parallel, recipe.model.torch_device) as workers:
        if not workers.is_first:
            progress = SilentProgress()
        run = RunFolder(folder)
        workers.first(lambda: RunFolder.create(folder, recipe))
        with folder_lock(run.path) if workers.is_first else nullcontext():
            session = session or open_session(recipe, progress)
            baselines = [(recipe.baseline(name), run.baseline(name)) for name in recipe.baselines if with_baselines]
            for method, place in ((recipe, run), *baselines):
                if not place.is_finished:
                    session.check(method)  # before data are encoded and the first one is trained
            for baseline, place in baselines:
                workers.first(lambda b=baseline, p=place: RunFolder.create(p.path, b))
                _train_one(session, baseline, place, progress, workers)
            _train_one(session, recipe, run, progress, workers)
    if recipe.train.teacher.dtype != "model":
        session.forget_teacher()  # evaluation measures the original as it is
    return run


def resolve_schedule(recipe: Recipe, steps_per_epoch: int, shared_steps: int | None = None) -> Schedule | None:
    """The stages of a run; None if it trains nothing (0 steps).

    Args:
        recipe: Gives schedule and length.
        steps_per_epoch: Batches of one pass over the data.
        shared_steps: Length for a baseline whose own schedule has none, from the run that it is compared with.
    """
    total = recipe.train.total_steps(steps_per_epoch)
    if total == 0:
        return None
    if total is None and recipe.schedule.unit is StageUnit.SHARE:
        total = shared_steps
    return recipe.schedule.resolve(recipe.quantization.final_bits, total, steps_per_epoch, recipe.train.seed)


def _train_one(
    session: Session[Any], recipe: Recipe, run: RunFolder, progress: Progress, workers: Workers = ALONE
) -> None:
    if any(workers.gather([run.is_finished])[0]):  # as the first process sees it: folders on other machines may lag
        progress.say(f"{recipe.label}: finished already, nothing to do")
        return
    with Heartbeat(run.path) as heartbeat, explain_out_of_memory(session, recipe):
        student, result = train_student(session, recipe, run, progress, heartbeat)
        heartbeat.phase("measuring layers")
        workers.first(lambda: _write_result(session, recipe, run, student, result))
    progress.say(f"{recipe.label}: held-out distillation loss {result.validation_loss:.5f}")


def train_student(
    session: Session[Any], recipe: Recipe, run: RunFolder, progress: Progress, heartbeat: Heartbeat | None = None
) -> tuple[nn.Module, DistillResult]:
    """Trains a new student to the end of a recipe, from the newest checkpoint of the run's folder if there is one.

    Args:
        session: Models and data.
        recipe: The session's own, or one that shares model and data with it.
        run: Gets checkpoints and log; `student.safetensors` and `result.json` are the caller's to write.
        progress: Told what happens.
        heartbeat: Of this process.

    Raises:
        FraqatError: See the errors of `Distiller.run`.
    """
    label = recipe.label
    progress.say(f"{label}: preparing model and data")
    task, teacher = session.task, session.teacher
    schedule = _shared_schedule(session, recipe)  # encodes what is not encoded yet, before a student takes memory
    student = calibrated_student(session, recipe, progress)
    if schedule is None:
        hold_teacher_(teacher, student, recipe.train.teacher.dtype)  # as a student that is trained has it
        merge_adapters_(student)
        return student, DistillResult(0, 0.0, validation_loss(task, teacher, student, recipe.train))

    def on_step(record: StepRecord) -> None:
        progress.step(record)
        if heartbeat is not None:
            heartbeat.step(record)

    progress.say(f"{label}: {schedule.total_steps} steps, {_stages_phrase(schedule)}")
    distiller = Distiller(
        task,
        teacher,
        student,
        schedule,
        recipe.train,
        run.path,
        fingerprint=recipe.fingerprint(),
        on_step=on_step,
        on_phase=heartbeat.phase if heartbeat is not None else lambda phase: None,
        say=progress.say,
        warn=progress.warn,
    )
    is_recorded = recipe.train.teacher.outputs == "recorded"
    drawn = importance_phrase(distiller.task, recipe.train.timestep_importance, is_recorded=is_recorded)
    for phrase in (guidance_phrase(distiller.task, recipe.train), drawn):
        if phrase is not None:
            progress.say(f"{label}: {phrase}")
    try:
        result = distiller.run()
    finally:
        if is_recorded:
            session.forget_teacher()  # it has left memory, and whoever comes next wants it back
    is_whole = not distiller.models.is_sharded or distiller.workers.is_first
    if distiller.models.is_sharded:
        student = _whole_student(session, recipe, distiller)
    if recipe.train.parallel.teacher == "shard":
        session.forget_teacher()  # it is in parts, and whoever comes next wants it whole
    if is_whole:
        merge_adapters_(student)
    return student, result


def _stages_phrase(schedule: Schedule) -> str:
    if schedule.automatic is not None:
        return f"bits chosen while training: {_bits_list(schedule.choices)}"
    if schedule.widths:
        return f"bits {schedule.order.value.replace('_', ' ')}: {_bits_list(schedule.widths)}"
    return "bits (steps): " + ", ".join(f"{stage.bits:g} ({stage.num_steps})" for stage in schedule)


def _bits_list(widths: Sequence[float]) -> str:
    return ", ".join(f"{bits:g}" for bits in widths)


def _whole_student(session: Session[Any], recipe: Recipe, distiller: Distiller) -> nn.Module:
    """The trained student in one piece, in the first process; the others keep their parts, and nobody asks for them."""
    state = distiller.models.full_state(keeps=distiller.workers.is_first)
    if not distiller.workers.is_first:
        return distiller.student
    student, _ = session.new_student(recipe, is_trained=True)
    student.load_state_dict(state)
    return student.eval()


def _shared_schedule(session: Session[Any], recipe: Recipe) -> Schedule | None:
    steps_per_epoch = session.task.steps_per_epoch(recipe.train.batch_size)
    main = resolve_schedule(session.recipe, steps_per_epoch)
    return resolve_schedule(recipe, steps_per_epoch, main.total_steps if main else None)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Local files and folders are recorded so that they are found from any working directory."""
    values = recipe.to_values()
    for place in _PATHS:
        *sections, last = place.split(".")
        section: Any = values
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(last), str) and Path(section[last]).exists():
            section[last] = str(Path(section[last]).resolve())
    return load_values(values)


def _write_result(
    session: Session[Any], recipe: Recipe, run: RunFolder, student: nn.Module, result: DistillResult
) -> None:
    with atomic_file(run.student_path) as path:
        save_tensors(student.state_dict(), path)
    write_json_atomic(run.layers_path, _layer_rows(session, recipe, student))
    write_json_atomic(run.result_path, dataclasses.asdict(result))


def _layer_rows(session: Session[Any], recipe: Recipe, student: nn.Module) -> list[dict[str, Any]]:
    # Every layer's output of both models is held at once: a few samples suffice.
    batch = session.task.validation_batches(min(_LAYER_SAMPLES, session.recipe.train.batch_size))[0]
    inputs = session.task.make_inputs(batch, torch.Generator().manual_seed(0))
    errors = layer_errors(session.reference(recipe), student, lambda model: session.task.predict(model, inputs))
    table = describe(student, session.families).to_table().to_json()
    rows: list[dict[str, Any]] = table["rows"]
    for row in rows:
        error = errors.get(row["layer"])
        row["weight SQNR, dB"] = error.weight_sqnr_db if error else None
        row["output SQNR, dB"] = error.output_sqnr_db if error else None
    return rows
