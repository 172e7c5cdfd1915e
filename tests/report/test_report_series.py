"""Laws of the numbers behind the plots."""

import numpy as np
import pytest

from fraqat.report.series import (
    drawable_points,
    smooth_log,
    spread_labels,
    thin_evenly,
    thin_to_extremes,
    thin_to_room,
)


def test_a_log_axis_shows_finite_positive_values_only() -> None:
    x, y = drawable_points(range(5), (1.0, float("nan"), 0.0, float("inf"), 2.0))
    assert x.tolist() == [0, 4]
    assert y.tolist() == [1, 2]


def test_thinning_keeps_every_extreme() -> None:
    y = np.exp(np.random.default_rng(0).normal(size=25_000))
    y[12_345], y[678] = 1e6, 1e-6
    x_thin, y_thin = thin_to_extremes(np.arange(25_000.0), y)
    assert len(x_thin) <= 600
    assert np.all(np.diff(x_thin) > 0)
    assert {1e6, 1e-6} <= set(y_thin.tolist())


def test_short_curves_are_not_thinned() -> None:
    x = np.arange(600.0)
    assert thin_to_extremes(x, x + 1)[0] is x


def test_smoothing_keeps_an_exponential_decay_exactly() -> None:
    x = np.arange(250.0)
    x_smooth, y_smooth = smooth_log(x, 3 * np.exp(-0.02 * x))
    np.testing.assert_allclose(y_smooth, 3 * np.exp(-0.02 * x_smooth), rtol=1e-9)


def test_smoothing_does_not_reach_across_a_boundary() -> None:
    x = np.arange(100.0)
    y = np.where(x < 40, 1.0, 10.0)
    x_smooth, y_smooth = smooth_log(x, y, [0, 40])
    np.testing.assert_allclose(y_smooth, np.where(x_smooth < 40, 1.0, 10.0))


@pytest.mark.parametrize("num_points", [0, 1, 2, 3])
def test_smoothing_accepts_tiny_curves(num_points: int) -> None:
    x = np.arange(float(num_points))
    np.testing.assert_allclose(smooth_log(x, np.full(num_points, 2.0), [0, 1, 2])[1], 2.0)


def test_smoothing_visits_both_sides_of_boundaries_of_long_curves() -> None:
    x = np.arange(25_000.0)
    x_smooth, _ = smooth_log(x, x + 1, [0, 777])
    assert len(x_smooth) <= 410
    assert {776, 777} <= set(x_smooth.tolist())


def test_even_thinning_keeps_the_last() -> None:
    assert thin_evenly(9, 9) == list(range(9))
    assert thin_evenly(9, 4) == [2, 5, 8]
    assert thin_evenly(0, 4) == []


def test_as_many_labels_are_kept_as_fit() -> None:
    assert thin_to_room([10] * 9, 90) == list(range(9))
    assert thin_to_room([10] * 9, 89) == [0, 2, 4, 6, 8]
    assert thin_to_room([10] * 3, 5) == [2]
    assert thin_to_room([], 5) == []


def test_labels_with_room_stay_where_they_are() -> None:
    assert spread_labels([10, 50, 90], [20, 20, 20], 0, 100) == [10, 50, 90]


def test_spread_labels_neither_overlap_nor_leave_the_line() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        centers = np.sort(generator.uniform(0, 300, size=9)).tolist()
        widths = generator.uniform(12, 32, size=9).tolist()
        placed = np.array(spread_labels(centers, widths, 0, 300))
        ends = np.stack([placed - np.array(widths) / 2, placed + np.array(widths) / 2])
        assert np.all(ends[0, 1:] >= ends[1, :-1] - 1e-9)
        assert ends.min() >= -1e-9
        assert ends.max() <= 300 + 1e-9


def test_crowded_labels_share_the_movement() -> None:
    assert spread_labels([50, 50], [20, 20], 0, 100) == [40, 60]
