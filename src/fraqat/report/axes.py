"""What the plots of a report share: sizes, marks, axes, ticks and the bit widths above a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from fraqat.report.data import StageSpan
from fraqat.report.series import spread_labels, thin_to_room
from fraqat.report.svg import GRID, INK, MUTED

MARKERS = ("o", "s", "D", "^", "v", "P")
"""Matplotlib markers by index of curve or family: told apart without colour."""

CHARACTER_PX = 7.7  # a digit of DejaVu Sans at 12 px
_LABEL_GAP_PX = 7
_MIN_LEADER_PX = 2  # a label moved further than this is tied to its stage by a line


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


def new_axes(figure: Figure, size: PlotSize) -> Axes:
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


def set_log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic vertical axis over the positive values [low, high] with room at both ends and round numbers."""
    low, high = padded_log_range(low, high)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def set_step_axis(axes: Axes, end: int, size: PlotSize) -> None:
    """A horizontal axis of the optimizer steps 0 to `end`."""
    axes.set_xlim(-0.008 * end, 1.012 * end)
    axes.xaxis.set_major_locator(MaxNLocator(int(size.axes_width // 70), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: step_text(value, end)))
    axes.set_xlabel("optimizer step", color=MUTED, labelpad=7)


def with_room(size: PlotSize, tick_texts: Sequence[str], *, has_stages: bool = False) -> PlotSize:
    """The size with a left margin for the numbers beside the axis, and a top margin for the bits of stages."""
    left = 14 + CHARACTER_PX * max((len(text) for text in tick_texts), default=0)
    return replace(size, top=44 if has_stages else size.top, left=max(left, 40))


def log_tick_texts(low: float, high: float) -> list[str]:
    """The numbers beside the axis of `set_log_axis`."""
    return [tick_text(tick) for tick in log_ticks(*padded_log_range(low, high))]


def draw_stages(axes: Axes, stages: Sequence[StageSpan], size: PlotSize) -> None:
    """Vertical lines at the stages' first steps, and their bits above, moved apart where stages are narrow."""
    if not stages:
        return
    for stage in stages:
        axes.axvline(stage.first_step, color=MUTED, lw=0.9, alpha=0.55, zorder=1)
    low, high = axes.get_xlim()
    px_per_step = size.axes_width / (high - low)
    texts = [f"{stage.bits:g}" for stage in stages]
    widths = [len(text) * CHARACTER_PX + _LABEL_GAP_PX for text in texts]
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


def padded_log_range(low: float, high: float) -> tuple[float, float]:
    """Room above and below the data on a log axis; a factor of two on each side of a single value."""
    pad = min(1.0, 0.05 * (math.log10(high) - math.log10(low))) or math.log10(2)
    return low * 10**-pad, high * 10**pad


def log_ticks(low: float, high: float) -> list[float]:
    """About four to eight round numbers between the ends of a log axis: the coarsest set that has four."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def tick_text(value: float) -> str:
    """A number beside an axis."""
    text = f"{value:.6g}"
    mantissa, has_exponent, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if has_exponent else text


def step_text(value: float, end: int) -> str:
    """A step in the unit that suits the whole axis, which ends at `end`."""
    factor, unit = (1_000_000, "M") if end >= 2_000_000 else (1000, "k") if end >= 10_000 else (1, "")
    return f"{value / factor:g}{unit}" if value else "0"
