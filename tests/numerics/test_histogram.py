"""Laws of the histogram behind percentile and MSE ranges of static inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fraqat.errors import ConfigError
from fraqat.numerics import Grid, Histogram, RangeMethod, RunningStatistics
from fraqat.numerics.histogram import NUM_BINS

BATCHES = st.lists(
    st.lists(st.floats(-1e4, 1e4, width=32, allow_nan=False, allow_subnormal=False), min_size=1, max_size=30),
    min_size=1,
    max_size=6,
)


def of(batches: list[list[float]]) -> tuple[Histogram, np.ndarray]:
    histogram = Histogram()
    for batch in batches:
        histogram.update(torch.tensor(batch))
    return histogram, np.array([value for batch in batches for value in batch], dtype=np.float32)


@given(BATCHES)
def test_no_value_is_lost_however_far_the_limit_moves(batches: list[list[float]]) -> None:
    histogram, values = of(batches)
    assert histogram.counts.sum() == len(values)
    assert np.abs(values).max() <= histogram.limit
    low, high = histogram.percentile_range(100)
    width = 2 * histogram.limit / NUM_BINS
    assert low == pytest.approx(values.min(), abs=2 * width + 1e-12)
    assert high == pytest.approx(values.max(), abs=2 * width + 1e-12)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_numpys_to_a_bin(percentile: float) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4000, generator=generator) * scale + 0.3) for scale in (0.5, 1.0, 3.0)]
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    values = torch.cat(batches).double().numpy()
    share = (100 - percentile) / 2
    width = 2 * histogram.limit / NUM_BINS
    gaps = 2 * width + 0.02 * np.ptp(values) * (percentile > 99.5)  # few values lie out there
    low, high = histogram.percentile_range(percentile)
    assert low == pytest.approx(np.percentile(values, share), abs=gaps)
    assert high == pytest.approx(np.percentile(values, 100 - share), abs=gaps)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_errs_less_than_the_extremes_and_than_other_shares(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(20000, generator=generator) ** 3 + 0.2
    statistics = RunningStatistics(Histogram())
    for batch in values.split(5000):
        statistics.update(batch)
    grid = Grid(4, symmetric)

    def error(low: float, high: float) -> float:
        if symmetric:
            scale, zero = max(-low, high) / grid.range_divisor, 0.0
        else:
            scale = (max(high, 0) - min(low, 0)) / (grid.qmax - grid.qmin)
            zero = round(grid.qmin - min(low, 0) / scale)
        codes = (values / scale).round().add(zero).clamp(grid.qmin, grid.qmax)
        return float(((codes - zero) * scale - values).square().mean())

    found = error(*statistics.range(RangeMethod.MSE, grid))
    shares = [error(r * statistics.low, r * statistics.high) for r in np.linspace(0.2, 1, 41)]
    assert found <= 1.01 * min(shares)
    assert found < 0.6 * shares[-1]


def test_values_are_needed() -> None:
    statistics = RunningStatistics()
    statistics.update(torch.ones(3))
    with pytest.raises(ConfigError, match="with a histogram mse and percentile"):
        statistics.range(RangeMethod.PERCENTILE)


def test_zeros_alone_have_a_range() -> None:
    histogram = Histogram()
    histogram.update(torch.zeros(5))
    assert histogram.counts.sum() == 5
    assert abs(histogram.percentile_range(99)[0]) < 1e-30
