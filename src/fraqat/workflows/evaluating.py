"""`fraqat evaluate`: the original, the baselines and the student on the same held-out data."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from fraqat.config import ORIGINAL, Recipe
from fraqat.distill import validation_loss
from fraqat.errors import ModelError, OutputError, config_error
from fraqat.export import PackedSize, write_packed
from fraqat.files import atomic_folder, write_json_atomic
from fraqat.nn import quantized_layers, spec_label
from fraqat.table import Table, format_value
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import Evaluator, Session, check_served, open_session

_FIRST_COLUMNS = ("model", "weights", "size, MB", "distillation loss")
_LAST_COLUMNS = ("steps", "train, s")
_INTERVAL_NOTE = (
    "95 %: interval of the value beside or above it by bootstrap over the held-out samples of this evaluation, those of one "
    "prompt and seed together; it does not say how much another training run would differ."
)


def evaluate(
    run: RunFolder,
    progress: Progress,
    *,
    bits: float | None = None,
    num_samples: int | None = None,
    overwrite: bool = False,
    session: Session[Any] | None = None,
) -> Table:
    """Measures every finished method against the original and writes `evaluation.json`, or `evaluation-N-bits.json`.

    Args:
        run: A finished run.
        progress: Told what happens.
        bits: Which of the widths that the student serves (`schedule.kind: several`); None is the final one.
        num_samples: Held-out images, sequences or phrases per model, instead of the recipe's number.
        overwrite: Replace an evaluation that is there.
        session: Models and data of the run's recipe, if they are loaded already.

    Returns:
        The table, original first.

    Raises:
        OutputError: There is an evaluation already.
        ModelError: The run is not finished.
    """
    path = run.at_width(run.evaluation_path, bits)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already. Fix: pass --overwrite to evaluate again.")
    if num_samples is not None and num_samples < 2:
        raise config_error("num_samples", num_samples, allowed="2 or more", fix="measure on more")
    recipe, methods = run.recipe(), run.methods()
    check_served(recipe, bits)
    session = session or open_session(recipe, progress)
    evaluator = session.evaluator(num_samples)
    for name in run.untrained_baselines():
        progress.warn(f"baseline {name} is not trained and left out: run `fraqat train --baselines` to add it")
    samples: dict[str, tuple[bytes, ...]] = {}
    measured, samples[ORIGINAL] = _measure(evaluator, ORIGINAL, session.teacher, progress)
    models = [_original_row(session) | measured]
    for name, method in methods.items():
        own_bits = bits if method is run else None
        label = name if own_bits is None else f"{name}, {own_bits:g} bits"
        student = session.load_student(method.recipe(), method.student_path, bits=own_bits)
        measured, samples[label] = _measure(evaluator, label, student, progress)
        models.append(_method_row(session, label, method, student) | measured)
        del student  # before the next one is loaded
    _write_samples(run.at_width(run.samples_path, bits), samples, evaluator.sample_suffix)
    evaluation = {
        "prompts": list(evaluator.shown_prompts),
        "columns": [dataclasses.asdict(column) for column in evaluator.columns],
        "notes": [
            *evaluator.notes,
            *((_INTERVAL_NOTE,) if any(row["intervals"] for row in models) else ()),
            _loss_note(recipe),
            _methods_note(methods),
        ],
        "models": models,
    }
    write_json_atomic(path, evaluation)
    return quality_table(evaluation, recipe.name)


def quality_table(evaluation: Mapping[str, Any], name: str) -> Table:
    """The table of `evaluation.json` of the recipe `name`.

    Raises:
        ModelError: The evaluation lacks something, as one of another version does.
    """
    try:
        columns = _with_intervals(evaluation)
        titles = (*_FIRST_COLUMNS, *(title for title, _, _ in columns), *_LAST_COLUMNS)
        rows = tuple(_cells(row, columns) for row in evaluation["models"])
        notes = tuple(evaluation["notes"])
    except (KeyError, TypeError) as error:
        raise ModelError(f"evaluation.json lacks {error}. Fix: run `fraqat evaluate RUN --overwrite`.") from error
    return Table(f"Quality of {name}", titles, rows, notes)


def _with_intervals(evaluation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Title, column, and whether it holds the intervals: after each column where a model has one, as older files have none."""
    columns: list[tuple[str, Mapping[str, Any], bool]] = []
    for column in evaluation["columns"]:
        columns.append((column["title"], column, False))
        if any(column["key"] in row.get("intervals", {}) for row in evaluation["models"]):
            columns.append((f"{column['title'].rpartition(', ')[0] or column['title']}, 95 %", column, True))
    return columns


def _cells(row: Mapping[str, Any], columns: Sequence[tuple[str, Mapping[str, Any], bool]]) -> tuple[Any, ...]:
    return (
        row["model"],
        row["weights"],
        round(row["num_file_bytes"] / 1e6, 2),
        row["validation_loss"],
        *(
            _shown_interval(row, column) if is_interval else _shown(row["quality"][column["key"]], column)
            for _, column, is_interval in columns
        ),
        row["num_steps"],
        round(row["train_s"], 1) if row["train_s"] is not None else None,
    )


def _shown_interval(row: Mapping[str, Any], column: Mapping[str, Any]) -> str | None:
    interval = row.get("intervals", {}).get(column["key"])
    if interval is None:
        return None
    return " to ".join(format_value(_shown(interval[end], column)) for end in ("low", "high"))


def _shown(value: float | None, column: Mapping[str, Any]) -> float | None:
    if value is None:
        return None
    scaled = value * column["factor"]
    return scaled if column["decimals"] is None else round(scaled, column["decimals"])


def _measure(
    evaluator: Evaluator, label: str, model: nn.Module, progress: Progress
) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """Values and intervals as they go into the model's row, and the samples."""
    start = time.perf_counter()
    measurement = evaluator.measure(label, model, progress)
    progress.say(f"{label}: measured in {time.perf_counter() - start:.1f} s")
    intervals = {key: {"low": found.low, "high": found.high} for key, found in measurement.intervals.items()}
    return {"quality": dict(measurement.quality), "intervals": intervals}, measurement.samples


def _loss_note(recipe: Recipe) -> str:
    loss = " + ".join(f"{term.weight:g} {term.name}" for term in recipe.train.losses)
    return (
        f"Distillation loss: {loss.replace('1 mse', 'mean squared error')} to the original's output on held-out data. "
        "Size: file of the quantized model, everything in it."
    )


def _methods_note(methods: Mapping[str, RunFolder]) -> str:
    """What was trained, and how the widths are written."""
    trained = [f"{label}: {_trained_phrase(run.read_json(run.result_path))}." for label, run in methods.items()]
    return " ".join([*trained, "W4A8: weights of 4 bits, layer inputs of 8; behind a comma, layers that differ."])


def _trained_phrase(result: Mapping[str, Any]) -> str:
    if not result["num_steps"]:
        return "quantized without training"
    served, stages = list(result.get("losses", {})), [f"{bits:g}" for bits, _ in result.get("stages", [])]
    widths = f"{', '.join(served)} bits, step by step" if len(served) > 1 else f"{', '.join(stages)} bits"
    return f"{result['num_steps']} training steps at {widths}"


def _original_row(session: Session[Any]) -> dict[str, Any]:
    return {
        "model": ORIGINAL,
        "weights": _dtype_label(session),
        "num_file_bytes": _original_bytes(session),
        "validation_loss": None,
        "num_steps": None,
        "train_s": None,
    }


def _method_row(session: Session[Any], label: str, method: RunFolder, student: nn.Module) -> dict[str, Any]:
    result = method.read_json(method.result_path)
    return {
        "model": label,
        "weights": _weights_label(student),
        **dataclasses.asdict(packed_size(session, student)),
        "validation_loss": validation_loss(session.task, session.teacher, student, session.recipe.train),
        "num_steps": result["num_steps"],
        "train_s": result["train_s"],
    }


def packed_size(session: Session[Any], student: nn.Module) -> PackedSize:
    """Size of the student's packed file, found by writing it to a temporary place."""
    with TemporaryDirectory() as folder:
        return write_packed(student, session.description(), Path(folder) / "packed")


def _weights_label(student: nn.Module) -> str:
    """What most layers are, then the exceptions with their number: `W4A8`, or `W4A8, 1 W4A16`."""
    counts = Counter(spec_label(layer.spec) for _, layer in quantized_layers(student))
    (usual, _), *others = counts.most_common()
    return ", ".join([usual, *(f"{num} {label}" for label, num in others)])


def _original_bytes(session: Session[Any]) -> int:
    if files := session.original_files():
        return sum(path.stat().st_size for path in files)
    return sum(p.numel() * p.element_size() for p in session.teacher.parameters())


def _dtype_label(session: Session[Any]) -> str:
    from fraqat.tasks.loading import stored_dtype

    files = session.original_files()
    return stored_dtype(files[0]) if files else session.recipe.model.teacher_dtype


def _write_samples(folder: Path, samples: Mapping[str, tuple[bytes, ...]], suffix: str) -> None:
    with atomic_folder(folder, replace=True) as temporary:
        for label, files in samples.items():
            (temporary / label).mkdir()
            for i, content in enumerate(files):
                (temporary / label / f"{i:02d}{suffix}").write_bytes(content)
