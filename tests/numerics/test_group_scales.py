"""Laws of integer group scales: code * multiplier fits in int8, and little is lost against float scales."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fraqat.numerics import (
    MIN_SCALE,
    BlockLayout,
    Granularity,
    Grid,
    GroupScales,
    QParams,
    RangeMethod,
    choose_qparams,
    fake_quantize,
    integer_group_scales,
    largest_multiplier,
    quantize,
)

WIDTHS = st.floats(1, 8, exclude_min=True)
SEEDS = st.integers(0, 10_000)
GROUP = 8
LAYOUT = BlockLayout(Granularity.GROUP, group_size=GROUP)
ROWS = BlockLayout(Granularity.CHANNEL)


def heavy_tailed(seed: int, shape: tuple[int, ...] = (6, 64)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3


def choose(
    weight: Tensor, grid: Grid, layout: BlockLayout = LAYOUT, method: str = "max_abs"
) -> tuple[GroupScales, Tensor]:
    """The integer scales of a weight and the float ones that they follow."""
    wanted = choose_qparams(weight, grid, layout, RangeMethod(method)).scale
    return integer_group_scales(weight, wanted, grid, layout), wanted


@pytest.mark.parametrize(
    ("bits", "multiplier"),
    [
        (2, 64),
        (3, 32),
        (4, 16),
        (4.5, 11),
        (5, 8),
        (5.5, 5),
        (6, 4),
        (7, 2),
        (7.5, 1),
        (8, 1),
        (8.5, 1),
        (16, 1),
        (32, 1),
    ],
)
def test_largest_multiplier_is_that_of_the_table(bits: float, multiplier: int) -> None:
    assert largest_multiplier(Grid(bits)) == multiplier


@given(bits=WIDTHS, narrow=st.booleans())
def test_largest_multiplier_is_the_largest_that_keeps_int8(bits: float, narrow: bool) -> None:
    grid = Grid(bits, narrow=narrow and bits >= 2)
    largest = int(largest_multiplier(grid))
    assert -128 <= grid.qmin * largest <= grid.qmax * largest <= 127
    assert grid.qmin * (largest + 1) < -128 or max(grid.qmax, 1) * (largest + 1) > 127


@given(bits=WIDTHS, seed=SEEDS, method=st.sampled_from(["max_abs", "mse", "three_sigma"]))
def test_code_times_multiplier_fits_in_int8(bits: float, seed: int, method: str) -> None:
    grid, weight = Grid(bits), heavy_tailed(seed, (3, 32))
    scales, _ = choose(weight, grid, method=method)
    assert torch.equal(scales.multiplier, scales.multiplier.round())
    assert scales.multiplier.min() >= 1
    assert scales.multiplier.max() <= largest_multiplier(grid)
    codes = quantize(weight, QParams(scales.product), grid, LAYOUT)
    integers = LAYOUT.split(codes) * scales.multiplier
    assert integers.min() >= -128
    assert integers.max() <= 127
    value = fake_quantize(weight, QParams(scales.product), grid, LAYOUT)
    torch.testing.assert_close((integers * scales.channel).reshape(weight.shape), value, rtol=1e-6, atol=0)


@given(bits=WIDTHS, seed=SEEDS, method=st.sampled_from(["max_abs", "mse"]))
def test_multiplier_is_the_better_neighbour_and_the_largest_group_keeps_its_scale(
    bits: float, seed: int, method: str
) -> None:
    grid, weight = Grid(bits), heavy_tailed(seed)
    scales, wanted = choose(weight, grid, method=method)
    largest = largest_multiplier(grid)
    torch.testing.assert_close(scales.product.amax(dim=1), wanted.amax(dim=1), rtol=3e-7, atol=0)
    ratio = (wanted.double() / scales.channel.double()).clamp(1, float(largest))
    assert torch.all((scales.multiplier - ratio).abs() < 1 + 1e-5)

    def errors(multiplier: Tensor) -> Tensor:
        value = fake_quantize(weight, QParams(scales.channel * multiplier.float()), grid, LAYOUT)
        return LAYOUT.split((value - weight).square()).sum(dim=-1, keepdim=True)

    chosen = errors(scales.multiplier)
    is_between = (ratio - ratio.round()).abs() > 1e-5
    for neighbour in (ratio.floor(), ratio.ceil()):
        assert torch.all((chosen <= errors(neighbour))[is_between])


@given(bits=WIDTHS, seed=SEEDS)
def test_fake_quantize_with_integer_scales_is_idempotent_and_half_a_step_off(bits: float, seed: int) -> None:
    grid, weight = Grid(bits), heavy_tailed(seed)
    qparams = QParams(choose(weight, grid)[0].product)
    once = fake_quantize(weight, qparams, grid, LAYOUT)
    assert torch.equal(fake_quantize(once, qparams, grid, LAYOUT), once)
    blocks, scale = LAYOUT.split(weight), qparams.scale
    is_inside = ((grid.qmin - 0.5) * scale <= blocks) & (blocks <= (grid.qmax + 0.5) * scale)
    off = (LAYOUT.split(once) - blocks).abs()
    assert torch.all((off <= scale / 2 + 1e-6 * blocks.abs().amax())[is_inside])


@given(bits=WIDTHS, seed=SEEDS)
def test_group_of_a_whole_row_equals_channel_to_the_last_digit(bits: float, seed: int) -> None:
    """The channel's scale is divided by M and multiplied again: one unit in the last place, none where M is a power of two."""
    grid, weight = Grid(bits), heavy_tailed(seed)
    scales, _ = choose(weight, grid, BlockLayout(Granularity.GROUP, group_size=64))
    channel = choose_qparams(weight, grid, ROWS, RangeMethod.MAX_ABS).scale
    product = scales.product.squeeze(-1)
    torch.testing.assert_close(product, channel, rtol=2**-22, atol=0)
    if bits in (2, 3, 4, 5, 6, 7, 8):
        assert torch.equal(product, channel)


@pytest.mark.parametrize("bits", [8, 12, 24, 30])
def test_from_8_bits_groups_equal_channel_bitwise(bits: float) -> None:
    grid, weight = Grid(bits), heavy_tailed(3)
    scales, _ = choose(weight, grid)
    channel = choose_qparams(weight, grid, ROWS, RangeMethod.MAX_ABS)
    assert torch.equal(scales.product.amax(dim=1), channel.scale)
    assert torch.equal(
        fake_quantize(weight, QParams(scales.product), grid, LAYOUT), fake_quantize(weight, channel, grid, ROWS)
    )


def test_known_scales() -> None:
    """Wanted 16, 7.4, 0.4 and 0 steps of the channel's scale; a group on the codes of a multiplier has no error with it."""
    layout = BlockLayout(Granularity.GROUP, group_size=2)
    weight = torch.tensor([[112.0, 0.0, 7.0, 49.0, 8.0, 24.0, 2.8, 0.6, 0.0, 0.0]])
    wanted = torch.tensor([16.0, 7.4, 7.4, 0.4, 0.0]).view(1, 5, 1)
    scales = integer_group_scales(weight, wanted, Grid(4), layout)
    assert scales.channel.tolist() == [[[1.0]]]
    assert scales.multiplier.flatten().tolist() == [16, 7, 8, 1, 1]


def test_zero_groups_and_zero_rows_stay_zero() -> None:
    weight = heavy_tailed(1)
    weight[0], weight[1, :GROUP] = 0, 0
    scales, _ = choose(weight, Grid(4))
    assert scales.channel[0] == MIN_SCALE
    value = fake_quantize(weight, QParams(scales.product), Grid(4), LAYOUT)
    assert torch.isfinite(value).all()
    assert torch.count_nonzero(value[0]) == torch.count_nonzero(value[1, :GROUP]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_group_that_is_not_finite_spoils_its_channel_alone(bad: float) -> None:
    weight = heavy_tailed(2)
    weight[2, 5] = bad
    scales, _ = choose(weight, Grid(4))
    assert torch.isfinite(scales.product).flatten(1).all(dim=1).tolist() == [True, True, False, True, True, True]


def test_rounded_channel_scale_is_exact_in_bfloat16_and_keeps_the_multipliers() -> None:
    weight = heavy_tailed(4)
    wanted = choose_qparams(weight, Grid(4), LAYOUT, RangeMethod.MAX_ABS).scale
    scales = integer_group_scales(weight, wanted, Grid(4), LAYOUT, scale_dtype=torch.bfloat16)
    assert torch.equal(scales.channel, scales.channel.bfloat16().float())
    torch.testing.assert_close(scales.channel * 16, wanted.amax(dim=1, keepdim=True), rtol=2**-8, atol=0)
    assert torch.all((scales.multiplier >= 1) & (scales.multiplier <= 16))


@pytest.mark.parametrize(
    ("method", "bits", "limit_db"), [("max_abs", 4, 0.0), ("mse", 4, 0.25), ("max_abs", 6, 1.3), ("mse", 6, 1.75)]
)
def test_little_is_lost_on_gaussian_weights(method: str, bits: float, limit_db: float, sqnr_db: Callable) -> None:
    weight, grid, layout = torch.randn(64, 1024), Grid(bits), BlockLayout(Granularity.GROUP, group_size=32)
    scales, wanted = choose(weight, grid, layout, method)
    by_integers = sqnr_db(weight, fake_quantize(weight, QParams(scales.product), grid, layout))
    by_floats = sqnr_db(weight, fake_quantize(weight, QParams(wanted), grid, layout))
    channel = choose_qparams(weight, grid, ROWS, RangeMethod(method))
    assert by_integers > by_floats - limit_db
    assert by_integers > sqnr_db(weight, fake_quantize(weight, channel, grid, ROWS)) + 1.5
