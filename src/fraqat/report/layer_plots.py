"""Values of all layers in model order, as inline SVG: two marks a layer, coloured by family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fraqat.report.axes import (
    CHARACTER_PX,
    MARKERS,
    WIDE,
    PlotSize,
    log_tick_texts,
    new_axes,
    set_log_axis,
    with_room,
)
from fraqat.report.layer_points import Block, LayerMark, LayerPoint, blocks_of, families_of
from fraqat.report.svg import BAND, MUTED, SURFACE, new_figure, series_color, to_inline_svg

_MANY_LAYERS = 150


@dataclass(frozen=True)
class LayerScale:
    """What the two marks of a layer are.

    Args:
        label: What the drawing shows, for people who do not see it.
        open_name: What open marks are, in tooltips: `weight SQNR`.
        filled_name: What filled marks are.
        unit: After a value in tooltips, with the space before it.
        is_log: Logarithmic axis; values that are not positive are left out.
        line: A value that a horizontal line marks, as that of the whole model.
    """

    label: str
    open_name: str
    filled_name: str
    unit: str = ""
    is_log: bool = False
    line: float | None = None

    def is_drawable(self, value: float | None) -> bool:
        """Whether the axis can show a value."""
        return value is not None and math.isfinite(value) and (value > 0 or not self.is_log)


SQNR = LayerScale("Signal to quantization noise of each layer, in dB", "weight SQNR", "output SQNR", " dB")


def sqnr_svg(points: Sequence[LayerPoint], size: PlotSize = WIDE, prefix: str = "sqnr") -> Markup:
    """Draws the SQNR of weights (open marks) and outputs (filled marks) of all layers in model order, coloured by family.

    Args:
        points: Layers with at least one finite value, in model order.
        size: Size and margins.
        prefix: Start of the ids inside the drawing, unique in a page.

    Returns:
        An `<svg>` element; empty without points.
    """
    marks = [LayerMark(p.position, p.name, p.family, p.weight_db, p.output_db) for p in points]
    return layer_svg(marks, SQNR, size, prefix)


def layer_svg(marks: Sequence[LayerMark], scale: LayerScale, size: PlotSize = WIDE, prefix: str = "layers") -> Markup:
    """Draws up to two values of every layer in model order, coloured by family.

    Args:
        marks: Layers in model order.
        scale: What the values are.
        size: Size and margins; the left margin grows for the numbers of a logarithmic axis.
        prefix: Start of the ids inside the drawing, unique in a page.

    Returns:
        An `<svg>` element; empty where no value can be drawn.
    """
    found = drawable_marks(marks, scale)
    if not found:
        return Markup()
    values = [v for m in found for v in (m.open_value, m.filled_value) if v is not None and scale.is_drawable(v)]
    values += [scale.line] if scale.line is not None and scale.is_drawable(scale.line) else []
    first, last = found[0].position, found[-1].position
    size = with_room(size, log_tick_texts(min(values), max(values))) if scale.is_log else size
    mark_px = min(size.mark - 1, max(3.0, 0.6 * size.axes_width / (last - first + 1)))
    with new_figure(size.width, size.height) as figure:
        axes = new_axes(figure, size)
        _set_value_axis(axes, values, scale)
        axes.set_xlim(first - 0.9, last + 0.9)
        _draw_blocks(axes, blocks_of(found), size)
        if scale.line is not None and scale.is_drawable(scale.line):
            axes.axhline(scale.line, color=MUTED, lw=1.2, dashes=(5, 4), zorder=1.5)
        _draw_stems(axes, found, scale)
        titles: dict[str, list[str]] = {}
        for index, family in enumerate(families_of(found)):
            members = [mark for mark in found if mark.family == family]
            titles |= _draw_family(axes, members, index, mark_px, scale)
        return to_inline_svg(figure, prefix=prefix, label=scale.label, titles=titles)


def drawable_marks(marks: Sequence[LayerMark], scale: LayerScale) -> list[LayerMark]:
    """The layers with a value that the axis can show."""
    return [mark for mark in marks if any(scale.is_drawable(v) for v in (mark.open_value, mark.filled_value))]


def _set_value_axis(axes: Axes, values: Sequence[float], scale: LayerScale) -> None:
    if scale.is_log:
        set_log_axis(axes, min(values), max(values))
        return
    pad = 0.06 * (max(values) - min(values)) or 1.0
    axes.set_ylim(min(values) - pad, max(values) + pad)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _draw_blocks(axes: Axes, blocks: Sequence[Block], size: PlotSize) -> None:
    """A band behind every second block, and the numbers of as many blocks as there is room for."""
    for block in blocks[::2]:
        axes.axvspan(block.first - 0.5, block.last + 0.5, color=BAND, lw=0, zorder=0)
    low, high = axes.get_xlim()
    px_per_layer = size.axes_width / (high - low)
    ticks: list[tuple[float, str]] = []
    free_from = -math.inf
    for block in blocks:
        center, half_px = (block.first + block.last) / 2, len(block.number) * CHARACTER_PX / 2 + 3
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


def _draw_stems(axes: Axes, marks: Sequence[LayerMark], scale: LayerScale) -> None:
    """A thin line between the two marks of each layer that has both."""
    pairs = [m for m in marks if scale.is_drawable(m.open_value) and scale.is_drawable(m.filled_value)]
    if pairs:
        alpha = 0.55 if len(marks) < _MANY_LAYERS else 0.3
        ends = [m.open_value for m in pairs], [m.filled_value for m in pairs]
        axes.vlines([m.position for m in pairs], *ends, color=MUTED, lw=0.9, alpha=alpha, zorder=2)  # pyright: ignore[reportArgumentType]


def _draw_family(
    axes: Axes, members: Sequence[LayerMark], index: int, mark_px: float, scale: LayerScale
) -> dict[str, list[str]]:
    """Marks of one family. Returns the tooltips: gid -> one text per mark."""
    color, marker = series_color(index), MARKERS[index % len(MARKERS)]
    titles: dict[str, list[str]] = {}
    for kind, name in (("open", scale.open_name), ("filled", scale.filled_name)):
        values = [(mark, mark.open_value if kind == "open" else mark.filled_value) for mark in members]
        shown = [(mark, value) for mark, value in values if value is not None and scale.is_drawable(value)]
        if not shown:
            continue
        gid = f"{kind}-{index}"
        titles[gid] = [f"{mark.name}\n{name} {_value_text(value, scale)}" for mark, value in shown]
        x, y = [mark.position for mark, _ in shown], [value for _, value in shown]
        fill = SURFACE if kind == "open" else color
        area, zorder = mark_px**2 * (0.85 if kind == "open" else 1.2), 3 if kind == "open" else 4
        axes.scatter(x, y, s=area, marker=marker, c=fill, edgecolors=color, linewidths=1.4, zorder=zorder, gid=gid)
    return titles


def _value_text(value: float, scale: LayerScale) -> str:
    return f"{value:.4g}" if scale.is_log else f"{value:.2f}{scale.unit}"
