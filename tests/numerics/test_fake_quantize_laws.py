"""Laws of quantize, dequantize and fake_quantize."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fraqat.errors import ConfigError
from fraqat.numerics import (
    BlockLayout,
    Granularity,
    Grid,
    QParams,
    RangeMethod,
    choose_qparams,
    covers_every_value,
    dequantize,
    fake_quantize,
    quantize,
)

WIDTHS = st.floats(1, 32, exclude_min=True)
SEEDS = st.integers(0, 10_000)
TENSOR = BlockLayout(Granularity.TENSOR)
ROWS = BlockLayout(Granularity.CHANNEL)
LAYOUTS = {
    "tensor": (BlockLayout(Granularity.TENSOR), (6, 8)),
    "channel": (BlockLayout(Granularity.CHANNEL), (6, 8)),
    "channel of a convolution": (BlockLayout(Granularity.CHANNEL), (6, 8, 1, 1)),
    "group": (BlockLayout(Granularity.GROUP, group_size=4), (6, 8)),
    "group of a convolution": (BlockLayout(Granularity.GROUP, group_size=4), (6, 8, 1, 1)),
    "sample": (BlockLayout(Granularity.SAMPLE), (3, 4, 8)),
    "token": (BlockLayout(Granularity.TOKEN), (3, 4, 8)),
    "token of an image": (BlockLayout(Granularity.TOKEN, channel_axis=1), (3, 8, 2, 5)),
}
each_layout = pytest.mark.parametrize(("layout", "shape"), LAYOUTS.values(), ids=LAYOUTS.keys())


def random_tensor(seed: int, shape: tuple[int, ...] = (4, 24), dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def power_of_two_qparams(seed: int, shape: tuple[int, ...]) -> QParams:
    exponent = torch.randint(-2, 2, shape, generator=torch.Generator().manual_seed(seed))
    return QParams(torch.pow(2.0, exponent.float()))


def exact_code(value: float, scale: float, qmin: int, qmax: int) -> int:
    """round(value / scale), ties to even, in rational arithmetic."""
    return max(qmin, min(qmax, round(Fraction(value) / Fraction(scale))))


# --- values on the grid


@given(bits=WIDTHS, seed=SEEDS, narrow=st.booleans())
def test_fake_quantize_is_idempotent(bits: float, seed: int, narrow: bool) -> None:
    grid, x = Grid(bits, narrow=narrow and bits >= 2), random_tensor(seed)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS)
    once = fake_quantize(x, qparams, grid, ROWS)
    assert torch.equal(fake_quantize(once, qparams, grid, ROWS), once)


@given(bits=WIDTHS, seed=SEEDS)
def test_fake_quantize_of_float64_is_idempotent_at_every_width(bits: float, seed: int) -> None:
    grid, x = Grid(bits), random_tensor(seed, dtype=torch.float64)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS)
    once = fake_quantize(x, qparams, grid, ROWS)
    assert torch.equal(fake_quantize(once, qparams, grid, ROWS), once)


@given(bits=st.floats(1, 16), seed=SEEDS, shift=st.floats(-1, 1))
def test_asymmetric_fake_quantize_is_idempotent(bits: float, seed: int, shift: float) -> None:
    grid, x = Grid(bits, symmetric=False), random_tensor(seed) + shift
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MIN_MAX)
    once = fake_quantize(x, qparams, grid, ROWS)
    assert torch.equal(fake_quantize(once, qparams, grid, ROWS), once)


@given(bits=st.floats(1, 8, exclude_min=True), seed=SEEDS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_fake_quantize_of_half_precision_is_idempotent(bits: float, seed: int, dtype: torch.dtype) -> None:
    grid, x = Grid(bits), random_tensor(seed, dtype=dtype)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS)
    once = fake_quantize(x, qparams, grid, ROWS)
    assert torch.equal(fake_quantize(once, qparams, grid, ROWS), once)


@given(bits=WIDTHS, seed=SEEDS, symmetric=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_error_inside_the_range_is_at_most_half_a_step(
    bits: float, seed: int, symmetric: bool, dtype: torch.dtype
) -> None:
    grid, x = Grid(bits, symmetric), random_tensor(seed, dtype=dtype)
    method = RangeMethod.MAX_ABS if symmetric else RangeMethod.MIN_MAX
    qparams = choose_qparams(x, grid, ROWS, method)
    value = fake_quantize(x, qparams, grid, ROWS).double()
    x, scale = x.double(), qparams.scale.double()
    offset = torch.zeros_like(scale) if qparams.offset is None else qparams.offset.double()
    lowest, highest = offset + (grid.qmin - 0.5) * scale, offset + (grid.qmax + 0.5) * scale
    is_inside = (lowest <= x) & (x <= highest)
    rounding = 4 * torch.finfo(dtype).eps * (x.abs().amax(dim=1, keepdim=True) + offset.abs())
    assert torch.all(((value - x).abs() <= scale / 2 + rounding)[is_inside])
    assert is_inside.float().mean() > 0.9 or bits < 3


@given(bits=WIDTHS, seed=SEEDS)
def test_value_outside_the_range_becomes_the_last_code(bits: float, seed: int) -> None:
    grid = Grid(bits)
    scale = torch.tensor([[2.0**-10]])
    x = torch.tensor([[grid.qmax + 0.75, grid.qmax + 1e6, grid.qmin - 0.75, grid.qmin - 1e6]], dtype=torch.float64)
    qparams = QParams(scale.double())
    value = fake_quantize(x * scale, qparams, grid, ROWS) / scale
    assert value.tolist() == [[grid.qmax, grid.qmax, grid.qmin, grid.qmin]]


@given(bits=WIDTHS, seed=SEEDS, symmetric=st.booleans())
def test_fake_quantize_is_dequantize_of_quantize(bits: float, seed: int, symmetric: bool) -> None:
    grid, x = Grid(bits, symmetric), random_tensor(seed)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MIN_MAX)
    codes = quantize(x, qparams, grid, ROWS)
    assert torch.equal(dequantize(codes, qparams, ROWS), fake_quantize(x, qparams, grid, ROWS))
    assert codes.min() >= grid.qmin
    assert codes.max() <= grid.qmax


def test_ties_round_to_even() -> None:
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]])
    expected = [[-2, -2, 0, 0, 2, 2, 4]]
    assert quantize(x, QParams(torch.ones(1, 1)), Grid(8), ROWS).tolist() == expected
    assert fake_quantize(x, QParams(torch.ones(1, 1)), Grid(8), ROWS).tolist() == expected


@given(bits=WIDTHS, seed=SEEDS)
def test_zero_is_exact_on_symmetric_grids(bits: float, seed: int) -> None:
    grid, x = Grid(bits), random_tensor(seed)
    x[:, 3] = 0
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS)
    assert torch.count_nonzero(fake_quantize(x, qparams, grid, ROWS)[:, 3]) == 0


@given(bits=st.floats(1, 24), seed=SEEDS, shift=st.floats(-5, 5))
def test_zero_is_exact_with_an_integer_zero_point(bits: float, seed: int, shift: float) -> None:
    grid, x = Grid(bits, symmetric=False), random_tensor(seed) + shift
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MIN_MAX, integer_zero_point=True)
    zeros = torch.zeros_like(x)
    assert torch.equal(fake_quantize(zeros, qparams, grid, ROWS), zeros)
    assert torch.equal(qparams.zero_point, qparams.zero_point.round())
    assert torch.all((grid.qmin <= qparams.zero_point) & (qparams.zero_point <= grid.qmax))
    assert qparams.offset is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("integer_zero_point", [True, False])
def test_all_zero_rows_give_zero_codes_and_values(symmetric: bool, integer_zero_point: bool) -> None:
    x, grid = random_tensor(0), Grid(4, symmetric)
    x[1] = 0
    method = RangeMethod.MAX_ABS if symmetric else RangeMethod.MIN_MAX
    qparams = choose_qparams(x, grid, ROWS, method, integer_zero_point=integer_zero_point)
    assert torch.all(qparams.scale > 0)
    assert torch.count_nonzero(quantize(x, qparams, grid, ROWS)[1]) == 0
    value = fake_quantize(x, qparams, grid, ROWS)
    assert torch.count_nonzero(value[1]) == 0
    assert torch.isfinite(value).all()


@each_layout
@pytest.mark.parametrize("method", [RangeMethod.MAX_ABS, RangeMethod.THREE_SIGMA, RangeMethod.MSE])
def test_all_zero_tensor_stays_zero(layout: BlockLayout, shape: tuple[int, ...], method: RangeMethod) -> None:
    x = torch.zeros(shape, requires_grad=True)
    value = fake_quantize(x, choose_qparams(x.detach(), Grid(4), layout, method), Grid(4), layout)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(shape))
    assert torch.equal(x.grad, torch.ones(shape))


def test_subnormal_values_keep_the_error_bound() -> None:
    x = torch.tensor([[1e-38, -3e-39, 1e-40]])
    qparams = choose_qparams(x, Grid(8), ROWS, RangeMethod.MAX_ABS)
    value = fake_quantize(x, qparams, Grid(8), ROWS)
    assert torch.all((value - x).abs() <= qparams.scale / 2)


# --- against torch


@each_layout
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 12, 16])
def test_integer_width_equals_torch_exactly_for_powers_of_two(
    layout: BlockLayout, shape: tuple[int, ...], bits: int, to_rows: Callable, from_rows: Callable
) -> None:
    grid, x = Grid(bits), 3 * random_tensor(bits, shape)
    qparams = power_of_two_qparams(bits, layout.scale_shape(shape))
    rows = to_rows(x, layout)
    scale = qparams.scale.flatten()
    expected = torch.fake_quantize_per_channel_affine(
        rows, scale, torch.zeros(len(rows), dtype=torch.int32), 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    assert torch.equal(fake_quantize(x, qparams, grid, layout), from_rows(expected, shape, layout))


@given(bits=st.integers(2, 12), seed=SEEDS)
def test_integer_width_equals_torch_per_tensor_away_from_ties(bits: int, seed: int) -> None:
    grid, x = Grid(bits), random_tensor(seed)
    qparams = choose_qparams(x, grid, TENSOR, RangeMethod.MAX_ABS)
    step = float(qparams.scale)
    expected = torch.fake_quantize_per_tensor_affine(x, step, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    value = fake_quantize(x, qparams, grid, TENSOR)
    is_tie = ((x.double() / step).abs() % 1 - 0.5).abs() < 1e-3
    assert torch.equal(value[~is_tie], expected[~is_tie])
    assert torch.all((value - expected).abs() <= step * 1.001)
    assert is_tie.float().mean() < 0.1


@given(bits=st.integers(2, 8), seed=SEEDS, shift=st.floats(-4, 4))
def test_integer_zero_point_equals_torch_away_from_ties(bits: int, seed: int, shift: float) -> None:
    grid, x = Grid(bits, symmetric=False), random_tensor(seed) + shift
    qparams = choose_qparams(x, grid, TENSOR, RangeMethod.MIN_MAX, integer_zero_point=True)
    step = float(qparams.scale)
    expected = torch.fake_quantize_per_tensor_affine(x, step, int(qparams.zero_point), 0, 2**bits - 1)
    value = fake_quantize(x, qparams, grid, TENSOR)
    is_tie = ((x.double() / step).abs() % 1 - 0.5).abs() < 1e-3
    torch.testing.assert_close(value[~is_tie], expected[~is_tie], rtol=1e-6, atol=1e-6 * step)


@each_layout
@pytest.mark.parametrize("bits", [2, 4, 5.5, 8])
def test_every_granularity_equals_equation_1_on_its_rows(
    layout: BlockLayout, shape: tuple[int, ...], bits: float, paper, to_rows: Callable, from_rows: Callable
) -> None:
    x = random_tensor(7, shape, torch.float64)
    _, _, expected = paper.equation_1(to_rows(x, layout).numpy(), bits)
    qparams = choose_qparams(x, Grid(bits), layout, RangeMethod.MAX_ABS)
    value = fake_quantize(x, qparams, Grid(bits), layout)
    np.testing.assert_allclose(value.numpy(), from_rows(torch.from_numpy(expected), shape, layout).numpy(), rtol=1e-14)


@given(bits=WIDTHS, seed=SEEDS, symmetric=st.booleans())
def test_group_of_a_whole_row_equals_channel(bits: float, seed: int, symmetric: bool) -> None:
    grid, x = Grid(bits, symmetric), random_tensor(seed)
    whole_row = BlockLayout(Granularity.GROUP, group_size=24)
    values = []
    for layout in (ROWS, whole_row):
        qparams = choose_qparams(x, grid, layout, RangeMethod.MIN_MAX)
        values.append((quantize(x, qparams, grid, layout), fake_quantize(x, qparams, grid, layout)))
    assert torch.equal(values[0][0], values[1][0])
    assert torch.equal(values[0][1], values[1][1])


# --- gradient


@each_layout
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradient_is_the_clip_mask_of_torch(
    layout: BlockLayout, shape: tuple[int, ...], bits: int, to_rows: Callable
) -> None:
    x = (2.0**bits * random_tensor(11, shape)).requires_grad_()
    incoming = random_tensor(12, shape)
    qparams = power_of_two_qparams(13, layout.scale_shape(shape))
    fake_quantize(x, qparams, Grid(bits), layout).backward(incoming)

    rows = to_rows(x.detach(), layout).clone().requires_grad_()
    zero_point = torch.zeros(len(rows), dtype=torch.int32)
    torch.fake_quantize_per_channel_affine(
        rows, qparams.scale.flatten(), zero_point, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ).backward(to_rows(incoming, layout))
    assert torch.equal(to_rows(x.grad, layout), rows.grad)
    assert 0 < torch.count_nonzero(x.grad) < x.numel()


@given(bits=WIDTHS, seed=SEEDS, symmetric=st.booleans())
def test_gradient_is_the_incoming_one_exactly_where_the_rounded_code_is_inside(
    bits: float, seed: int, symmetric: bool
) -> None:
    grid = Grid(bits, symmetric)
    x = random_tensor(seed, dtype=torch.float64).requires_grad_()
    incoming = random_tensor(seed + 1, dtype=torch.float64)
    qparams = choose_qparams(0.7 * x.detach(), grid, ROWS, RangeMethod.MIN_MAX)
    fake_quantize(x, qparams, grid, ROWS).backward(incoming)
    offset = 0.0 if qparams.offset is None else qparams.offset.numpy()
    rounded = np.rint((x.detach().numpy() - offset) / qparams.scale.numpy())
    is_inside = (grid.qmin <= rounded) & (rounded <= grid.qmax)
    np.testing.assert_array_equal(x.grad.numpy(), np.where(is_inside, incoming.numpy(), 0.0))


def test_gradient_at_the_edge_counts_the_rounded_code() -> None:
    x = torch.tensor([[7.4, 7.6, -8.4, -8.6, 7.0, -8.0]], requires_grad=True)
    fake_quantize(x, QParams(torch.ones(1, 1)), Grid(4), ROWS).sum().backward()
    assert x.grad.tolist() == [[1, 0, 1, 0, 1, 1]]


def test_no_gradient_flows_through_the_scale() -> None:
    x = random_tensor(3).requires_grad_()
    qparams = choose_qparams(x, Grid(4), ROWS, RangeMethod.MAX_ABS)
    fake_quantize(x, qparams, Grid(4), ROWS).sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}

    scale = torch.full((1, 1), 0.1, requires_grad=True)
    value = fake_quantize(x.detach().requires_grad_(), QParams(scale), Grid(4), ROWS)
    value.sum().backward()
    assert scale.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@each_layout
def test_dtype_and_shape_are_kept_forward_and_backward(
    layout: BlockLayout, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = random_tensor(5, shape, dtype).requires_grad_()
    before = x.detach().clone()
    qparams = choose_qparams(x.detach(), Grid(4), layout, RangeMethod.MAX_ABS)
    value = fake_quantize(x, qparams, Grid(4), layout)
    value.sum().backward()
    assert (value.dtype, value.shape, x.grad.dtype, x.grad.shape) == (dtype, x.shape, dtype, x.shape)
    assert qparams.scale.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert torch.equal(x.detach(), before)


@given(bits=st.floats(1, 16, exclude_min=True), seed=SEEDS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_computed_in_float32_and_rounded_once(bits: float, seed: int, dtype: torch.dtype) -> None:
    grid, x = Grid(bits), random_tensor(seed, dtype=dtype)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS)
    wide = choose_qparams(x.float(), grid, ROWS, RangeMethod.MAX_ABS)
    assert torch.equal(qparams.scale, wide.scale)
    expected = fake_quantize(x.float(), wide, grid, ROWS).to(dtype)
    assert torch.equal(fake_quantize(x, qparams, grid, ROWS), expected)


def test_memory_layout_does_not_matter() -> None:
    x = random_tensor(6, (8, 6)).t()
    assert not x.is_contiguous()
    for layout in (ROWS, BlockLayout(Granularity.GROUP, group_size=4)):
        qparams = choose_qparams(x, Grid(4), layout, RangeMethod.MAX_ABS)
        contiguous = choose_qparams(x.contiguous(), Grid(4), layout, RangeMethod.MAX_ABS)
        assert torch.equal(qparams.scale, contiguous.scale)
        value = fake_quantize(x, qparams, Grid(4), layout)
        assert torch.equal(value, fake_quantize(x.contiguous(), contiguous, Grid(4), layout))


# --- wide grids


@given(bits=st.floats(24, 32, exclude_min=True), seed=SEEDS, narrow=st.booleans())
def test_codes_above_24_bits_are_exact_for_float32_values(bits: float, seed: int, narrow: bool) -> None:
    grid, x = Grid(bits, narrow=narrow), random_tensor(seed)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS)
    assert qparams.scale.dtype is torch.float64
    codes = quantize(x, qparams, grid, ROWS)
    scales = qparams.scale.flatten().tolist()
    qmin, qmax = -math.floor(2 ** (bits - 1)) + narrow, math.floor(2 ** (bits - 1)) - 1
    expected = [[exact_code(v, s, qmin, qmax) for v in row] for row, s in zip(x.tolist(), scales, strict=True)]
    assert codes.tolist() == expected
    assert max(abs(code) for row in expected for code in row) >= 2**23 - 1

    decoded = dequantize(codes, qparams, ROWS, torch.float64)
    exact = [[float(Fraction(s) * code) for code in row] for row, s in zip(expected, scales, strict=True)]
    assert decoded.tolist() == exact
    assert torch.equal(fake_quantize(x, qparams, grid, ROWS), decoded.float())


def test_thirty_two_bit_codes_reach_odd_numbers_beyond_float32() -> None:
    """2^24 + 1 and its like do not exist in float32."""
    x = torch.tensor([[float(2**24 + 1), float(-(2**30) - 3), float(2**31 - 1)]], dtype=torch.float64)
    codes = quantize(x, QParams(torch.ones(1, 1)), Grid(32), ROWS)
    assert codes.tolist() == [[2**24 + 1, -(2**30) - 3, 2**31 - 1]]
    assert codes.dtype is torch.int32
    unsigned = quantize(
        torch.tensor([[2.0**32]], dtype=torch.float64), QParams(torch.ones(1, 1)), Grid(32, False), ROWS
    )
    assert unsigned.tolist() == [[2**32 - 1]]


@given(bits=st.floats(1, 20, exclude_min=True), seed=SEEDS)
def test_float32_codes_are_exact_away_from_ties(bits: float, seed: int) -> None:
    grid, x = Grid(bits), random_tensor(seed)
    qparams = choose_qparams(x, grid, TENSOR, RangeMethod.MAX_ABS)
    step = float(qparams.scale)
    codes = quantize(x, qparams, grid, TENSOR)
    for value, code in zip(x.flatten().tolist(), codes.flatten().tolist(), strict=True):
        quotient = Fraction(value) / Fraction(step)
        if abs(abs(quotient) % 1 - Fraction(1, 2)) > 0.05:
            assert code == exact_code(value, step, grid.qmin, grid.qmax)


# --- scale dtype


@given(bits=WIDTHS, seed=SEEDS, symmetric=st.booleans(), integer_zero_point=st.booleans())
def test_rounded_scale_is_exact_in_bfloat16(bits: float, seed: int, symmetric: bool, integer_zero_point: bool) -> None:
    grid, x = Grid(bits, symmetric), random_tensor(seed)
    settings = {"integer_zero_point": integer_zero_point}
    rounded = choose_qparams(x, grid, ROWS, RangeMethod.MIN_MAX, scale_dtype=torch.bfloat16, **settings).scale
    plain = choose_qparams(x, grid, ROWS, RangeMethod.MIN_MAX, **settings).scale
    assert rounded.dtype is plain.dtype
    assert torch.equal(rounded, rounded.bfloat16().to(rounded.dtype))
    assert torch.all((rounded / plain - 1).abs() <= 2**-8)
    assert not torch.equal(rounded, plain)


def test_smallest_scale_is_exact_in_bfloat16() -> None:
    qparams = choose_qparams(torch.zeros(2, 3), Grid(4), ROWS, RangeMethod.MAX_ABS, scale_dtype=torch.bfloat16)
    assert torch.equal(qparams.scale, qparams.scale.bfloat16().float())
    assert torch.all(qparams.scale > 0)


# --- NaN and infinity


def test_quantize_refuses_nan() -> None:
    x = torch.tensor([[1.0, math.nan]])
    with pytest.raises(ConfigError, match=r"tensor = 'nan' is not possible: allowed is numbers and infinities"):
        quantize(x, QParams(torch.ones(1, 1)), Grid(4), ROWS)


@pytest.mark.parametrize("symmetric", [True, False])
def test_infinity_saturates_with_a_fixed_scale(symmetric: bool) -> None:
    grid = Grid(4, symmetric)
    x = torch.tensor([[math.inf, -math.inf, 2.0]], requires_grad=True)
    qparams = QParams(torch.ones(1, 1), zero_point=None if symmetric else torch.full((1, 1), 5.0))
    zero_point = 0 if symmetric else 5
    expected = [[grid.qmax - zero_point, grid.qmin - zero_point, 2]]
    value = fake_quantize(x, qparams, grid, ROWS)
    value.sum().backward()
    assert value.tolist() == expected
    assert quantize(x, qparams, grid, ROWS).tolist() == [[grid.qmax, grid.qmin, 2 + zero_point]]
    assert x.grad.tolist() == [[0, 0, 1]]


def test_nan_with_a_fixed_scale_gives_nan_there_only() -> None:
    x = torch.tensor([[math.nan, 1.0, 2.0]], requires_grad=True)
    value = fake_quantize(x, QParams(torch.ones(1, 1)), Grid(4), ROWS)
    value.sum().backward()
    assert torch.isnan(value).tolist() == [[True, False, False]]
    assert value[0, 1:].tolist() == [1, 2]
    assert x.grad.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("integer_zero_point", [True, False])
@pytest.mark.parametrize("method", [RangeMethod.MAX_ABS, RangeMethod.MIN_MAX, RangeMethod.THREE_SIGMA])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_value_poisons_its_own_block_when_the_scale_is_measured(
    symmetric: bool, integer_zero_point: bool, method: RangeMethod, bad: float
) -> None:
    grid, x = Grid(4, symmetric), random_tensor(2)
    clean = fake_quantize(x, choose_qparams(x, grid, ROWS, method), grid, ROWS)
    x[2, 5] = bad
    qparams = choose_qparams(x, grid, ROWS, method, integer_zero_point=integer_zero_point)
    value = fake_quantize(x, qparams, grid, ROWS)
    assert torch.isnan(value[2]).all()
    assert torch.isfinite(value[[0, 1, 3]]).all()
    if not integer_zero_point:
        assert torch.equal(value[[0, 1, 3]], clean[[0, 1, 3]])


@given(bits=st.floats(2, 16), seed=SEEDS, factor=st.sampled_from([0.25, 0.5, 2.0, 64.0]))
def test_fake_quantize_commutes_with_powers_of_two(bits: float, seed: int, factor: float) -> None:
    grid, x = Grid(bits), random_tensor(seed)
    plain = fake_quantize(x, choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS), grid, ROWS)
    scaled = fake_quantize(factor * x, choose_qparams(factor * x, grid, ROWS, RangeMethod.MAX_ABS), grid, ROWS)
    assert torch.equal(scaled, factor * plain)


@given(bits=st.floats(2, 16), seed=SEEDS)
def test_narrow_grid_commutes_with_the_sign(bits: float, seed: int) -> None:
    grid, x = Grid(bits, narrow=True), random_tensor(seed)
    qparams = choose_qparams(x, grid, ROWS, RangeMethod.MAX_ABS)
    assert torch.equal(fake_quantize(-x, qparams, grid, ROWS), -fake_quantize(x, qparams, grid, ROWS))


@given(low=st.floats(2, 16), high=st.floats(2, 16), seed=SEEDS)
def test_wider_grid_has_a_smaller_step(low: float, high: float, seed: int) -> None:
    assume(low < high)
    x = random_tensor(seed)
    coarse, fine = (choose_qparams(x, Grid(b), ROWS, RangeMethod.MAX_ABS).scale for b in (low, high))
    assert torch.all(fine <= coarse)


@given(
    bits=st.integers(2, 16),
    seed=st.integers(0, 10_000),
    exponent=st.integers(-120, 30),
    layout=st.sampled_from([BlockLayout(Granularity.TENSOR), BlockLayout(Granularity.TOKEN)]),
)
def test_a_scale_that_covers_every_value_clips_none(bits: int, seed: int, exponent: int, layout: BlockLayout) -> None:
    grid = Grid(bits)
    assert covers_every_value(grid, RangeMethod.MAX_ABS)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(8, 16, generator=generator) * 2.0**exponent).requires_grad_(True)
    qparams = choose_qparams(x.detach(), grid, layout, RangeMethod.MAX_ABS)
    clipped = fake_quantize(x, qparams, grid, layout)
    free = fake_quantize(x, qparams, grid, layout, can_clip=False)
    assert torch.equal(clipped, free)
    weight = torch.randn(8, 16, generator=generator)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (clipped, free)]
    assert torch.equal(gradients[0], gradients[1])


def test_other_scales_may_clip() -> None:
    assert not covers_every_value(Grid(5.5), RangeMethod.MAX_ABS)
    assert not covers_every_value(Grid(8), RangeMethod.MSE)
    assert not covers_every_value(Grid(8), RangeMethod.MAX_ABS, scale_dtype=torch.bfloat16)
    assert not covers_every_value(Grid(8, symmetric=False), RangeMethod.MIN_MAX)
