"""Analyses as a page shows them: which columns of which table are drawn, and what the drawing means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from fraqat.errors import config_error
from fraqat.report.axes import NARROW, WIDE, PlotSize
from fraqat.report.curve_plots import bit_width_svg
from fraqat.report.data import Analysis, AnalysisKind, NamedCurve
from fraqat.report.layer_plots import LayerScale, drawable_marks, layer_svg
from fraqat.report.layer_points import LayerMark, families_of, layer_marks
from fraqat.report.views import key_view, table_view
from fraqat.table import Table

HEADINGS: dict[AnalysisKind, str] = {
    "bits": "Loss over the width of the weights, without training",
    "outliers": "Outliers of inputs and weights",
    "sensitivity": "Sensitivity of the layers",
    "layer-widths": "Layers at several widths",
}
LOSS_PREFIX = "loss, "
"""Columns of the `bits` table that are drawn start with it; what follows is the curve's name."""

KURTOSIS = ("weight kurtosis", "input kurtosis")
TAIL = ("weight max / p99.9", "input max / p99.9")
LOSSES = ("loss, all but this layer", "loss, only this layer")
PLACE = "place"
RISE_PREFIX = "rise at "
"""Columns of the `layer-widths` table that hold rises start with it; what follows is the width."""

_KURTOSIS = LayerScale("Kurtosis of weights and inputs of each layer", *KURTOSIS, is_log=True, line=3.0)
_TAIL = LayerScale("Largest value over the 99.9th percentile of each layer", *TAIL, is_log=True)
_MARKS_NOTE = "Filled: inputs. Open: weights. Layers in model order."

Draw = Callable[[PlotSize, str], Markup]


def analysis_view(analysis: Analysis) -> dict[str, Any]:
    """Heading, plots and tables of an analysis, for the template.

    Raises:
        ConfigError: The main table is missing or lacks a column that is drawn.
    """
    found = analysis.tables[0].columns if analysis.tables else ()
    if missing := [name for name in _DRAWN[analysis.kind] if name not in found]:
        raise config_error(
            f"columns of analysis {analysis.kind}", list(found), allowed=f"a table with {missing}", fix="analyze again"
        )
    return {
        "heading": HEADINGS[analysis.kind],
        "plots": _PLOTS[analysis.kind](analysis.tables),
        "tables": [table_view(table, table.title) for table in analysis.tables],
    }


def analysis_drawings(analysis: Analysis) -> tuple[Markup, ...]:
    """The wide drawings of an analysis, for files of their own."""
    return tuple(plot["wide"] for plot in analysis_view(analysis)["plots"])


def bit_width_curves(table: Table) -> tuple[NamedCurve, ...]:
    """The curves of a `bits` table: one for every column whose name starts with `LOSS_PREFIX`, ascending in bits.

    Raises:
        ValueError: There is no column `bits`.
    """
    bits = table.columns.index("bits")
    rows = sorted(table.rows, key=lambda row: row[bits])
    return tuple(
        NamedCurve(name.removeprefix(LOSS_PREFIX), tuple((row[bits], row[i]) for row in rows if row[i] is not None))
        for i, name in enumerate(table.columns)
        if name.startswith(LOSS_PREFIX)
    )


def _bits_plots(tables: Sequence[Table]) -> list[dict[str, Any]]:
    curves = bit_width_curves(tables[0])
    legend = [key_view(index, curve.label) for index, curve in enumerate(curves)]
    return _plots(
        "bits",
        "Held-out distillation loss, on a logarithmic axis.",
        "Every weight that training would quantize, at this width; nothing is trained.",
        legend,
        lambda size, prefix: bit_width_svg(curves, size, prefix),
        has_line=True,
    )


def _outlier_plots(tables: Sequence[Table]) -> list[dict[str, Any]]:
    kurtosis, tail = (layer_marks(tables[0], *columns) for columns in (KURTOSIS, TAIL))
    return [
        *_plots(
            "kurtosis",
            "Kurtosis, on a logarithmic axis; the dashed line is that of a normal distribution, 3.",
            _MARKS_NOTE,
            _families_legend(kurtosis, _KURTOSIS),
            lambda size, prefix: layer_svg(kurtosis, _KURTOSIS, size, prefix),
        ),
        *_plots(
            "tail",
            "Largest magnitude over the 99.9th percentile of magnitudes, on a logarithmic axis.",
            _MARKS_NOTE,
            _families_legend(tail, _TAIL),
            lambda size, prefix: layer_svg(tail, _TAIL, size, prefix),
        ),
    ]


def _sensitivity_plots(tables: Sequence[Table]) -> list[dict[str, Any]]:
    marks = layer_marks(tables[0], *LOSSES, place_column=PLACE)
    scale = LayerScale("Held-out loss with one layer quantized, and with all but one", *LOSSES, is_log=True)
    return _plots(
        "sensitivity",
        "Held-out distillation loss, on a logarithmic axis.",
        "Filled: only this layer is quantized. Open: all but this layer. Layers in model order.",
        _families_legend(marks, scale),
        lambda size, prefix: layer_svg(marks, scale, size, prefix),
    )


def _layer_width_plots(tables: Sequence[Table]) -> list[dict[str, Any]]:
    widths = [name for name in tables[0].columns if name.startswith(RISE_PREFIX)]
    if len(widths) < 2:
        return []
    narrow, wide = (min(widths, key=_bits_of), max(widths, key=_bits_of))
    marks = layer_marks(tables[0], wide, narrow)
    scale = LayerScale("Rise of the loss with one layer alone at two widths", wide, narrow, is_log=True)
    return _plots(
        "layer-widths",
        "Rise of the distillation loss, on a logarithmic axis.",
        f"Filled: at {_bits_of(narrow):g} bits. Open: at {_bits_of(wide):g}. Layers in model order.",
        _families_legend(marks, scale),
        lambda size, prefix: layer_svg(marks, scale, size, prefix),
    )


def _bits_of(column: str) -> float:
    return float(column.removeprefix(RISE_PREFIX))


def _families_legend(marks: Sequence[LayerMark], scale: LayerScale) -> list[dict[str, str]]:
    """Colours as `layer_svg` gives them."""
    return [key_view(index, family) for index, family in enumerate(families_of(drawable_marks(marks, scale)))]


def _plots(
    prefix: str, caption: str, note: str, legend: list[dict[str, str]], draw: Draw, *, has_line: bool = False
) -> list[dict[str, Any]]:
    """One plot for wide and narrow screens; none where there is nothing to draw."""
    wide = draw(WIDE, f"{prefix}-wide")
    if not wide:
        return []
    narrow = draw(NARROW, f"{prefix}-narrow")
    return [{"caption": caption, "note": note, "legend": legend, "has_line": has_line, "wide": wide, "narrow": narrow}]


_DRAWN: dict[AnalysisKind, tuple[str, ...]] = {
    "bits": ("bits",),
    "outliers": ("layer", "family", *KURTOSIS, *TAIL),
    "sensitivity": ("layer", "family", PLACE, *LOSSES),
    "layer-widths": ("layer", "family"),
}
_PLOTS: dict[AnalysisKind, Callable[[Sequence[Table]], list[dict[str, Any]]]] = {
    "bits": _bits_plots,
    "outliers": _outlier_plots,
    "sensitivity": _sensitivity_plots,
    "layer-widths": _layer_width_plots,
}
