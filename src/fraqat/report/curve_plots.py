"""Curves of several runs or settings, and means with their intervals, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fraqat.report.axes import (
    CHARACTER_PX,
    MARKERS,
    WIDE,
    PlotSize,
    draw_stages,
    log_tick_texts,
    new_axes,
    set_log_axis,
    set_step_axis,
    with_room,
)
from fraqat.report.data import MeanInterval, NamedCurve
from fraqat.report.series import Values, drawable_points, thin_evenly
from fraqat.report.svg import GRID, INK, MUTED, SURFACE, new_figure, series_color, to_inline_svg

_MARK_PX = 14  # marks of one curve are at least this far apart
_RUG_PX = 9  # height of the ticks that mark another curve's stages
_ROW_PX = 52
_NUMBER_PX = 32  # half the width of a number under the end of an axis


def validation_svg(curves: Sequence[NamedCurve], size: PlotSize = WIDE, prefix: str = "validation") -> Markup:
    """Draws held-out losses of several runs over their optimizer steps, on a logarithmic axis (the paper's Fig. 7).

    Vertical lines are the stages of the first curve, with their bits above; short coloured ticks at the bottom are the first
    steps of the other curves' stages.

    Args:
        curves: Finished steps and held-out losses, the main method first.
        size: Size and margins; the top margin grows for the bits, the left one for the numbers.
        prefix: Start of the ids inside the drawing, unique in a page.

    Returns:
        An `<svg>` element; empty when no curve has a finite positive loss.
    """
    losses = np.concatenate([np.empty(0), *(_drawable(curve, is_log=True)[1] for curve in curves)])
    if not len(losses):
        return Markup()
    low, high = float(losses.min()), float(losses.max())
    size = with_room(size, log_tick_texts(low, high), has_stages=bool(curves[0].stages))
    with new_figure(size.width, size.height) as figure:
        axes = new_axes(figure, size)
        set_log_axis(axes, low, high)
        set_step_axis(axes, _last_step(curves), size)
        draw_stages(axes, curves[0].stages, size)
        for index, curve in enumerate(curves):
            _draw_curve(axes, curve, index, size, is_log=True)
            if index:
                _draw_rug(axes, curve, index, size)
        return to_inline_svg(figure, prefix=prefix, label=f"Held-out loss over optimizer steps: {_names(curves)}")


def flip_svg(curves: Sequence[NamedCurve], size: PlotSize = WIDE, prefix: str = "flips") -> Markup:
    """Draws which share of the weight codes changed since the record before, in %, over the optimizer steps.

    Lines are interrupted where the width changes, as codes of two widths are not compared.

    Args:
        curves: Finished steps and shares in %, all layers first; the stages are those of the first curve.
        size: Size and margins.
        prefix: Start of the ids inside the drawing, unique in a page.

    Returns:
        An `<svg>` element; empty when no curve has a point.
    """
    shares = np.concatenate([np.empty(0), *(_drawable(curve, is_log=False)[1] for curve in curves)])
    if not len(shares):
        return Markup()
    size = with_room(size, ["0.05"], has_stages=bool(curves[0].stages))
    with new_figure(size.width, size.height) as figure:
        axes = new_axes(figure, size)
        axes.set_ylim(0, 1.06 * float(shares.max()) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        set_step_axis(axes, _last_step(curves), size)
        draw_stages(axes, curves[0].stages, size)
        for index in reversed(range(len(curves))):
            breaks = [stage.first_step for stage in curves[0].stages[1:]]
            _draw_curve(axes, curves[index], index, size, is_log=False, breaks=breaks)
        return to_inline_svg(
            figure, prefix=prefix, label=f"Changed weight codes over optimizer steps: {_names(curves)}"
        )


def bit_width_svg(curves: Sequence[NamedCurve], size: PlotSize = WIDE, prefix: str = "bits") -> Markup:
    """Draws a loss over the bit width of the weights, wide widths at the left (the paper's Fig. 2).

    Args:
        curves: (bits, loss), ascending in bits.
        size: Size and margins; the left margin grows for the numbers.
        prefix: Start of the ids inside the drawing, unique in a page.

    Returns:
        An `<svg>` element; empty when no curve has a finite positive loss.
    """
    found = [_drawable(curve, is_log=True) for curve in curves]
    losses = np.concatenate([np.empty(0), *(y for _, y in found)])
    if not len(losses):
        return Markup()
    low, high = float(losses.min()), float(losses.max())
    widths = sorted({bits for curve in curves for bits, _ in curve.points}, reverse=True)
    size = with_room(size, log_tick_texts(low, high))
    with new_figure(size.width, size.height) as figure:
        axes = new_axes(figure, size)
        set_log_axis(axes, low, high)
        pad = 0.04 * (widths[0] - widths[-1]) or 0.5
        axes.set_xlim(widths[0] + pad, widths[-1] - pad)  # from wide to narrow, as training goes
        kept = _widths_with_room(widths, size.axes_width / (widths[0] - widths[-1] + 2 * pad))
        axes.set_xticks(kept, [f"{bits:g}" for bits in kept])
        axes.set_xlabel("bits of the weights", color=MUTED, labelpad=7)
        for index in reversed(range(len(curves))):
            _draw_curve(axes, curves[index], index, size, is_log=True)
        return to_inline_svg(
            figure, prefix=prefix, label=f"Held-out loss over the width of the weights: {_names(curves)}"
        )


def interval_svg(
    intervals: Sequence[MeanInterval], size: PlotSize = WIDE, prefix: str = "intervals", quantity: str = "mean"
) -> Markup:
    """Draws one row for each method: its mean as a mark, its interval as a bar, its name above.

    Args:
        intervals: From top to bottom.
        size: Width and margins; the height follows the number of rows, the left margin is small.
        prefix: Start of the ids inside the drawing, unique in a page.
        quantity: What the axis shows, with its unit; from the program, not from users.

    Returns:
        An `<svg>` element; empty without intervals. Names that are wider than the drawing are cut; the whole one is shown when
        the pointer rests on the mark.
    """
    if not intervals:
        return Markup()
    size = replace(size, left=_NUMBER_PX, right=_NUMBER_PX, height=size.top + size.bottom + _ROW_PX * len(intervals))
    low, high = min(i.low for i in intervals), max(i.high for i in intervals)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    names, titles = {}, {}
    with new_figure(size.width, size.height) as figure:
        axes = new_axes(figure, size)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=GRID, lw=1)
        axes.set_yticks([])
        axes.set_xlim(low - pad, high + pad)
        axes.set_ylim(len(intervals), 0)
        axes.xaxis.set_major_locator(MaxNLocator(max(3, int(size.axes_width // 110)), steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.set_xlabel(quantity, color=MUTED, labelpad=7)
        for row, interval in enumerate(intervals):
            _draw_interval(axes, interval, row, size)
            names[f"name-{row}"] = _cut(interval.label, int(size.axes_width // CHARACTER_PX))
            titles[f"interval-{row}"] = [
                f"{interval.label}\n{interval.mean:.5g}, interval {interval.low:.5g} to {interval.high:.5g}"
            ]
        label = "Means and intervals: " + ", ".join(interval.label for interval in intervals)
        return to_inline_svg(figure, prefix=prefix, label=label, titles=titles, names=names)


def _draw_interval(axes: Axes, interval: MeanInterval, row: int, size: PlotSize) -> None:
    color, marker, y = series_color(row), MARKERS[row % len(MARKERS)], row + 0.68
    axes.axhline(y, color=MUTED, lw=0.6, alpha=0.35, zorder=1)
    axes.plot([interval.low, interval.high], [y, y], color=color, lw=3, solid_capstyle="butt", zorder=2)
    ends = Line2D([interval.low, interval.high], [y, y], color=color, linestyle="none", marker="|", zorder=2)
    ends.set(markersize=12, markeredgewidth=2)
    axes.add_line(ends)
    area = (1.15 * size.mark) ** 2
    axes.scatter(
        [interval.mean], [y], s=area, marker=marker, c=color, edgecolors=SURFACE, linewidths=1.6, zorder=3,
        gid=f"interval-{row}",
    )  # fmt: skip
    axes.text(0, row + 0.36, f"name-{row}", transform=axes.get_yaxis_transform(), color=INK, ha="left", va="baseline")


def _draw_curve(
    axes: Axes, curve: NamedCurve, index: int, size: PlotSize, *, is_log: bool, breaks: Sequence[float] = ()
) -> None:
    """A line through all points and marks on as many as there is room for; the line ends at every break."""
    color, marker = series_color(index), MARKERS[index % len(MARKERS)]
    layer = 3.0 if index else 4.0
    x, y = _drawable(curve, is_log=is_log)
    parts = np.searchsorted(np.asarray(breaks, dtype=np.float64), x, side="left")
    for part in np.unique(parts):
        axes.plot(x[parts == part], y[parts == part], color=color, lw=2, zorder=layer)
    kept = thin_evenly(len(x), int(size.axes_width // _MARK_PX)) if len(x) else []
    marks = Line2D(x[kept], y[kept], color=color, linestyle="none", zorder=layer + 0.1)
    mark_px = size.mark * (0.85 if marker == "D" else 1)
    marks.set(marker=marker, markersize=mark_px, markeredgecolor=SURFACE, markeredgewidth=1.6)
    axes.add_line(marks)


def _draw_rug(axes: Axes, curve: NamedCurve, index: int, size: PlotSize) -> None:
    low = (index - 1) * (_RUG_PX + 2) / size.axes_height
    for stage in curve.stages:
        axes.axvline(
            stage.first_step, low, low + _RUG_PX / size.axes_height, color=series_color(index), lw=1.6, zorder=2
        )


def _drawable(curve: NamedCurve, *, is_log: bool) -> tuple[Values, Values]:
    x, y = [place for place, _ in curve.points], [value for _, value in curve.points]
    if is_log:
        return drawable_points(x, y)
    finite = [(place, value) for place, value in curve.points if math.isfinite(value)]
    return np.array([place for place, _ in finite]), np.array([value for _, value in finite])


def _last_step(curves: Sequence[NamedCurve]) -> int:
    steps = [place for curve in curves for place, _ in curve.points]
    ends = [stage.end_step for curve in curves for stage in curve.stages]
    return max(1, *(math.ceil(step) for step in steps), *ends)


def _names(curves: Sequence[NamedCurve]) -> str:
    return ", ".join(curve.label for curve in curves)


def _widths_with_room(widths: Sequence[float], px_per_bit: float) -> list[float]:
    """The widths whose numbers fit beside the one before; whole widths come first."""
    kept: list[float] = []
    for bits in sorted(widths, key=lambda width: (width != round(width), -width)):
        room = CHARACTER_PX * len(f"{bits:g}") / 2 + 4
        if all(abs(bits - other) * px_per_bit >= room + CHARACTER_PX * len(f"{other:g}") / 2 for other in kept):
            kept.append(bits)
    return sorted(kept, reverse=True)


def _cut(label: str, num_characters: int) -> str:
    return label if len(label) <= num_characters else label[: max(1, num_characters - 1)] + "…"
