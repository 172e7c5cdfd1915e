"""One self-contained HTML page from `ReportData`: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from fraqat.report.data import LossCurve, ReportData
from fraqat.report.layer_points import LayerPoint, families_of, layer_points, lowest_points
from fraqat.report.plots import MARKERS, NARROW, WIDE, loss_svg, sqnr_svg
from fraqat.report.sample_views import samples_view
from fraqat.report.series import MAX_BINS, drawable_points
from fraqat.report.svg import series_variable
from fraqat.table import Table, format_value

MAX_OPEN_LAYERS = 40
"""From this many rows on, the layers table is folded."""

_MAX_DECIMALS = 4
_PLACEHOLDERS = ("", "-", "–", "n/a")


def render_report(data: ReportData) -> str:
    """Renders the page.

    Every text is escaped, and the page forbids itself scripts and loads of any kind. Images and sounds are embedded as they
    are, so the page is a third larger than their files together.

    Args:
        data: What to show.

    Returns:
        HTML text; equal for equal data and versions of matplotlib.
    """
    return _template().render(
        title=data.title,
        summary=data.summary,
        quality=_table_view(data.quality, "Quality", main_label=data.curves[0].label if data.curves else None),
        samples=samples_view(data.samples) if data.samples else None,
        training=_training_view(data.curves),
        layers=_layers_view(data.layers),
        sizes=_table_view(data.sizes, "Size"),
        settings=data.settings,
        versions=_table_view(data.versions, "Versions"),
    )


@cache
def _template() -> Template:
    loader = PackageLoader("fraqat.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def _table_view(table: Table, heading: str, main_label: str | None = None) -> dict[str, Any]:
    """A table as the template needs it. The title is left out where it only repeats the section's heading."""
    values = [tuple(row) for row in table.rows]
    columns = list(zip(*values, strict=True)) if values else [()] * len(table.columns)
    is_number = [_is_number_column(column) for column in columns]
    cells = list(zip(*map(_column_texts, columns), strict=True))
    return {
        "label": table.title or heading,
        "title": "" if table.title.strip().casefold() == heading.casefold() else table.title,
        "columns": list(zip(table.columns, is_number, strict=True)),
        "rows": [
            {
                "cells": list(zip(texts, is_number, strict=True)),
                "is_main": main_label is not None and texts[0] == main_label,
            }
            for texts in cells
        ],
        "notes": table.notes,
    }


def _is_number_column(values: Sequence[Any]) -> bool:
    """Whether a column holds numbers and, besides them, only gaps."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    num_gaps = sum(value is None or value in _PLACEHOLDERS for value in values)
    return bool(numbers) and len(numbers) + num_gaps == len(values)


def _column_texts(values: Sequence[Any]) -> list[str]:
    """A column as people read it. Floats get the same number of decimals, as many as any of them needs for four digits."""
    texts = [format_value(value) for value in values]
    is_float = [isinstance(value, float) and math.isfinite(value) for value in values]
    decimals = [
        len(text.partition(".")[2]) for text, is_one in zip(texts, is_float, strict=True) if is_one and "e" not in text
    ]
    if len(decimals) < sum(is_float) or max(decimals, default=0) > _MAX_DECIMALS:
        return texts  # too wide a range for one number of decimals
    places = max(decimals, default=0)
    aligned = zip(values, texts, is_float, strict=True)
    return [f"{value:.{places}f}" if is_one else text for value, text, is_one in aligned]


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
        "legend": [_key_view(index, curve.label, _last_held_out(curve)) for index, curve in enumerate(curves)],
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


def _key_view(index: int, label: str, detail: str = "") -> dict[str, str]:
    marker = MARKERS[index % len(MARKERS)]
    return {"color": series_variable(index), "path": _KEY_PATHS[marker], "label": label, "detail": detail}


def _layers_view(layers: Table) -> dict[str, Any]:
    points = layer_points(layers)
    num_rows = len(layers.rows)
    view = {
        "table": _table_view(layers, "Layers"),
        "num_rows": num_rows,
        "is_open": num_rows < MAX_OPEN_LAYERS,
        "plot": None,
    }
    if points:
        view["plot"] = {
            "wide": sqnr_svg(points, WIDE, "sqnr-wide"),
            "narrow": sqnr_svg(points, NARROW, "sqnr-narrow"),
            "legend": [_key_view(index, family) for index, family in enumerate(families_of(points))],
            "num_without": num_rows - len(points),
            "lowest": [{"name": point.name, "db": f"{point.rank_db:.1f}"} for point in lowest_points(points)],
            "lowest_kind": "output" if any(point.output_db is not None for point in points) else "weight",
            "has_both": all(any(value is not None for value in column) for column in _columns(points)),
        }
    return view


def _columns(points: Sequence[LayerPoint]) -> tuple[list[float | None], list[float | None]]:
    return [point.weight_db for point in points], [point.output_db for point in points]


_KEY_PATHS = {
    "o": "M9 3.5a3.5 3.5 0 1 0 .01 0z",
    "s": "M5.7 3.7h6.6v6.6h-6.6z",
    "D": "M9 2.5l4.5 4.5-4.5 4.5-4.5-4.5z",
    "^": "M9 3l4.2 7.4h-8.4z",
    "v": "M9 11l4.2-7.4h-8.4z",
    "P": "M7.5 2.7h3v2.8h2.8v3h-2.8v2.8h-3v-2.8h-2.8v-3h2.8z",
}
"""The plots' markers as paths in a box of 18 x 14."""
