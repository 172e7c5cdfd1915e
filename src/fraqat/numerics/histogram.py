"""A histogram of all values seen, for ranges that need the values themselves: percentile and MSE clipping of static inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fraqat.numerics.grid import Grid

NUM_BINS = 1 << 13
_NUM_RATIOS = 81
_LEAST_RATIO = 0.2


@dataclass
class Histogram:
    """Counts over equal bins of [-limit, limit]; the limit doubles, and bins merge in pairs, where values go beyond it.

    Two bins of the end are never finer than limit / 4096, so that a quantile is right to 2^-12 of the largest value seen.
    """

    limit: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))

    def update(self, values: Tensor) -> None:
        """Adds finite values, any shape."""
        flat = values.detach().float().flatten().cpu()
        largest = float(flat.abs().max())
        if largest == 0.0 and self.limit == 0.0:
            largest = torch.finfo(torch.float32).tiny
        if self.limit == 0.0:
            self.limit = largest
        while largest > self.limit:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged.new_zeros(NUM_BINS // 4), merged, merged.new_zeros(NUM_BINS // 4)])
            self.limit *= 2
        places = ((flat.double() / self.limit + 1) * (NUM_BINS / 2)).long().clamp_(0, NUM_BINS - 1)
        self.counts += torch.bincount(places, minlength=NUM_BINS).double()

    def percentile_range(self, percentile: float) -> tuple[float, float]:
        """The range that holds `percentile` % of the values, with as many beyond it at either end."""
        share = (1 - percentile / 100) / 2
        cumulative = self.counts.cumsum(0) / self.counts.sum()
        low = int(torch.searchsorted(cumulative, torch.tensor(share, dtype=torch.float64), right=True))
        high = int(torch.searchsorted(cumulative, torch.tensor(1 - share, dtype=torch.float64)))
        edges = self._edges()
        return float(edges[min(low, NUM_BINS - 1)]), float(edges[min(high, NUM_BINS - 1) + 1])

    def mse_range(self, low: float, high: float, grid: Grid) -> tuple[float, float]:
        """The share of [low, high], shrunk at both ends alike, whose grid errs least on the values seen.

        Args:
            low, high: The extremes.
            grid: Codes; asymmetric grids have an integer zero point.
        """
        edges = self._edges()
        centres = (edges[:-1] + edges[1:]) / 2
        best, least = 1.0, float("inf")
        for ratio in torch.linspace(_LEAST_RATIO, 1.0, _NUM_RATIOS, dtype=torch.float64).flip(0).tolist():
            error = float((self.counts * (centres - _rounded(centres, ratio * low, ratio * high, grid)).square()).sum())
            if error < least:
                best, least = ratio, error
        return best * low, best * high

    def _edges(self) -> Tensor:
        return torch.linspace(-self.limit, self.limit, NUM_BINS + 1, dtype=torch.float64)


def _rounded(values: Tensor, low: float, high: float, grid: Grid) -> Tensor:
    if grid.symmetric:
        scale, zero_point = max(-low, high) / grid.range_divisor, 0.0
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (grid.qmax - grid.qmin)
        zero_point = float(round(grid.qmin - low / scale)) if scale else 0.0
    if not scale:
        return values
    codes = torch.clamp(torch.round(values / scale) + zero_point, grid.qmin, grid.qmax)
    return (codes - zero_point) * scale
