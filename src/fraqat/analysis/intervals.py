"""Means over seeds with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t for 95 % two-sided and 1 to 15 degrees of freedom."""

_NORMAL_975 = 1.959964


@dataclass(frozen=True)
class SeedMean:
    """A mean and its 95 % confidence interval; `low` and `high` are None for a single value."""

    mean: float
    low: float | None
    high: float | None


def mean_over_seeds(values: Sequence[float]) -> SeedMean:
    """Mean with Student's interval, for values that are about normal.

    Args:
        values: At least one.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return SeedMean(mean, None, None)
    half = t_975(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return SeedMean(mean, mean - half, mean + half)


def ratio_over_seeds(values: Sequence[float], reference: Sequence[float]) -> SeedMean:
    """Geometric mean of paired ratios, value i over reference i, with the interval of their logarithms.

    Args:
        values: Positive, one per seed.
        reference: Positive, of the same seeds in the same order.
    """
    logs = mean_over_seeds([math.log(value / base) for value, base in zip(values, reference, strict=True)])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return SeedMean(math.exp(logs.mean), low, high)


def t_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; above 15 degrees by the first terms of its expansion around the normal's.

    Args:
        degrees: Of freedom, 1 or more.

    Numerics: within 0.001.
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _NORMAL_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
