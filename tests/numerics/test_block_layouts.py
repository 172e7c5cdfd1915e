"""Laws of granularity: tensor shape <-> scale shape."""

import pytest
import torch

from fraqat.errors import ConfigError
from fraqat.numerics import BlockLayout, Granularity, Grid, RangeMethod, choose_qparams, estimate_range, quantize

CASES = [
    (BlockLayout(Granularity.TENSOR), (6, 8), (1, 1)),
    (BlockLayout(Granularity.TENSOR), (2, 3, 4, 5), (1, 1, 1, 1)),
    (BlockLayout(Granularity.CHANNEL), (6, 8), (6, 1)),
    (BlockLayout(Granularity.CHANNEL), (6, 8, 1, 1), (6, 1, 1, 1)),
    (BlockLayout(Granularity.GROUP, group_size=4), (6, 8), (6, 2, 1)),
    (BlockLayout(Granularity.GROUP, group_size=2), (6, 8, 1, 1), (6, 4, 1)),
    (BlockLayout(Granularity.GROUP, group_size=8), (6, 8), (6, 1, 1)),
    (BlockLayout(Granularity.GROUP, group_size=1), (6, 8), (6, 8, 1)),
    (BlockLayout(Granularity.SAMPLE), (3, 4, 8), (3, 1, 1)),
    (BlockLayout(Granularity.SAMPLE), (3, 8, 2, 5), (3, 1, 1, 1)),
    (BlockLayout(Granularity.TOKEN), (8,), (1,)),
    (BlockLayout(Granularity.TOKEN), (3, 8), (3, 1)),
    (BlockLayout(Granularity.TOKEN), (3, 4, 8), (3, 4, 1)),
    (BlockLayout(Granularity.TOKEN, channel_axis=1), (3, 8, 2, 5), (3, 1, 2, 5)),
]


@pytest.mark.parametrize(("layout", "shape", "expected"), CASES)
def test_scale_has_the_shape_of_the_table(
    layout: BlockLayout, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    assert layout.scale_shape(shape) == expected
    assert tuple(estimate_range(x, layout, RangeMethod.MAX_ABS)[0].shape) == expected
    torch.broadcast_shapes(expected, layout.split(x).shape)


@pytest.mark.parametrize(("layout", "shape", "expected"), CASES)
def test_join_undoes_split(layout: BlockLayout, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(layout.join(layout.split(x), shape), x)


def test_groups_are_neighbours_in_one_row() -> None:
    x = torch.tensor([[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 70.0, 80.0]])
    high = estimate_range(x, BlockLayout(Granularity.GROUP, group_size=2), RangeMethod.MAX_ABS)[1]
    assert high.squeeze(-1).tolist() == [[2, 40], [6, 80]]


def test_token_of_an_image_is_one_pixel() -> None:
    x = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    high = estimate_range(x, BlockLayout(Granularity.TOKEN, channel_axis=1), RangeMethod.MAX_ABS)[1]
    assert high[:, 0].tolist() == [[[8, 9], [10, 11]], [[20, 21], [22, 23]]]


def test_scale_of_one_block_does_not_depend_on_the_others() -> None:
    x = torch.randn(4, 8)
    loud = x.clone()
    loud[2] *= 1000
    layout = BlockLayout(Granularity.TOKEN)
    scales = [choose_qparams(v, Grid(8), layout, RangeMethod.MAX_ABS).scale for v in (x, loud)]
    assert torch.equal(scales[0][[0, 1, 3]], scales[1][[0, 1, 3]])
    assert scales[1][2] > 500 * scales[0][2]


@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 1, 1)])
def test_group_that_does_not_divide_the_width_is_refused(shape: tuple[int, ...]) -> None:
    layout, x = BlockLayout(Granularity.GROUP, group_size=4), torch.randn(shape)
    with pytest.raises(ConfigError) as caught:
        quantize(x, choose_qparams(x, Grid(4), layout, RangeMethod.MAX_ABS), Grid(4), layout)
    assert str(caught.value) == (
        "group_size = 4 is not possible: allowed is a divisor of the layer's input width 10. "
        "Fix: choose one of [10] or granularity: channel."
    )


def test_refused_group_size_names_the_usual_divisors() -> None:
    with pytest.raises(ConfigError, match=r"choose one of \[16, 32\] or granularity: channel"):
        BlockLayout(Granularity.GROUP, group_size=128).split(torch.randn(2, 96))


def test_granularity_may_be_given_by_its_name() -> None:
    assert BlockLayout("group", 4) == BlockLayout(Granularity.GROUP, 4)
    with pytest.raises(ValueError, match="'row' is not a valid Granularity"):
        BlockLayout("row")


@pytest.mark.parametrize("group_size", [None, 0, -32])
def test_group_needs_a_positive_size(group_size: int | None) -> None:
    with pytest.raises(ConfigError, match=rf"group_size = {group_size} .* a positive integer.* Fix: set group_size"):
        BlockLayout(Granularity.GROUP, group_size=group_size)


@pytest.mark.parametrize("granularity", [g for g in Granularity if g is not Granularity.GROUP])
def test_group_size_without_group_is_refused(granularity: Granularity) -> None:
    with pytest.raises(
        ConfigError, match=r"group_size = 32 .* None unless granularity is 'group'.* granularity: group"
    ):
        BlockLayout(granularity, group_size=32)
