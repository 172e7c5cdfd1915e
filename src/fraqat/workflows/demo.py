"""`fraqat demo`: the main job on the embedded pipeline, from training to the page."""

from __future__ import annotations

from pathlib import Path

from fraqat.config import load_recipe
from fraqat.table import Table
from fraqat.workflows.evaluating import evaluate, quality_table
from fraqat.workflows.exporting import check_packed, export
from fraqat.workflows.progress import Progress
from fraqat.workflows.reporting import report
from fraqat.workflows.sessions import open_session
from fraqat.workflows.training import train

DEMO_RECIPE = "color-digits"


def demo(out: Path, progress: Progress, settings: tuple[str, ...] = ()) -> tuple[list[Table], Path]:
    """Trains FraQAT and its baselines, evaluates, exports, checks the export, and writes the page; skips what is done.

    Args:
        out: The run folder.
        progress: Told what happens.
        settings: Changes of the recipe, see `load_recipe`.

    Returns:
        The tables (quality, export check) and the page's path.
    """
    recipe = load_recipe(DEMO_RECIPE, settings)
    session = open_session(recipe, progress)
    run = train(recipe, out, progress, with_baselines=True, session=session)
    if not run.evaluation_path.exists():
        evaluate(run, progress, session=session)
    if not run.export_path("packed").exists():
        export(run, "packed", progress, session=session)
    check = check_packed(run, session)
    if not run.report_path.exists():
        report(run)
    return [quality_table(run.read_json(run.evaluation_path), run.recipe().name), check], run.report_path
