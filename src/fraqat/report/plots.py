"""The loss of training runs over their steps, as inline SVG.

Each plot of a report is drawn for a wide and for a narrow screen instead of being scaled, so that its text keeps its size.
Names given by users never pass through matplotlib: they appear in the page's legends and as tooltips.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from fraqat.report.axes import (
    MARKERS,
    NARROW,
    WIDE,
    PlotSize,
    draw_stages,
    log_tick_texts,
    new_axes,
    set_log_axis,
    set_step_axis,
    with_room,
)
from fraqat.report.data import LossCurve
from fraqat.report.layer_plots import sqnr_svg
from fraqat.report.series import drawable_points, smooth_log, thin_evenly, thin_to_extremes
from fraqat.report.svg import SURFACE, new_figure, series_color, to_inline_svg

__all__ = ["MARKERS", "NARROW", "WIDE", "PlotSize", "loss_svg", "sqnr_svg"]

_VALIDATION_PX = 14  # held-out marks are at least this far apart


def loss_svg(curves: Sequence[LossCurve], size: PlotSize = WIDE, prefix: str = "loss") -> Markup:
    """Draws training and held-out losses over the optimizer steps, with a logarithmic loss axis.

    Faint dots are the losses of single steps (of long runs a sample with the extremes), the line is a smooth fit to them, and
    ringed marks are held-out losses. Vertical lines are the stages of the first curve, with their bits above.

    Args:
        curves: The main method first.
        size: Size and margins; the top margin grows for the bits, the left one for the numbers.
        prefix: Start of the ids inside the drawing, unique in a page.

    Returns:
        An `<svg>` element; empty when no curve has a finite positive value.
    """
    drawn = np.concatenate([np.empty(0), *(_drawable_losses(curve) for curve in curves)])
    if not len(drawn):
        return Markup()
    low, high = float(drawn.min()), float(drawn.max())
    stages = curves[0].stages
    size = with_room(size, log_tick_texts(low, high), has_stages=bool(stages))
    with new_figure(size.width, size.height) as figure:
        axes = new_axes(figure, size)
        set_log_axis(axes, low, high)
        set_step_axis(axes, _last_step(curves), size)
        draw_stages(axes, stages, size)
        for index in reversed(range(len(curves))):
            _draw_curve(axes, curves[index], index, size)
        names = ", ".join(curve.label for curve in curves)
        return to_inline_svg(figure, prefix=prefix, label=f"Distillation loss over optimizer steps: {names}")


def _drawable_losses(curve: LossCurve) -> np.ndarray:
    _, training = drawable_points(curve.steps, curve.losses)
    _, held_out = drawable_points(*_columns(curve.validation))
    return np.concatenate([training, held_out])


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [loss for _, loss in pairs]


def _last_step(curves: Sequence[LossCurve]) -> int:
    steps = [step for curve in curves for step in (*curve.steps, *_columns(curve.validation)[0])]
    return max(1, *steps, *(stage.end_step for stage in curves[0].stages))


def _draw_curve(axes: Axes, curve: LossCurve, index: int, size: PlotSize) -> None:
    """Dots, smoothed line and held-out losses of one curve; the first curve is drawn last, above the others."""
    color, marker = series_color(index), MARKERS[index % len(MARKERS)]
    layer = 3.0 if index else 4.0
    steps, losses = drawable_points(curve.steps, curve.losses)
    dots = np.repeat(np.column_stack(thin_to_extremes(steps, losses)), 2, axis=0)
    if len(dots):
        path = Path(dots, [Path.MOVETO, Path.LINETO] * (len(dots) // 2))  # lines of no length with round ends: dots
        axes.add_patch(PathPatch(path, fc="none", ec=color, lw=3, capstyle="round", alpha=0.36, zorder=layer))
    smooth = smooth_log(steps, losses, [stage.first_step for stage in curve.stages])
    axes.plot(*smooth, color=color, lw=2, zorder=layer + 0.1)
    steps, losses = drawable_points(*_columns(curve.validation))
    kept = thin_evenly(len(steps), int(size.axes_width // _VALIDATION_PX))
    mark_px = size.mark * (0.85 if marker == "D" else 1)
    marks = Line2D(steps[kept], losses[kept], color=color, linestyle="none", zorder=layer + 0.2)
    marks.set(marker=marker, markersize=mark_px, markeredgecolor=SURFACE, markeredgewidth=1.6)
    axes.add_line(marks)
