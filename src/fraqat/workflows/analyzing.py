"""`fraqat analyze`: what quantization does to the model of a recipe before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

from torch import nn

from fraqat.analysis import (
    DEFAULT_BITS,
    BitWidths,
    Outliers,
    Sensitivity,
    input_outliers,
    layer_sensitivity,
    losses_over_widths,
    tensor_outliers,
)
from fraqat.config import Recipe
from fraqat.distill import hold_teacher_, validation_loss
from fraqat.errors import ModelError, OutputError, config_error
from fraqat.files import explain_os_errors, write_json_atomic, write_text_atomic
from fraqat.nn import LayerFamilies, describe
from fraqat.table import Table, format_value
from fraqat.workflows.calibration import calibrated_student
from fraqat.workflows.layer_widths import DEFAULT_WIDTHS, check_one_width, layer_width_tables
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import environment
from fraqat.workflows.sessions import Session, open_session

ANALYSIS_FOLDER = "analysis"
"""Of a run, for `fraqat report`."""

Kind = Literal["bits", "outliers", "sensitivity", "layer-widths"]

_LOSS_NOTE = (
    "Loss: the recipe's distillation loss on its held-out data, without training. "
    "With nothing quantized it is {float_loss}."
)


class AnalysisKind(StrEnum):
    """Choices of `--what`."""

    BITS = "bits"
    OUTLIERS = "outliers"
    SENSITIVITY = "sensitivity"
    LAYER_WIDTHS = "layer-widths"


@dataclass(frozen=True)
class AnalysisFiles:
    """What an analysis leaves in its folder: tables for programs, a page for people, its drawings for papers."""

    folder: Path
    kind: AnalysisKind

    @property
    def tables(self) -> Path:
        """Kind, recipe, environment and tables as JSON; `fraqat report` reads it in the folder `analysis` of a run."""
        return self.folder / f"{self.kind.value}.json"

    @property
    def page(self) -> Path:
        """One self-contained HTML page."""
        return self.folder / f"{self.kind.value}.html"

    def drawing(self, index: int) -> Path:
        """An SVG file: `bits.svg`, `outliers.svg`, `outliers-2.svg`."""
        return self.folder / f"{self.kind.value}{f'-{index + 1}' if index else ''}.svg"

    def existing(self) -> list[Path]:
        """Files of this kind that are there."""
        drawings = sorted(self.folder.glob(f"{self.kind.value}*.svg"))
        return [path for path in (self.tables, self.page, *drawings) if path.exists()]


def analyze(
    recipe: Recipe,
    kind: AnalysisKind,
    progress: Progress,
    *,
    bits: Sequence[float] | None = None,
    folder: Path | None = None,
    overwrite: bool = False,
    session: Session[Any] | None = None,
) -> list[Table]:
    """Measures the model of a recipe, and writes tables, drawings and a page where a folder is given.

    Args:
        recipe: Gives model, data, quantization, loss and batch size.
        kind: What to measure.
        progress: Told what happens.
        bits: Widths, only for `bits` and `layer-widths`; None is `fraqat.analysis.DEFAULT_BITS` and `DEFAULT_WIDTHS`.
        folder: Where to; None writes nothing.
        overwrite: Replace files of an earlier analysis of this kind.
        session: Models and data of the recipe, if they are loaded already.

    Returns:
        The tables, the main one first.

    Raises:
        ConfigError: An impossible width, or widths for a kind that has none.
        OutputError: There is such an analysis in the folder already.
    """
    if bits is not None and kind not in (AnalysisKind.BITS, AnalysisKind.LAYER_WIDTHS):
        raise config_error("bits", list(bits), allowed="only with --what bits or layer-widths", fix="leave --bits out")
    if kind is AnalysisKind.LAYER_WIDTHS:
        check_one_width(recipe)
    files = AnalysisFiles(folder, kind) if folder is not None else None
    if files is not None and not overwrite and (existing := files.existing()):
        raise OutputError(f"{existing[0]} exists already. Fix: pass --overwrite or another --out.")
    session = session or open_session(recipe, progress)
    if kind is AnalysisKind.BITS:
        tables = _bits(session, recipe, progress, tuple(DEFAULT_BITS if bits is None else bits))
    elif kind is AnalysisKind.OUTLIERS:
        tables = _outliers(session, recipe, progress)
    elif kind is AnalysisKind.LAYER_WIDTHS:
        widths = tuple(DEFAULT_WIDTHS if bits is None else bits)
        tables = layer_width_tables(session, recipe, _student(session, recipe, progress, kind), widths, progress)
    else:
        tables = _sensitivity(session, recipe, progress)
    if files is not None:
        _write(files, recipe, tables)
        progress.say(f"written to {files.page}")
    return tables


def read_analyses(folder: Path) -> list[tuple[Kind, tuple[Table, ...]]]:
    """The analyses in a folder, as `analyze` wrote them.

    Raises:
        ModelError: A file is damaged.
    """
    found: list[tuple[Kind, tuple[Table, ...]]] = []
    for kind in AnalysisKind:
        path = AnalysisFiles(folder, kind).tables
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append((kind.value, tuple(_table(value) for value in values["tables"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read: {error}. Fix: run `fraqat analyze` again.") from error
    return found


def _table(values: dict[str, Any]) -> Table:
    columns = tuple(values["columns"])
    rows = tuple(tuple(row[column] for column in columns) for row in values["rows"])
    return Table(values["title"], columns, rows, tuple(values["notes"]))


def _write(files: AnalysisFiles, recipe: Recipe, tables: Sequence[Table]) -> None:
    from fraqat.report import Analysis, analysis_drawings, render_analysis, svg_file

    analysis = Analysis(files.kind.value, tuple(tables))
    versions = environment()
    page = render_analysis(
        f"{files.kind.value.capitalize()}: {recipe.name}",
        _summary(files.kind, tables[0]),
        analysis,
        recipe.to_yaml(),
        Table("Versions", ("part", "version"), tuple(versions.items())),
    )
    with explain_os_errors(files.folder):
        files.folder.mkdir(parents=True, exist_ok=True)
    drawings = {files.drawing(index): svg_file(drawing) for index, drawing in enumerate(analysis_drawings(analysis))}
    for path, text in drawings.items():
        write_text_atomic(path, text)
    write_text_atomic(files.page, page)
    values = {
        "kind": files.kind.value,
        "tables": [table.to_json() | {"columns": list(table.columns)} for table in tables],
        "recipe": recipe.to_values(),
        "environment": versions,
    }
    write_json_atomic(files.tables, values)
    for stale in set(files.existing()) - {files.tables, files.page, *drawings}:
        stale.unlink()  # an earlier analysis had more drawings


def _summary(kind: AnalysisKind, table: Table) -> str:
    """The result in one sentence, from the main table."""
    if not table.rows:
        return "Nothing was measured."
    if kind is AnalysisKind.BITS:
        widest, narrowest = (choose(table.rows, key=lambda row: row[0]) for choose in (max, min))
        (bits, loss), (last_bits, last_loss) = widest[:2], narrowest[:2]
        return (
            f"Without training, the held-out distillation loss is {format_value(loss)} with weights of {bits:g} bits and "
            f"{format_value(last_loss)} with weights of {last_bits:g}."
        )
    if kind is AnalysisKind.OUTLIERS:
        phrases: list[str] = []
        for what in ("input", "weight"):
            column = table.columns.index(f"{what} kurtosis")
            known = [row for row in table.rows if row[column] is not None]
            if known:
                row = max(known, key=lambda row: row[column])
                phrases.append(f"of {what}s {format_value(row[column])} ({row[0]})")
        return f"Largest kurtosis, 3 for a normal distribution: {', '.join(phrases) or 'of no layer'}."
    if kind is AnalysisKind.LAYER_WIDTHS:
        return "The rise of the loss with the weights of one layer alone at each width: what widths by layer are chosen from."
    first, rises = table.rows[0], table.columns.index("rise alone")
    return (
        f"Quantized alone, {first[0]} raises the held-out distillation loss most, by {format_value(first[rises])}; "
        f"the median layer by {format_value(median(row[rises] for row in table.rows))}."
    )


def _student(session: Session[Any], recipe: Recipe, progress: Progress, kind: AnalysisKind) -> nn.Module:
    """The student as training begins with it, at its final width."""
    progress.say(f"{recipe.label}: preparing model and data")
    # What its loss will be taken on comes first, so that the encoders are loaded once: calibration takes a part of the same.
    if kind is AnalysisKind.LAYER_WIDTHS:
        session.task.steps_per_epoch(recipe.train.batch_size)
    else:
        session.task.validation_batches(recipe.train.batch_size)
    student = calibrated_student(session, recipe, progress)
    hold_teacher_(session.teacher, student, recipe.train.teacher.dtype)
    return student


def _bits(session: Session[Any], recipe: Recipe, progress: Progress, bits: tuple[float, ...]) -> list[Table]:
    student = _student(session, recipe, progress, AnalysisKind.BITS)
    found = losses_over_widths(
        student,
        bits,
        lambda: validation_loss(session.task, session.teacher, student, recipe.train),
        on_width=lambda done: progress.count("widths", done, len(bits)),
    )
    return [_bits_table(recipe, found)]


def _bits_table(recipe: Recipe, found: BitWidths) -> Table:
    activation = recipe.quantization.activation
    inputs = f"inputs of {activation.bits:g} bits" if activation is not None else "inputs as the rules say"
    rows = tuple((w.bits, w.loss, w.float_input_loss, w.weight_sqnr_db) for w in found.widths)
    columns = ("bits", f"loss, {inputs}", "loss, float inputs", "weight SQNR, dB")
    notes = (
        _LOSS_NOTE.format(float_loss=format_value(found.float_loss)),
        "Bits: of every weight that no rule keeps wider. Weight SQNR: all quantized weights together.",
    )
    if all(w.loss == w.float_input_loss for w in found.widths):
        rows = tuple((w.bits, w.float_input_loss, w.weight_sqnr_db) for w in found.widths)
        columns = (columns[0], *columns[2:])
    return Table(f"Loss over widths of {recipe.name}", columns, rows, notes)


def _outliers(session: Session[Any], recipe: Recipe, progress: Progress) -> list[Table]:
    progress.say(f"{recipe.label}: preparing model and data")
    model, task = session.teacher, session.task
    names = [row.name for row in session.layers(recipe).quantized]
    batches = task.calibration_batches(recipe.train.calibration_samples, recipe.train.batch_size)
    inputs = input_outliers(
        model,
        names,
        partial(cast(Any, task).predict, model),
        batches,
        on_batch=lambda done: progress.count("passes over calibration batches", done, 2 * len(batches)),
    )
    weights = {name: tensor_outliers(cast(Any, model.get_submodule(name)).weight) for name in names}
    family_of = session.families.family_of
    rows = tuple(
        (name, family_of(name), *_outlier_cells(inputs[name]), *_outlier_cells(weights[name])) for name in names
    )
    measures = ("kurtosis", "max", "max / p99.9", "outside 3 sigma, %")
    columns = ("layer", "family", *(f"input {m}" for m in measures), *(f"weight {m}" for m in measures))
    notes = (
        f"Inputs and weights of the layers that the recipe quantizes, in the original model; inputs over "
        f"{recipe.train.calibration_samples} calibration samples.",
        "Kurtosis of a normal distribution is 3, and 0.27 % of it lies outside 3 sigma. p99.9: 99.9th percentile of the "
        "magnitudes.",
    )
    layers = Table(f"Outliers in {recipe.name}", columns, rows, notes)
    return [layers, _outlier_families(session.families, inputs, weights)]


def _outlier_cells(found: Outliers | None) -> tuple[float | None, ...]:
    if found is None:
        return (None, None, None, None)
    return found.kurtosis, found.max_abs, found.max_over_percentile, 100 * found.share_outside


def _outlier_families(
    families: LayerFamilies, inputs: dict[str, Outliers | None], weights: dict[str, Outliers]
) -> Table:
    members: dict[str, list[str]] = {}
    for name in weights:
        members.setdefault(families.family_of(name), []).append(name)
    rows: list[tuple[object, ...]] = []
    for family, names in members.items():
        seen = [found for name in names if (found := inputs[name]) is not None]
        for kind, found in (("inputs", seen), ("weights", [weights[name] for name in names])):
            kurtosis = [one.kurtosis for one in found if one.kurtosis is not None]
            tails = [one.max_over_percentile for one in found if one.max_over_percentile is not None]
            count = sum(one.count for one in found)
            outside = 100 * sum(one.share_outside * one.count for one in found) / count if count else None
            rows.append((family, kind, len(found), *_middle_and_top(kurtosis), *_middle_and_top(tails), outside))
    columns = (
        "family", "of", "layers", "median kurtosis", "largest kurtosis", "median max / p99.9", "largest max / p99.9",
        "outside 3 sigma, %",
    )  # fmt: skip
    return Table("Outliers by family", columns, tuple(rows))


def _middle_and_top(values: list[float]) -> tuple[float | None, float | None]:
    return (median(values), max(values)) if values else (None, None)


def _sensitivity(session: Session[Any], recipe: Recipe, progress: Progress) -> list[Table]:
    student = _student(session, recipe, progress, AnalysisKind.SENSITIVITY)
    num_layers = len(describe(student, session.families).quantized)
    found = layer_sensitivity(
        student,
        lambda: validation_loss(session.task, session.teacher, student, recipe.train),
        on_layer=lambda done: progress.count("layers", done, num_layers),
    )
    return _sensitivity_tables(recipe, found, session.families)


def _sensitivity_tables(recipe: Recipe, found: Sensitivity, families: LayerFamilies) -> list[Table]:
    rows = tuple(
        (
            layer.name,
            families.family_of(layer.name),
            layer.place,
            layer.alone,
            layer.without,
            found.rise_alone(layer),
            found.fall_without(layer),
            layer.weight_sqnr_db,
            layer.output_sqnr_db,
        )
        for layer in found.ranked
    )
    columns = (
        "layer", "family", "place", "loss, only this layer", "loss, all but this layer", "rise alone", "fall without",
        "weight SQNR, dB", "output SQNR, dB",
    )  # fmt: skip
    losses = f"With all layers quantized it is {format_value(found.full_loss)}."
    notes = (
        f"{_LOSS_NOTE.format(float_loss=format_value(found.float_loss))} {losses}",
        "Rise alone: loss with only this layer quantized, less the loss with nothing quantized. Fall without: loss with all "
        "layers quantized, less the loss with all but this one. Output SQNR: of this layer's own error, on the inputs that it "
        "has in the model in floating point. Place: in model order.",
    )
    sums = found.sums(families.family_of)
    total = found.full_loss - found.float_loss
    whole = sum(one.rise_alone for one in sums.values())
    family_rows = [(family, one.num_layers, one.rise_alone, one.fall_without) for family, one in sums.items()]
    family_rows.append(("all", len(found.layers), whole, sum(one.fall_without for one in sums.values())))
    note = (
        f"Quantizing all layers raises the loss by {format_value(total)}; the rises of single layers sum to "
        f"{format_value(whole)}. Where the two differ, the errors of layers do not add up."
    )
    return [
        Table(f"Sensitivity of the layers of {recipe.name}", columns, rows, notes),
        Table(
            "Sums by family",
            ("family", "layers", "sum of rises alone", "sum of falls without"),
            tuple(family_rows),
            (note,),
        ),
    ]
