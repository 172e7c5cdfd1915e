"""The two plots of a report as inline SVG: loss over training, and SQNR over the layers.

Each is drawn for a wide and for a narrow screen instead of being scaled, so that its text keeps its size. Names given by
users never pass through matplotlib: they appear in the page's legends and as tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from fraqat.report.data import LossCurve, StageSpan
from fraqat.report.layer_points import Block, LayerPoint, blocks_of, families_of
from fraqat.report.series import (
    drawable_points,
    smooth_log,
    spread_labels,
    thin_evenly,
    thin_to_extremes,
    thin_to_room,
)
from fraqat.report.svg import BAND, GRID, INK, MUTED, SURFACE, new_figure, series_color, to_inline_svg

MARKERS = ("o", "s", "D", "^", "v", "P")
"""Matplotlib markers by index of curve or family: told apart without colour."""

_CHARACTER_PX = 7.7  # a digit of DejaVu Sans at 12 px
_LABEL_GAP_PX = 7
_MIN_LEADER_PX = 2  # a label moved further than this is tied to its stage by a line
_MANY_LAYERS = 150
_VALIDATION_PX = 14  # held-out marks are at least this far apart


@dataclass(frozen=True)
class PlotSize:
    """Size of a drawing, of its margins and of its largest marks, in CSS pixels."""

    width: float
    height: float
    top: float = 12
    right: float = 18
    bottom: float = 46
    left: float = 50
    mark: float = 8

    @property
    def axes_width(self) -> float:
        """Width of the area inside the axes."""
        return self.width - self.left - self.right

    @property
    def axes_height(self) -> float:
        """Height of the area inside the axes."""
        return self.height - self.top - self.bottom


WIDE = PlotSize(width=960, height=400)
NARROW = PlotSize(width=370, height=330, mark=6.5)


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
    low, high = _padded_log_range(float(drawn.min()), float(drawn.max()))
    ticks = _log_ticks(low, high)
    stages = curves[0].stages
    left = 14 + _CHARACTER_PX * max(len(_tick_text(tick)) for tick in ticks)
    size = replace(size, top=44 if stages else size.top, left=max(left, 40))
    with new_figure(size.width, size.height) as figure:
        axes = _new_axes(figure, size)
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(FixedLocator([]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick_text(value)))
        end = _last_step(curves)
        axes.set_xlim(-0.008 * end, 1.012 * end)
        axes.xaxis.set_major_locator(MaxNLocator(int(size.axes_width // 70), integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _step_text(value, end)))
        axes.set_xlabel("optimizer step", color=MUTED, labelpad=7)
        _draw_stages(axes, stages, size)
        for index in reversed(range(len(curves))):
            _draw_curve(axes, curves[index], index, size)
        names = ", ".join(curve.label for curve in curves)
        return to_inline_svg(figure, prefix=prefix, label=f"Distillation loss over optimizer steps: {names}")


def sqnr_svg(points: Sequence[LayerPoint], size: PlotSize = WIDE, prefix: str = "sqnr") -> Markup:
    """Draws the SQNR of weights (open marks) and outputs (filled marks) of all layers in model order, coloured by family.

    Args:
        points: Layers with at least one finite value, in model order.
        size: Size and margins.
        prefix: Start of the ids inside the drawing, unique in a page.

    Returns:
        An `<svg>` element; empty without points.
    """
    if not points:
        return Markup()
    values = [value for point in points for value in (point.weight_db, point.output_db) if value is not None]
    first, last = points[0].position, points[-1].position
    mark_px = min(size.mark - 1, max(3.0, 0.6 * size.axes_width / (last - first + 1)))
    with new_figure(size.width, size.height) as figure:
        axes = _new_axes(figure, size)
        pad = 0.06 * (max(values) - min(values)) or 1.0
        axes.set_ylim(min(values) - pad, max(values) + pad)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.set_xlim(first - 0.9, last + 0.9)
        _draw_blocks(axes, blocks_of(tuple(points)), size)
        _draw_stems(axes, points)
        titles: dict[str, list[str]] = {}
        for index, family in enumerate(families_of(tuple(points))):
            members = [point for point in points if point.family == family]
            titles |= _draw_family(axes, members, index, mark_px)
        return to_inline_svg(
            figure, prefix=prefix, label="Signal to quantization noise of each layer, in dB", titles=titles
        )


def _new_axes(figure: Figure, size: PlotSize) -> Axes:
    """Axes with horizontal grid lines and nothing else around them."""
    bounds = (
        size.left / size.width,
        size.bottom / size.height,
        size.axes_width / size.width,
        size.axes_height / size.height,
    )
    axes = figure.add_axes(bounds)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, lw=1)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="x", color=MUTED, labelcolor=MUTED, length=4, width=0.8)
    axes.tick_params(axis="y", labelcolor=MUTED, length=0, pad=8)
    return axes


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


def _draw_stages(axes: Axes, stages: Sequence[StageSpan], size: PlotSize) -> None:
    """Vertical lines at the stages' first steps, and their bits above, moved apart where stages are narrow."""
    if not stages:
        return
    for stage in stages:
        axes.axvline(stage.first_step, color=MUTED, lw=0.9, alpha=0.55, zorder=1)
    low, high = axes.get_xlim()
    px_per_step = size.axes_width / (high - low)
    texts = [f"{stage.bits:g}" for stage in stages]
    widths = [len(text) * _CHARACTER_PX + _LABEL_GAP_PX for text in texts]
    kept = thin_to_room(widths, size.axes_width)
    centers = [(stages[i].first_step + stages[i].num_steps / 2 - low) * px_per_step for i in kept]
    positions = spread_labels(centers, [widths[i] for i in kept], 0, size.axes_width)
    for i, center, position in zip(kept, centers, positions, strict=True):
        if abs(position - center) > _MIN_LEADER_PX:
            x = center / size.axes_width, position / size.axes_width
            y = 1 + 2 / size.axes_height, 1 + 14 / size.axes_height
            axes.add_line(Line2D(x, y, transform=axes.transAxes, color=MUTED, lw=0.9, alpha=0.7, clip_on=False))
        _text_above(axes, position / size.axes_width, texts[i], size, color=INK)
    _text_above(axes, -12 / size.axes_width, "bits", size, color=MUTED, ha="right")


def _text_above(axes: Axes, x: float, text: str, size: PlotSize, *, color: str, ha: str = "center") -> None:
    axes.text(x, 1 + 19 / size.axes_height, text, transform=axes.transAxes, color=color, ha=ha, va="baseline")


def _draw_blocks(axes: Axes, blocks: Sequence[Block], size: PlotSize) -> None:
    """A band behind every second block, and the numbers of as many blocks as there is room for."""
    for block in blocks[::2]:
        axes.axvspan(block.first - 0.5, block.last + 0.5, color=BAND, lw=0, zorder=0)
    low, high = axes.get_xlim()
    px_per_layer = size.axes_width / (high - low)
    ticks: list[tuple[float, str]] = []
    free_from = -math.inf
    for block in blocks:
        center, half_px = (block.first + block.last) / 2, len(block.number) * _CHARACTER_PX / 2 + 3
        if center * px_per_layer - half_px >= free_from:
            ticks.append((center, block.number))
            free_from = center * px_per_layer + half_px
    if ticks:
        axes.set_xticks([center for center, _ in ticks], [number for _, number in ticks])
        axes.set_xlabel("block", color=MUTED, labelpad=7)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("layer", color=MUTED, labelpad=7)
    axes.tick_params(axis="x", length=0, pad=7)


def _draw_stems(axes: Axes, points: Sequence[LayerPoint]) -> None:
    """A thin line between the two marks of each layer that has both."""
    pairs = [(p, p.weight_db, p.output_db) for p in points if p.weight_db is not None and p.output_db is not None]
    positions, ends = [p.position for p, _, _ in pairs], [(first, second) for _, first, second in pairs]
    if ends:
        alpha = 0.55 if len(points) < _MANY_LAYERS else 0.3
        axes.vlines(positions, *zip(*ends, strict=True), color=MUTED, lw=0.9, alpha=alpha, zorder=2)


def _draw_family(axes: Axes, members: Sequence[LayerPoint], index: int, mark_px: float) -> dict[str, list[str]]:
    """Marks of one family. Returns the tooltips: gid -> one text per mark."""
    color, marker = series_color(index), MARKERS[index % len(MARKERS)]
    titles: dict[str, list[str]] = {}
    for kind in ("weight", "output"):
        values = [(p, p.weight_db if kind == "weight" else p.output_db) for p in members]
        shown = [(point, value) for point, value in values if value is not None]
        if not shown:
            continue
        gid = f"{kind}-{index}"
        titles[gid] = [f"{point.name}\n{kind} SQNR {value:.2f} dB" for point, value in shown]
        x, y = [point.position for point, _ in shown], [value for _, value in shown]
        fill = SURFACE if kind == "weight" else color
        area, zorder = mark_px**2 * (0.85 if kind == "weight" else 1.2), 3 if kind == "weight" else 4
        axes.scatter(x, y, s=area, marker=marker, c=fill, edgecolors=color, linewidths=1.4, zorder=zorder, gid=gid)
    return titles


def _padded_log_range(low: float, high: float) -> tuple[float, float]:
    """Room above and below the data on a log axis; a factor of two on each side of a single value."""
    pad = min(1.0, 0.05 * (math.log10(high) - math.log10(low))) or math.log10(2)
    return low * 10**-pad, high * 10**pad


def _log_ticks(low: float, high: float) -> list[float]:
    """About four to eight round numbers between the ends of a log axis: the coarsest set that has four."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def _tick_text(value: float) -> str:
    text = f"{value:.6g}"
    mantissa, has_exponent, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if has_exponent else text


def _step_text(value: float, end: int) -> str:
    """A step in the unit that suits the whole axis, which ends at `end`."""
    factor, unit = (1_000_000, "M") if end >= 2_000_000 else (1000, "k") if end >= 10_000 else (1, "")
    return f"{value / factor:g}{unit}" if value else "0"
