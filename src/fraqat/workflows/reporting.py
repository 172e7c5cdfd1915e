"""`fraqat report`: gathers what a run left and renders the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fraqat.config import ORIGINAL, Recipe
from fraqat.distill import CODES_EVENT, read_log
from fraqat.errors import ConfigError, ModelError, OutputError
from fraqat.files import write_text_atomic
from fraqat.table import Table, format_value
from fraqat.workflows.analyzing import ANALYSIS_FOLDER, read_analyses
from fraqat.workflows.evaluating import quality_table
from fraqat.workflows.inspecting import layers_table
from fraqat.workflows.runs import RunFolder

SAMPLE_KINDS = {".png": "images", ".txt": "texts", ".wav": "sounds"}
_FLIP_LABELS = {"all": "all layers", "-": "other"}
_EVALUATE_AGAIN = "Fix: run `fraqat evaluate RUN --overwrite`."


def report(run: RunFolder, *, out: Path | None = None, overwrite: bool = False) -> Path:
    """Writes the page of an evaluated run.

    Args:
        run: A run with `evaluation.json`.
        out: Where to; None is `report.html` in the run folder.
        overwrite: Replace a page that is there.

    Raises:
        ModelError: The run is not finished or not evaluated, or samples are missing, damaged or of different kinds.
        OutputError: The page exists.
    """
    from fraqat.report import Analysis, ReportData, render_report

    target = out or run.report_path
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already. Fix: pass --overwrite or another --out.")
    recipe, methods = run.recipe(), run.methods()
    if not run.evaluation_path.exists():
        raise ModelError(f"{run.path} is not evaluated yet. Fix: run `fraqat evaluate {run.path}`.")
    evaluation = run.read_json(run.evaluation_path)
    quality = quality_table(evaluation, recipe.name)
    data = ReportData(
        title=f"FraQAT run: {recipe.name}",
        summary=_summary(recipe, evaluation, quality),
        quality=quality,
        samples=_samples(run, evaluation),
        curves=tuple(_curve(label, method) for label, method in reversed(methods.items()) if read_log(method.path)),
        layers=layers_table(run),
        sizes=_sizes(evaluation),
        settings=recipe.to_yaml(),
        versions=_versions(run),
        code_flips=_code_flips(run),
        analyses=tuple(Analysis(kind, tables) for kind, tables in read_analyses(run.path / ANALYSIS_FOLDER)),
    )
    write_text_atomic(target, render_report(data))
    return target


def _summary(recipe: Recipe, evaluation: Mapping[str, Any], quality: Table) -> str:
    """Model, weights, size and training, then the quality of the run's own method with the original's in brackets."""
    own = next((row for row in evaluation["models"] if row["model"] == recipe.label), None)
    if own is None:
        raise ModelError(f"evaluation.json has no row of {recipe.label}. {_EVALUATE_AGAIN}")
    facts = [f"{own['num_file_bytes'] / 1e6:.2f} MB", _steps_phrase(own["num_steps"])]
    if own.get("bits_per_weight") is not None:
        facts.insert(0, f"{own['bits_per_weight']:.2f} bits per quantized weight")
    original, student = (_shown_values(quality, label) for label in (ORIGINAL, recipe.label))
    titles = [column["title"] for column in evaluation["columns"]]
    measured = [_phrase(title, student[title], original[title]) for title in titles if student[title] is not None]
    return f"{recipe.model.source} at {own['weights']}: {'; '.join([', '.join(facts), *measured])}."


def _shown_values(quality: Table, label: str) -> dict[str, Any]:
    return dict(zip(quality.columns, next(row for row in quality.rows if row[0] == label), strict=True))


def _steps_phrase(num_steps: int) -> str:
    return {0: "without training", 1: "1 training step"}.get(num_steps, f"{num_steps} training steps")


def _phrase(title: str, value: float, original: float | None) -> str:
    """`digit, %` with its values as `digit 95.3 % (original: 97.5 %)`."""
    name, _, unit = title.rpartition(", ") if ", " in title else (title, "", "")
    shown, reference = (f"{format_value(x)} {unit}".rstrip() for x in (value, original))
    return f"{name} {shown}" if original is None else f"{name} {shown} (original: {reference})"


def _samples(run: RunFolder, evaluation: Mapping[str, Any]) -> Any:
    from fraqat.report import SampleKind, SampleRow, Samples

    prompts = tuple(evaluation["prompts"])
    if not prompts:
        return None
    labels = [row["model"] for row in evaluation["models"]]
    paths = {label: sorted((run.samples_path / label).glob("[0-9]*.*")) for label in labels}
    suffixes = sorted({path.suffix for found in paths.values() for path in found})
    if len(suffixes) != 1 or suffixes[0] not in SAMPLE_KINDS:
        found = f"{' and '.join(suffixes)} files" if suffixes else "no files"
        raise ModelError(
            f"{run.samples_path} holds {found}: allowed is one of {', '.join(SAMPLE_KINDS)}. {_EVALUATE_AGAIN}"
        )
    rows = tuple(SampleRow(label, tuple(path.read_bytes() for path in paths[label])) for label in labels)
    try:
        return Samples(SampleKind(SAMPLE_KINDS[suffixes[0]]), prompts, rows)
    except ConfigError as error:
        what, _, _ = str(error).partition(" Fix: ")
        raise ModelError(f"{run.samples_path} cannot be shown: {what} {_EVALUATE_AGAIN}") from None


def _curve(label: str, run: RunFolder) -> Any:
    from fraqat.report import LossCurve

    events = read_log(run.path)
    steps = [event for event in events if event["event"] == "step"]
    return LossCurve(
        label=label,
        steps=tuple(event["step"] for event in steps),
        losses=tuple(event["loss"] for event in steps),
        validation=tuple((e["step"], e["loss"]) for e in events if e["event"] == "validation"),
        stages=_stages(run),
    )


def _code_flips(run: RunFolder) -> Any:
    """Shares of changed weight codes in %: all layers, then every family, in the order of the log."""
    from fraqat.report import NamedCurve

    events = [event for event in read_log(run.path) if event["event"] == CODES_EVENT]
    labels = list(dict.fromkeys(label for event in events for label in event["shares"]))
    stages = _stages(run)
    return tuple(
        NamedCurve(
            str(_FLIP_LABELS.get(label, label)),
            tuple((event["step"] + 1, 100 * event["shares"][label]) for event in events if label in event["shares"]),
            stages,
        )
        for label in labels
    )


def _stages(run: RunFolder) -> Any:
    from fraqat.report import StageSpan

    found = [event for event in read_log(run.path) if event["event"] == "stage"]
    # A stage that training ended itself is shorter than it was when it began.
    ends = [*(event["step"] for event in found[1:]), found[-1]["step"] + found[-1]["num_steps"]] if found else []
    return tuple(StageSpan(e["bits"], e["step"], end - e["step"]) for e, end in zip(found, ends, strict=True))


def _sizes(evaluation: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            row["model"],
            row["num_file_bytes"],
            row.get("num_quantized_weights"),
            row.get("num_other_bytes"),
            row.get("bits_per_weight"),
        )
        for row in evaluation["models"]
    )
    columns = ("model", "file, bytes", "quantized weights", "other tensors, bytes", "bits per quantized weight")
    note = "Bits per quantized weight count codes, scales, tensor names and the model's description."
    return Table("Files of the quantized model", columns, rows, (note,))


def _versions(run: RunFolder) -> Table:
    values = run.read_json(run.path / "environment.json")
    return Table("Versions", ("part", "version"), tuple(values.items()))
