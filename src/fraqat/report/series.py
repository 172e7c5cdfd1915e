"""Numbers on their way into a plot: what can be drawn, a smoothed line, fewer points, labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

MAX_BINS = 200
MAX_SMOOTH_POINTS = 400
_WINDOW_SHARE = 25  # the smoothing window is this fraction of the run
_MIN_WINDOW = 9


def drawable_points(x: Sequence[float], y: Sequence[float]) -> tuple[Values, Values]:
    """The points that a logarithmic axis can show.

    Args:
        x: Positions.
        y: Values, one per position.

    Returns:
        x and y without the points whose y is not finite or not positive, as arrays of the same length.
    """
    x_array, y_array = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    is_drawable = np.isfinite(y_array) & (y_array > 0)
    return x_array[is_drawable], y_array[is_drawable]


def thin_to_extremes(x: Values, y: Values, max_bins: int = MAX_BINS) -> tuple[Values, Values]:
    """Keeps the first, the lowest and the highest point of each of `max_bins` equal bins.

    The first points are a fair sample; with the other two no outlier vanishes.

    Returns:
        x and y of at most `3 * max_bins` points in their order; all points when there are no more than that.
    """
    if len(x) <= 3 * max_bins:
        return x, y
    edges = np.linspace(0, len(x), max_bins + 1).astype(int)
    kept: set[int] = set()
    for first, last in pairwise(edges.tolist()):
        kept |= {first, first + int(np.argmin(y[first:last])), first + int(np.argmax(y[first:last]))}
    index = np.array(sorted(kept))
    return x[index], y[index]


def smooth_log(x: Values, y: Values, boundaries: Sequence[float] = ()) -> tuple[Values, Values]:
    """Smooths a positive curve by a straight line through log y around each point, with tricube weights (LOWESS, degree 1).

    The window is one twenty-fifth of the points, at least 9, and ends at boundaries, so a jump there stays a jump. A line
    rather than a mean keeps the slope at both sides of a boundary. Long curves are smoothed at `MAX_SMOOTH_POINTS` places and
    at both sides of every boundary.

    Args:
        x: Ascending positions.
        y: Positive values.
        boundaries: Positions at which a new part starts; the point there belongs to the new part.

    Returns:
        x and the smoothed y there.
    """
    n = len(x)
    if n == 0:
        return x, y
    half = max(_MIN_WINDOW, n // _WINDOW_SHARE) // 2
    starts = np.unique(np.concatenate([[0], np.searchsorted(x, np.asarray(boundaries, dtype=np.float64))]))
    starts = starts[starts < n].astype(int)
    places = np.linspace(0, n - 1, min(n, MAX_SMOOTH_POINTS)).round().astype(int)
    places = np.unique(np.concatenate([places, starts, starts[1:] - 1, [n - 1]]))
    part = np.searchsorted(starts, places, side="right") - 1
    ends = np.append(starts[1:], n)
    log_y = np.log(y)
    fitted = [
        _local_line(x, log_y, place, max(place - half, starts[p]), min(place + half + 1, ends[p]))
        for place, p in zip(places, part, strict=True)
    ]
    return x[places], np.exp(np.array(fitted))


def _local_line(x: Values, y: Values, place: int, low: int, high: int) -> float:
    """Value at x[place] of the weighted least-squares line through the points [low, high)."""
    offset, values = x[low:high] - x[place], y[low:high]
    reach = 1.0001 * float(np.abs(offset).max()) or 1.0
    weight = (1 - (np.abs(offset) / reach) ** 3) ** 3
    weight /= weight.sum()
    mean_x, mean_y = float(weight @ offset), float(weight @ values)
    spread = float(weight @ (offset - mean_x) ** 2)
    slope = float(weight @ ((offset - mean_x) * (values - mean_y))) / spread if spread > 0 else 0.0
    return mean_y - slope * mean_x


def thin_evenly(num_items: int, max_items: int) -> list[int]:
    """Indices of at most `max_items` of `num_items` items at equal distances, the last always among them."""
    stride = max(1, math.ceil(num_items / max_items))
    return list(range((num_items - 1) % stride, num_items, stride))


def thin_to_room(widths: Sequence[float], room: float) -> list[int]:
    """Indices of as many labels, at equal distances and with the last, as fit beside each other into `room`."""
    counts = range(len(widths), 0, -1)
    choices = [thin_evenly(len(widths), count) for count in counts]
    return next((kept for kept in choices if sum(widths[i] for i in kept) <= room), choices[-1] if choices else [])


def spread_labels(centers: Sequence[float], widths: Sequence[float], low: float, high: float) -> list[float]:
    """Moves labels on a line as little as needed (least squares) until none overlaps another.

    Minimum distances turn the problem into an isotonic regression, which pooling adjacent violators solves.

    Args:
        centers: Where each label would be, ascending.
        widths: Room that each label takes, in the same unit; their sum must fit between `low` and `high`.
        low: Left end of the line.
        high: Right end of the line.

    Returns:
        The centre of each label.
    """
    gaps = [(left + right) / 2 for left, right in pairwise(widths)]
    offsets = [sum(gaps[:index]) for index in range(len(centers))]
    pools: list[tuple[float, int]] = []  # mean, number of labels
    for center, offset in zip(centers, offsets, strict=True):
        mean, count = center - offset, 1
        while pools and pools[-1][0] > mean:
            other_mean, other_count = pools.pop()
            mean = (mean * count + other_mean * other_count) / (count + other_count)
            count += other_count
        pools.append((mean, count))
    if not pools:
        return []
    lowest, highest = low + widths[0] / 2, high - widths[-1] / 2 - offsets[-1]
    flat = [min(max(mean, lowest), highest) for mean, count in pools for _ in range(count)]
    return [position + offset for position, offset in zip(flat, offsets, strict=True)]
