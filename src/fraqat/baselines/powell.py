"""Powell's method (Powell 1964): a minimum of a function of several variables without its derivatives, on a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

_NUM_DOUBLINGS = 4
_TINY = 1e-300


@dataclass(frozen=True)
class PowellResult:
    """The best point seen, its value, and how many values were computed."""

    point: tuple[float, ...]
    value: float
    num_evaluations: int


def minimize_powell(
    function: Callable[[tuple[float, ...]], float],
    start: Sequence[float],
    start_value: float,
    *,
    first_step: float,
    last_step: float,
    max_evaluations: int,
) -> PowellResult:
    """Minimises along one direction after another; a sweep's whole displacement may replace a direction.

    A line is searched with three values and the vertex of the parabola through them; on a descent the step is doubled first.
    A direction is replaced under Powell's own condition (Numerical Recipes, section 10.7), so that the set stays independent.
    Coupled variables are thus moved together after the first sweep; on a quadratic function of n variables n sweeps suffice.

    Args:
        function: Its values may be infinite or NaN (taken as infinite).
        start: Point, one or more coordinates.
        start_value: The function there, finite.
        first_step: Length of the first step along a coordinate, more than 0.
        last_step: The search ends when no direction improves at this length.
        max_evaluations: Calls of the function, 0 or more; never exceeded.
    """
    search = _Search(function, tuple(start), start_value, max_evaluations)
    with suppress(_BudgetSpentError):
        _sweep_until_done(search, len(start), first_step, last_step)
    return PowellResult(search.point, search.value, search.num_evaluations)


class _BudgetSpentError(Exception):
    pass


class _Search:
    """The best point so far and the count of evaluations."""

    def __init__(
        self,
        function: Callable[[tuple[float, ...]], float],
        point: tuple[float, ...],
        value: float,
        max_evaluations: int,
    ):
        self.function, self.point, self.value, self.max_evaluations = function, point, value, max_evaluations
        self.num_evaluations = 0

    def at(self, point: tuple[float, ...]) -> float:
        """The value at a point, which becomes the best one if it is better."""
        if self.num_evaluations >= self.max_evaluations:
            raise _BudgetSpentError
        self.num_evaluations += 1
        value = self.function(point)
        if math.isnan(value):
            return math.inf
        if value < self.value:
            self.point, self.value = point, value
        return value

    def along(self, direction: tuple[float, ...], step: float) -> float:
        """Searches the line through the best point; returns how far the best point moved, in units of `direction`."""
        origin, base = self.point, self.value

        def value_at(distance: float) -> float:
            return self.at(tuple(x + distance * d for x, d in zip(origin, direction, strict=True)))

        seen = {0.0: base, step: value_at(step)}
        if seen[step] >= base:
            step = -step
            seen[step] = value_at(step)
        for _ in range(_NUM_DOUBLINGS):
            if seen[step] > min(seen.values()) or seen[step] >= base:
                break
            step *= 2
            seen[step] = value_at(step)
        vertex = _vertex(seen)
        if vertex is not None and vertex not in seen:
            seen[vertex] = value_at(vertex)
        return min(seen, key=lambda distance: seen[distance])


def _sweep_until_done(search: _Search, num_variables: int, first_step: float, last_step: float) -> None:
    directions = [tuple(float(i == j) for j in range(num_variables)) for i in range(num_variables)]
    steps = [first_step] * num_variables
    while max(steps) >= last_step:
        begin, begin_value = search.point, search.value
        largest_fall, index = 0.0, 0
        for i, direction in enumerate(directions):
            before = search.value
            moved = search.along(direction, steps[i])
            # An idle direction is asked for less; one that moved is asked for as much as it moved.
            steps[i] = abs(moved) if moved else steps[i] / 2
            if before - search.value > largest_fall:
                largest_fall, index = before - search.value, i
        if search.point == begin:
            continue
        displacement = tuple(x - b for x, b in zip(search.point, begin, strict=True))
        if num_variables > 1 and _is_worth_replacing(search, begin_value, displacement, largest_fall):
            length = math.sqrt(sum(x * x for x in displacement))
            direction = tuple(x / max(length, _TINY) for x in displacement)
            moved = search.along(direction, length / 2)
            directions[index], steps[index] = directions[-1], steps[-1]
            directions[-1], steps[-1] = direction, max(abs(moved), last_step)


def _is_worth_replacing(
    search: _Search, begin_value: float, displacement: tuple[float, ...], largest_fall: float
) -> bool:
    """Powell's condition: the sweep's line goes on falling, and not because of one direction alone."""
    value = search.value
    further = search.at(tuple(x + d for x, d in zip(search.point, displacement, strict=True)))
    if further >= begin_value:
        return False
    curvature = 2 * (begin_value - 2 * value + further) * (begin_value - value - largest_fall) ** 2
    return curvature < largest_fall * (begin_value - further) ** 2


def _vertex(seen: dict[float, float]) -> float | None:
    """Vertex of the parabola through the least value and its neighbours; None where these do not enclose a minimum."""
    distances = sorted(seen)
    middle = min(range(len(distances)), key=lambda i: seen[distances[i]])
    if middle in (0, len(distances) - 1):
        return None
    a, b, c = distances[middle - 1], distances[middle], distances[middle + 1]
    left, right = (b - a) * (seen[b] - seen[c]), (b - c) * (seen[b] - seen[a])
    if not math.isfinite(left) or not math.isfinite(right) or left == right:
        return None
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
