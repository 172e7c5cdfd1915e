"""`fraqat report`: gathers what a run left and renders the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fraqat.config import Recipe
from fraqat.distill import read_log
from fraqat.errors import OutputError
from fraqat.files import write_text_atomic
from fraqat.table import Table
from fraqat.workflows.evaluating import quality_table
from fraqat.workflows.inspecting import layers_table
from fraqat.workflows.runs import RunFolder


def report(run: RunFolder, *, out: Path | None = None, overwrite: bool = False) -> Path:
    """Writes the page of an evaluated run.

    Args:
        run: A run with `evaluation.json`.
        out: Where to; None is `report.html` in the run folder.
        overwrite: Replace a page that is there.

    Raises:
        ModelError: The run is not finished or not evaluated.
        OutputError: The page exists.
    """
    from fraqat.report import ReportData, render_report

    target = out or run.report_path
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already. Fix: pass --overwrite or another --out.")
    recipe, methods = run.recipe(), run.methods()
    evaluation = run.read_json(run.evaluation_path)
    quality = quality_table(evaluation, recipe.name)
    data = ReportData(
        title=f"FraQAT run: {recipe.name}",
        summary=_summary(recipe, evaluation),
        quality=quality,
        prompts=tuple(evaluation["prompts"]),
        image_rows=_image_rows(run, evaluation),
        curves=tuple(_curve(label, method) for label, method in reversed(methods.items()) if read_log(method.path)),
        layers=layers_table(run),
        sizes=_sizes(evaluation),
        settings=recipe.to_yaml(),
        versions=_versions(run),
    )
    write_text_atomic(target, render_report(data))
    return target


def _summary(recipe: Recipe, evaluation: dict[str, Any]) -> str:
    rows = {row["model"]: row for row in evaluation["models"]}
    own = rows[recipe.label]
    return (
        f"{recipe.model.source} at {own['weights']}: {own['bits_per_weight']:.2f} bits per quantized weight, "
        f"{own['num_file_bytes'] / 1e6:.2f} MB, {own['num_steps']} training steps, "
        f"{100 * own['quality']['all']:.1f} % of {evaluation['num_images']} images show what the prompt says "
        f"(original: {100 * rows['original']['quality']['all']:.1f} %)."
    )


def _image_rows(run: RunFolder, evaluation: dict[str, Any]) -> tuple[Any, ...]:
    from fraqat.report import ImageRow

    labels = [row["model"] for row in evaluation["models"]]
    return tuple(
        ImageRow(label, tuple(p.read_bytes() for p in sorted((run.images_path / label).glob("*.png"))))
        for label in labels
    )


def _curve(label: str, run: RunFolder) -> Any:
    from fraqat.report import LossCurve, StageSpan

    events = read_log(run.path)
    steps = [event for event in events if event["event"] == "step"]
    return LossCurve(
        label=label,
        steps=tuple(event["step"] for event in steps),
        losses=tuple(event["loss"] for event in steps),
        validation=tuple((e["step"], e["loss"]) for e in events if e["event"] == "validation"),
        stages=tuple(StageSpan(e["bits"], e["step"], e["num_steps"]) for e in events if e["event"] == "stage"),
    )


def _sizes(evaluation: dict[str, Any]) -> Table:
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
    return Table("Sizes of the transformer", columns, rows, (note,))


def _versions(run: RunFolder) -> Table:
    values = run.read_json(run.path / "environment.json")
    return Table("Versions", ("part", "version"), tuple(values.items()))
