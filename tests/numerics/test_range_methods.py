"""Laws of the range methods: max-abs, min-max, 3-sigma, MSE clipping, running statistics."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fraqat.errors import ConfigError
from fraqat.numerics import (
    MIN_SCALE,
    BlockLayout,
    Granularity,
    Grid,
    RangeMethod,
    RunningStatistics,
    choose_qparams,
    estimate_range,
    fake_quantize,
    mse_clip_ratio,
    qparams_from_range,
)

SEEDS = st.integers(0, 10_000)
MEASURED = [method for method in RangeMethod if method is not RangeMethod.PERCENTILE]
ROWS = BlockLayout(Granularity.CHANNEL)
LAYOUTS = {
    "tensor": (BlockLayout(Granularity.TENSOR), (6, 8)),
    "channel": (BlockLayout(Granularity.CHANNEL), (6, 8)),
    "group": (BlockLayout(Granularity.GROUP, group_size=4), (6, 8, 1, 1)),
    "sample": (BlockLayout(Granularity.SAMPLE), (3, 4, 8)),
    "token": (BlockLayout(Granularity.TOKEN), (3, 4, 8)),
    "token of an image": (BlockLayout(Granularity.TOKEN, channel_axis=1), (3, 8, 2, 5)),
}
each_layout = pytest.mark.parametrize(("layout", "shape"), LAYOUTS.values(), ids=LAYOUTS.keys())


def heavy_tailed(seed: int, shape: tuple[int, ...] = (6, 128), dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) ** 3).to(dtype)


def numpy_range(rows: np.ndarray, method: RangeMethod) -> tuple[np.ndarray, np.ndarray]:
    low, high = rows.min(axis=1), rows.max(axis=1)
    if method is RangeMethod.MAX_ABS:
        limit = np.abs(rows).max(axis=1)
        return -limit, limit
    if method is RangeMethod.THREE_SIGMA:
        mean, std = rows.mean(axis=1), rows.std(axis=1)
        return np.maximum(low, mean - 3 * std), np.minimum(high, mean + 3 * std)
    return low, high


def row_errors(x: Tensor, value: Tensor) -> np.ndarray:
    return (x.double() - value.double()).square().sum(dim=1).numpy()


@each_layout
@pytest.mark.parametrize("method", [RangeMethod.MAX_ABS, RangeMethod.MIN_MAX, RangeMethod.THREE_SIGMA])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_range_equals_numpy_per_block(
    layout: BlockLayout, shape: tuple[int, ...], method: RangeMethod, dtype: torch.dtype, rtol: float, to_rows: Callable
) -> None:
    x = heavy_tailed(3, shape, dtype) + 0.5
    low, high = estimate_range(x, layout, method)
    expected_low, expected_high = numpy_range(to_rows(x, layout).double().numpy(), method)
    assert low.shape == high.shape == layout.scale_shape(shape)
    assert low.dtype is high.dtype is dtype
    np.testing.assert_allclose(low.flatten().numpy(), expected_low, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(high.flatten().numpy(), expected_high, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_range_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    x = heavy_tailed(4, dtype=dtype)
    low, high = estimate_range(x, ROWS, RangeMethod.MIN_MAX)
    assert low.dtype is high.dtype is torch.float32
    assert torch.equal(high, x.float().amax(dim=1, keepdim=True))
    sigma = estimate_range(x, ROWS, RangeMethod.THREE_SIGMA)[1]
    torch.testing.assert_close(sigma, estimate_range(x.float(), ROWS, RangeMethod.THREE_SIGMA)[1], rtol=0, atol=0)


@given(seed=SEEDS, shift=st.floats(-3, 3), width=st.integers(1, 200))
def test_three_sigma_never_goes_beyond_the_extremes(seed: int, shift: float, width: int) -> None:
    x = heavy_tailed(seed, (4, width)) + shift
    low, high = estimate_range(x, ROWS, RangeMethod.THREE_SIGMA)
    assert torch.all(low >= x.amin(dim=1, keepdim=True))
    assert torch.all(high <= x.amax(dim=1, keepdim=True))
    assert torch.all(low <= high)


def test_three_sigma_cuts_an_outlier_and_max_abs_does_not() -> None:
    x = torch.cat([torch.randn(1, 1000, dtype=torch.float64), torch.tensor([[100.0]], dtype=torch.float64)], dim=1)
    assert estimate_range(x, ROWS, RangeMethod.THREE_SIGMA)[1].item() < 15
    assert estimate_range(x, ROWS, RangeMethod.MAX_ABS)[1].item() == 100


@pytest.mark.parametrize("method", MEASURED)
def test_method_may_be_given_by_its_name(method: RangeMethod) -> None:
    x = heavy_tailed(2)
    by_name = choose_qparams(x, Grid(4), ROWS, str(method))
    assert torch.equal(by_name.scale, choose_qparams(x, Grid(4), ROWS, method).scale)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"range_method = 'max' .* max_abs, min_max, three_sigma, mse"):
        choose_qparams(heavy_tailed(2), Grid(4), ROWS, "max")


@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_scale_covers_the_larger_side(sign: int) -> None:
    low, high = sorted((sign * torch.tensor([[-0.5]]), sign * torch.tensor([[3.5]])), key=float)
    assert qparams_from_range(low, high, Grid(4)).scale.item() == 0.5


def test_integer_zero_point_follows_the_accelerators_form() -> None:
    low, high = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
    qparams = qparams_from_range(low, high, Grid(8, symmetric=False), integer_zero_point=True)
    assert qparams.scale.item() == np.float32(3.0) / np.float32(255.0)
    assert qparams.zero_point.item() == 85


@pytest.mark.parametrize(("low", "high", "zero_point"), [(2.0, 5.0, 0), (-5.0, -2.0, 255)])
def test_integer_zero_point_widens_the_range_to_hold_zero(low: float, high: float, zero_point: int) -> None:
    grid = Grid(8, symmetric=False)
    qparams = qparams_from_range(torch.tensor(low), torch.tensor(high), grid, integer_zero_point=True)
    assert qparams.scale.item() == np.float32(5.0) / np.float32(255.0)
    assert qparams.zero_point.item() == zero_point


def test_scale_is_never_below_the_smallest() -> None:
    zero = torch.zeros(1, 1)
    for grid in (Grid(8), Grid(8, symmetric=False)):
        assert qparams_from_range(zero, zero, grid).scale.item() == MIN_SCALE


# --- MSE clipping


@each_layout
@pytest.mark.parametrize("bits", [2, 3, 4, 5.5, 8])
def test_mse_is_never_worse_than_max_abs(
    layout: BlockLayout, shape: tuple[int, ...], bits: float, to_rows: Callable
) -> None:
    x, grid = heavy_tailed(int(10 * bits), shape), Grid(bits)
    errors = {}
    for method in (RangeMethod.MSE, RangeMethod.MAX_ABS):
        value = fake_quantize(x, choose_qparams(x, grid, layout, method), grid, layout)
        errors[method] = row_errors(to_rows(x, layout), to_rows(value, layout))
    assert np.all(errors[RangeMethod.MSE] <= errors[RangeMethod.MAX_ABS] * (1 + 1e-6))


@pytest.mark.parametrize("bits", [2, 3, 4, 4.5, 5.5])
@pytest.mark.parametrize("tail", [1, 3])
def test_mse_is_close_to_a_brute_force_search(bits: float, tail: int) -> None:
    x, grid = torch.randn(6, 512, dtype=torch.float64) ** tail, Grid(bits)
    value = fake_quantize(x, choose_qparams(x, grid, ROWS, RangeMethod.MSE), grid, ROWS)
    errors = row_errors(x, value)

    rows = x.numpy()
    full = np.abs(rows).max(axis=1, keepdims=True) / (2.0 ** (bits - 1) - 1)
    half = np.floor(2.0 ** (bits - 1))
    best = np.full(len(rows), np.inf)
    for ratio in np.arange(0.2, 1.0005, 0.001):
        scale = full * ratio
        value = scale * np.clip(np.rint(rows / scale), -half, half - 1)
        best = np.minimum(best, ((rows - value) ** 2).sum(axis=1))
    assert np.all(errors <= 1.03 * best)
    assert np.all(errors >= best * (1 - 1e-9))


def test_mse_is_clearly_better_than_max_abs_on_heavy_tails(sqnr_db: Callable) -> None:
    x, grid = heavy_tailed(1, (8, 512)), Grid(4)
    values = {m: fake_quantize(x, choose_qparams(x, grid, ROWS, m), grid, ROWS) for m in MEASURED}
    assert sqnr_db(x, values[RangeMethod.MSE]) > sqnr_db(x, values[RangeMethod.MAX_ABS]) + 1


@pytest.mark.parametrize("integer_zero_point", [True, False])
def test_mse_of_an_asymmetric_grid_is_never_worse_than_min_max(integer_zero_point: bool) -> None:
    x, grid = heavy_tailed(9), Grid(4, symmetric=False)
    errors = {}
    for method in (RangeMethod.MSE, RangeMethod.MIN_MAX):
        qparams = choose_qparams(x, grid, ROWS, method, integer_zero_point=integer_zero_point)
        errors[method] = row_errors(x, fake_quantize(x, qparams, grid, ROWS))
    assert np.all(errors[RangeMethod.MSE] <= errors[RangeMethod.MIN_MAX] * (1 + 1e-6))
    assert errors[RangeMethod.MSE].sum() < 0.97 * errors[RangeMethod.MIN_MAX].sum()


@each_layout
def test_mse_ratio_has_one_share_of_the_range_per_block(layout: BlockLayout, shape: tuple[int, ...]) -> None:
    ratio = mse_clip_ratio(heavy_tailed(5, shape), Grid(3), layout)
    assert ratio.shape == layout.scale_shape(shape)
    assert torch.all((ratio > 0.2) & (ratio <= 1))


def test_known_mse_ratio_is_used_instead_of_a_search() -> None:
    x, grid = heavy_tailed(6), Grid(4)
    full = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS).scale
    half = choose_qparams(x, grid, ROWS, RangeMethod.MSE, clip_ratio=torch.full((6, 1), 0.5)).scale
    assert torch.equal(half, full / 2)
    searched = choose_qparams(x, grid, ROWS, RangeMethod.MSE).scale
    known = choose_qparams(x, grid, ROWS, RangeMethod.MSE, clip_ratio=mse_clip_ratio(x, grid, ROWS)).scale
    assert torch.equal(searched, known)
    assert not torch.equal(searched, half)


def test_mse_clipping_is_searched_with_the_rounded_scale() -> None:
    x, grid = heavy_tailed(8), Grid(4)
    errors = []
    for method in (RangeMethod.MSE, RangeMethod.MAX_ABS):
        qparams = choose_qparams(x, grid, ROWS, method, scale_dtype=torch.bfloat16)
        errors.append(row_errors(x, fake_quantize(x, qparams, grid, ROWS)))
    assert np.all(errors[0] <= errors[1] * (1 + 1e-6))


# --- running statistics


@given(batches=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), min_size=1, max_size=6))
def test_merged_statistics_equal_those_of_the_concatenation(batches: list[list[float]]) -> None:
    statistics = RunningStatistics()
    for batch in batches:
        statistics.update(torch.tensor(batch))
    everything = np.concatenate([np.array(batch, dtype=np.float64) for batch in batches])
    assert statistics.count == len(everything)
    assert (statistics.low, statistics.high) == (everything.min(), everything.max())
    assert statistics.mean == pytest.approx(everything.mean(), rel=1e-9, abs=1e-9)
    assert statistics.std == pytest.approx(everything.std(), rel=1e-6, abs=1e-6)


def test_merged_statistics_keep_their_digits_far_from_zero() -> None:
    """The sum of squares would lose every digit of the deviation here."""
    everything = 1e6 + torch.randn(64, 100, dtype=torch.float64)
    statistics = RunningStatistics()
    for batch in everything:
        statistics.update(batch)
    assert statistics.std == pytest.approx(everything.numpy().std(), rel=1e-9)


@given(seed=SEEDS, shift=st.floats(-3, 3))
@pytest.mark.parametrize("method", [RangeMethod.MAX_ABS, RangeMethod.MIN_MAX, RangeMethod.THREE_SIGMA])
def test_running_range_equals_the_range_of_the_concatenation(method: RangeMethod, seed: int, shift: float) -> None:
    batches = [heavy_tailed(seed + i, (3, 5 + i)) + shift for i in range(4)]
    statistics = RunningStatistics()
    for batch in batches:
        statistics.update(batch)
    everything = np.concatenate([batch.double().numpy().ravel() for batch in batches])
    low, high = numpy_range(everything[None], method)
    assert statistics.range(method) == pytest.approx((low[0], high[0]), rel=1e-9)


def test_half_precision_statistics_are_not_rounded() -> None:
    x = torch.randn(2000).bfloat16()
    statistics = RunningStatistics()
    statistics.update(x)
    assert statistics.mean == pytest.approx(x.double().numpy().mean(), rel=1e-9)


def test_empty_batch_changes_nothing() -> None:
    statistics = RunningStatistics()
    statistics.update(torch.empty(0, 4))
    assert statistics == RunningStatistics()
    statistics.update(torch.tensor([1.0, 3.0]))
    statistics.update(torch.empty(0, 4))
    assert (statistics.count, statistics.mean, statistics.std, statistics.low, statistics.high) == (2, 2, 1, 1, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_statistics_refuse_what_is_not_finite(bad: float) -> None:
    statistics = RunningStatistics()
    with pytest.raises(ConfigError, match=r"activation = 'nan or inf' .* finite values.*check the calibration inputs"):
        statistics.update(torch.tensor([1.0, bad]))
    assert statistics == RunningStatistics()


def test_range_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"calibration = 'no data' .* at least one batch.* Fix: run calibrate_"):
        RunningStatistics().range(RangeMethod.MAX_ABS)


def test_running_mse_range_is_refused() -> None:
    statistics = RunningStatistics()
    statistics.update(torch.randn(4))
    with pytest.raises(ConfigError, match=r"range_method = 'mse' .* Fix: use three_sigma"):
        statistics.range(RangeMethod.MSE)
