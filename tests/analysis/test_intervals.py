"""Intervals over seeds."""

import math

import pytest
import torch

from fraqat.analysis.intervals import mean_over_seeds, ratio_over_seeds, t_975


def test_a_single_value_has_no_interval() -> None:
    interval = mean_over_seeds([2.0])
    assert (interval.mean, interval.low, interval.high) == (2.0, None, None)


def test_the_interval_of_five_values_is_students() -> None:
    interval = mean_over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3
    assert interval.high == pytest.approx(3 + 2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert interval.low == pytest.approx(6 - interval.high)


@pytest.mark.parametrize(("degrees", "wanted"), [(1, 12.706), (4, 2.776), (16, 2.120), (30, 2.042), (120, 1.980)])
def test_quantiles_of_students_t(degrees: int, wanted: float) -> None:
    assert t_975(degrees) == pytest.approx(wanted, abs=1e-3)


def test_the_interval_holds_the_mean_95_times_in_100() -> None:
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    hits = [interval.low < 0 < interval.high for interval in map(mean_over_seeds, draws.tolist())]
    assert 0.93 < sum(hits) / len(hits) < 0.97


def test_a_ratio_does_not_depend_on_which_is_above() -> None:
    up, down = ratio_over_seeds([2.0, 6.0, 5.0], [1.0, 2.0, 4.0]), ratio_over_seeds([1.0, 2.0, 4.0], [2.0, 6.0, 5.0])
    assert up.mean == pytest.approx(1 / down.mean)
    assert up.low == pytest.approx(1 / down.high)
