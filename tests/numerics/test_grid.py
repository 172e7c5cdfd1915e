"""Laws of the integer grids: Eq. 1, Eq. 2 and the clamping rule of arXiv 2510.14823."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fraqat.errors import ConfigError
from fraqat.numerics import (
    BlockLayout,
    Granularity,
    Grid,
    RangeMethod,
    choose_qparams,
    code_dtype,
    dequantize,
    fake_quantize,
    quantize,
)

WIDTHS = st.floats(1, 32, exclude_min=True)
ROWS = BlockLayout(Granularity.CHANNEL)


def random_rows(seed: int, num_rows: int = 4, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 2, num_rows, dtype=torch.float64)[:, None]
    return torch.randn(num_rows, width, dtype=torch.float64, generator=generator) * spread


@pytest.mark.parametrize(
    ("bits", "qmin", "qmax"),
    [
        (16, -32768, 32767),
        (8, -128, 127),
        (7, -64, 63),
        (6, -32, 31),
        (5.5, -22, 21),
        (5, -16, 15),
        (4.75, -13, 12),
        (4.5, -11, 10),
        (4.25, -9, 8),
        (4, -8, 7),
        (3, -4, 3),
        (2, -2, 1),
        (1.5, -1, 0),
    ],
)
def test_symmetric_codes_follow_the_clamping_rule(bits: float, qmin: int, qmax: int) -> None:
    grid = Grid(bits)
    assert (grid.qmin, grid.qmax) == (qmin, qmax)
    assert isinstance(grid.qmin, int)
    assert isinstance(grid.qmax, int)
    assert grid.num_levels == qmax - qmin + 1


@pytest.mark.parametrize(("bits", "qmax"), [(8, 255), (5.5, 44), (4.5, 21), (4, 15), (2, 3), (1.5, 1), (1, 1)])
def test_asymmetric_codes_start_at_zero(bits: float, qmax: int) -> None:
    grid = Grid(bits, symmetric=False)
    assert (grid.qmin, grid.qmax) == (0, qmax)


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (5.5, 21), (4, 7), (2, 1)])
def test_narrow_grid_is_its_own_mirror_image(bits: float, limit: int) -> None:
    grid = Grid(bits, narrow=True)
    assert (grid.qmin, grid.qmax) == (-limit, limit)
    assert grid.range_divisor == Grid(bits).range_divisor


@given(bits=WIDTHS)
def test_range_divisor_keeps_the_real_width(bits: float) -> None:
    assert Grid(bits).range_divisor == 2.0 ** (bits - 1) - 1
    assert Grid(bits, symmetric=False).range_divisor == 2.0**bits


@given(bits=WIDTHS, seed=st.integers(0, 1000))
def test_symmetric_grid_is_equation_1(bits: float, seed: int, paper) -> None:
    x = random_rows(seed)
    scale, codes, values = paper.equation_1(x.numpy(), bits)
    qparams = choose_qparams(x, Grid(bits), ROWS, RangeMethod.MAX_ABS)
    np.testing.assert_allclose(qparams.scale.numpy(), scale, rtol=1e-15)
    np.testing.assert_array_equal(quantize(x, qparams, Grid(bits), ROWS).numpy(), codes)
    np.testing.assert_allclose(fake_quantize(x, qparams, Grid(bits), ROWS).numpy(), values, rtol=1e-15)
    assert qparams.zero_point is None
    assert qparams.offset is None


@given(bits=st.floats(1, 32), seed=st.integers(0, 1000))
def test_asymmetric_grid_is_equation_2(bits: float, seed: int, paper) -> None:
    x, grid = random_rows(seed) + 0.3, Grid(bits, symmetric=False)
    scale, codes, values = paper.equation_2(x.numpy(), bits)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MIN_MAX)
    np.testing.assert_allclose(qparams.scale.numpy(), scale, rtol=1e-15)
    np.testing.assert_array_equal(quantize(x, qparams, grid, ROWS).numpy(), codes)
    np.testing.assert_allclose(fake_quantize(x, qparams, grid, ROWS).numpy(), values, rtol=1e-14)
    assert torch.equal(qparams.offset, x.amin(dim=1, keepdim=True))


@given(bits=st.floats(2, 32), seed=st.integers(0, 1000))
def test_narrow_grid_is_equation_1_without_the_lowest_code(bits: float, seed: int, paper) -> None:
    x, grid = random_rows(seed), Grid(bits, narrow=True)
    _, codes, values = paper.equation_1(x.numpy(), bits, narrow=True)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS)
    np.testing.assert_array_equal(quantize(x, qparams, grid, ROWS).numpy(), codes)
    np.testing.assert_allclose(fake_quantize(x, qparams, grid, ROWS).numpy(), values, rtol=1e-15)


@given(bits=st.floats(1, math.log2(3), exclude_min=True, exclude_max=True), seed=st.integers(0, 100))
def test_below_log2_of_3_bits_equation_1_rounds_everything_to_zero(bits: float, seed: int) -> None:
    x = random_rows(seed)
    qparams = choose_qparams(x, Grid(bits), ROWS, RangeMethod.MAX_ABS)
    assert torch.count_nonzero(fake_quantize(x, qparams, Grid(bits), ROWS)) == 0


def test_above_log2_of_3_bits_equation_1_keeps_the_largest_negative_value() -> None:
    x = torch.tensor([[-1.0, 0.2, 0.9]])
    qparams = choose_qparams(x, Grid(1.6), ROWS, RangeMethod.MAX_ABS)
    assert quantize(x, qparams, Grid(1.6), ROWS).tolist() == [[-1, 0, 0]]


def test_one_bit_asymmetric_grid_has_the_codes_zero_and_one() -> None:
    x, grid = torch.tensor([[-1.0, -0.5, 0.25, 3.0]]), Grid(1, symmetric=False)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MIN_MAX)
    codes = quantize(x, qparams, grid, ROWS)
    assert codes.tolist() == [[0, 0, 1, 1]]
    assert dequantize(codes, qparams, ROWS).tolist() == [[-1.0, -1.0, 1.0, 1.0]]


@given(bits=WIDTHS, symmetric=st.booleans())
def test_storage_bits_are_the_fewest_that_hold_every_code(bits: float, symmetric: bool) -> None:
    grid = Grid(bits, symmetric)
    assert 2**grid.storage_bits >= grid.num_levels
    assert grid.storage_bits == 1 or 2 ** (grid.storage_bits - 1) < grid.num_levels


@pytest.mark.parametrize(("bits", "storage"), [(8, 8), (5.5, 6), (5, 5), (4.75, 5), (4.25, 5), (4, 4), (2, 2)])
def test_storage_bits_of_the_papers_widths(bits: float, storage: int) -> None:
    assert Grid(bits).storage_bits == storage


@given(bits=WIDTHS, symmetric=st.booleans())
def test_code_dtype_is_the_smallest_that_holds_every_code(bits: float, symmetric: bool) -> None:
    grid = Grid(bits, symmetric)
    ranges = [(-(2**7), 2**7 - 1), (0, 2**8 - 1), (-(2**15), 2**15 - 1), (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)]
    first = next(i for i, (low, high) in enumerate(ranges) if low <= grid.qmin and grid.qmax <= high)
    assert code_dtype(grid) is (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)[first]


def test_compute_dtype_moves_to_float64_where_float32_would_lose_codes() -> None:
    assert Grid(24).compute_dtype is torch.float32
    assert Grid(24.01).compute_dtype is torch.float64


@pytest.mark.parametrize("bits", [0, -4, 0.99, 32.5, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_width_outside_the_range_is_refused(bits: float, symmetric: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        Grid(bits, symmetric)
    text = str(caught.value)
    assert f"bits = {bits!r}" in text
    assert ("1 < bits <= 32 (symmetric, Eq. 1)" if symmetric else "1 <= bits <= 32 (asymmetric, Eq. 2)") in text
    assert "Fix: " in text


def test_one_bit_symmetric_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bits = 1 is not possible: allowed is 1 < bits <= 32.*symmetric=False"):
        Grid(1)


@pytest.mark.parametrize("bits", [math.nan, math.inf, -math.inf, True, False, "4", None, 4 + 0j])
def test_width_that_is_no_finite_number_is_refused(bits: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Grid(bits)
    assert str(caught.value) == (
        f"bits = {bits!r} is not possible: allowed is a finite number. Fix: give a width such as 4 or 4.5."
    )
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (1.99, True), (8, False)])
def test_narrow_grid_that_cannot_be_is_refused(bits: float, symmetric: bool) -> None:
    with pytest.raises(
        ConfigError, match=r"narrow = True .* a symmetric grid of at least 2 bits.* Fix: set narrow=False"
    ):
        Grid(bits, symmetric, narrow=True)


def test_grid_is_a_frozen_value() -> None:
    assert Grid(4) == Grid(4.0)
    assert hash(Grid(4)) == hash(Grid(4.0))
    with pytest.raises(AttributeError):
        Grid(4).bits = 5  # type: ignore[misc]
