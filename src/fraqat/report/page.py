"""One self-contained HTML page from `ReportData`: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fraqat.report.analysis_views import analysis_view
from fraqat.report.curve_plots import flip_svg
from fraqat.report.data import Analysis, LossCurve, NamedCurve, ReportData
from fraqat.report.layer_points import LayerPoint, families_of, layer_points, lowest_points
from fraqat.report.plots import NARROW, WIDE, loss_svg, sqnr_svg
from fraqat.report.sample_views import samples_view
from fraqat.report.series import MAX_BINS, drawable_points
from fraqat.report.svg import standalone_svg
from fraqat.report.views import key_view, table_view
from fraqat.table import Table, format_value

MAX_OPEN_LAYERS = 40
"""From this many rows on, the layers table is folded."""


def render_report(data: ReportData) -> str:
    """Renders the page.

    Every text is escaped, and the page forbids itself scripts and loads of any kind. Images and sounds are embedded as they
    are, so the page is a third larger than their files together.

    Args:
        data: What to show.

    Returns:
        HTML text; equal for equal data and versions of matplotlib.
    """
    return (
        page_templates()
        .get_template("page.html.j2")
        .render(
            title=data.title,
            summary=data.summary,
            quality=table_view(data.quality, "Quality", data.curves[0].label if data.curves else None, ", 95 %"),
            samples=samples_view(data.samples) if data.samples else None,
            training=_training_view(data.curves),
            layers=_layers_view(data.layers),
            sizes=table_view(data.sizes, "Size"),
            settings=data.settings,
            versions=table_view(data.versions, "Versions"),
            flips=_flips_view(data.code_flips),
            analyses=[analysis_view(analysis) for analysis in data.analyses],
            max_open_rows=MAX_OPEN_LAYERS,
        )
    )


def render_analysis(title: str, summary: str, analysis: Analysis, settings: str, versions: Table) -> str:
    """Renders one analysis as a page of its own, under the rules of `render_report`.

    Args:
        title: Heading of the page.
        summary: The result in one sentence.
        analysis: Tables, whose known columns are drawn.
        settings: The resolved recipe as YAML text.
        versions: Software and hardware.
    """
    return (
        page_templates()
        .get_template("analysis_page.html.j2")
        .render(
            title=title,
            summary=summary,
            analysis=analysis_view(analysis),
            settings=settings,
            versions=table_view(versions, "Versions"),
            max_open_rows=MAX_OPEN_LAYERS,
        )
    )


def svg_file(drawing: Markup) -> str:
    """A drawing of a page as the text of an SVG file with the page's colours and font, light and dark."""
    css = page_templates().get_template("page.css.j2").render()
    colors = css[: css.index("*, *::before")]
    font = "svg { font: 12px system-ui, sans-serif; background: var(--surface); stroke-linejoin: round; }"
    return standalone_svg(drawing, re.sub(r"\s+", " ", colors).strip() + " " + font)


@cache
def page_templates() -> Environment:
    """The templates of all pages: every text is escaped."""
    loader = PackageLoader("fraqat.report", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _training_view(curves: Sequence[LossCurve]) -> dict[str, Any] | None:
    if not curves:
        return None
    num_losses = sum(len(curve.losses) + len(curve.validation) for curve in curves)
    num_drawable = sum(
        len(drawable_points(range(len(losses)), losses)[0])
        for curve in curves
        for losses in (curve.losses, [loss for _, loss in curve.validation])
    )
    return {
        "wide": loss_svg(curves, WIDE, "loss-wide"),
        "narrow": loss_svg(curves, NARROW, "loss-narrow"),
        "legend": [key_view(index, curve.label, _last_held_out(curve)) for index, curve in enumerate(curves)],
        "has_validation": any(curve.validation for curve in curves),
        "has_stages": bool(curves[0].stages),
        "is_sampled": any(len(curve.losses) > 3 * MAX_BINS for curve in curves),
        "num_dropped": num_losses - num_drawable,
    }


def _last_held_out(curve: LossCurve) -> str:
    if not curve.validation:
        return ""
    step, loss = curve.validation[-1]
    return f"held-out {format_value(float(loss))} after {format_value(step)} steps"


def _flips_view(curves: Sequence[NamedCurve]) -> dict[str, Any] | None:
    drawing = flip_svg(curves, WIDE, "flips-wide")
    if not drawing:
        return None
    last = [curve.points[-1][1] if curve.points else None for curve in curves]
    details = ["" if share is None else f"{format_value(float(share))} % in the last record" for share in last]
    return {
        "wide": drawing,
        "narrow": flip_svg(curves, NARROW, "flips-narrow"),
        "legend": [key_view(index, curve.label, details[index]) for index, curve in enumerate(curves)],
    }


def _layers_view(layers: Table) -> dict[str, Any]:
    points = layer_points(layers)
    num_rows = len(layers.rows)
    view = {
        "table": table_view(layers, "Layers"),
        "num_rows": num_rows,
        "is_open": num_rows < MAX_OPEN_LAYERS,
        "plot": None,
    }
    if points:
        view["plot"] = {
            "wide": sqnr_svg(points, WIDE, "sqnr-wide"),
            "narrow": sqnr_svg(points, NARROW, "sqnr-narrow"),
            "legend": [key_view(index, family) for index, family in enumerate(families_of(points))],
            "num_without": num_rows - len(points),
            "lowest": [{"name": point.name, "db": f"{point.rank_db:.1f}"} for point in lowest_points(points)],
            "lowest_kind": "output" if any(point.output_db is not None for point in points) else "weight",
            "has_both": all(any(value is not None for value in column) for column in _columns(points)),
        }
    return view


def _columns(points: Sequence[LayerPoint]) -> tuple[list[float | None], list[float | None]]:
    return [point.weight_db for point in points], [point.output_db for point in points]
