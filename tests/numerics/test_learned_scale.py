"""Laws of LSQ's gradients, against torch's own differentiation of s * clamp(round(x / s)) with rounding passed through."""

import math

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
    QParams,
    RangeMethod,
    choose_qparams,
    fake_quantize,
    fake_quantize_learned,
    learned_scale_gradients,
)

WIDTHS = st.floats(1, 16, exclude_min=True)
SEEDS = st.integers(0, 10_000)
LAYOUTS = {
    "tensor": (BlockLayout(Granularity.TENSOR), (6, 8), 48),
    "channel": (BlockLayout(Granularity.CHANNEL), (6, 8), 8),
    "channel of a convolution": (BlockLayout(Granularity.CHANNEL), (6, 8, 1, 1), 8),
    "group": (BlockLayout(Granularity.GROUP, group_size=4), (6, 8), 4),
    "group of a convolution": (BlockLayout(Granularity.GROUP, group_size=4), (6, 8, 1, 1), 4),
}
each_layout = pytest.mark.parametrize(("layout", "shape", "num_elements"), LAYOUTS.values(), ids=LAYOUTS.keys())
ROWS = BlockLayout(Granularity.CHANNEL)


def random_tensor(seed: int, shape: tuple[int, ...] = (4, 24), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def clipping_scale(x: Tensor, grid: Grid, layout: BlockLayout) -> Tensor:
    """A scale that clips the largest values."""
    return 0.6 * choose_qparams(x, Grid(max(grid.bits, 2)), layout, RangeMethod.MAX_ABS).scale


def differentiate(x: Tensor, scale: Tensor, incoming: Tensor, grid: Grid, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Gradients of s * clamp(round(x / s)) by torch, where the derivative of round is 1."""
    x, scale = x.double().requires_grad_(), scale.double().requires_grad_()
    steps = layout.split(x) / scale
    rounded = steps + (torch.round(steps) - steps).detach()
    value = torch.clamp(rounded, grid.qmin, grid.qmax) * scale
    layout.join(value, tuple(x.shape)).backward(incoming.double())
    assert x.grad is not None
    assert scale.grad is not None
    return x.grad, scale.grad


@each_layout
@given(bits=WIDTHS, seed=SEEDS)
def test_gradients_are_those_of_the_rounded_formula_times_the_papers_factor(
    layout: BlockLayout, shape: tuple[int, ...], num_elements: int, bits: float, seed: int
) -> None:
    grid = Grid(bits)
    x = random_tensor(seed, shape, torch.float64).requires_grad_()
    incoming = random_tensor(seed + 1, shape, torch.float64)
    scale = clipping_scale(x.detach(), grid, layout).requires_grad_()
    fake_quantize_learned(x, scale, grid, layout).backward(incoming)
    grad, grad_scale = differentiate(x.detach(), scale.detach(), incoming, grid, layout)
    torch.testing.assert_close(x.grad, grad, rtol=1e-14, atol=0)
    factor = 1 / math.sqrt(num_elements * max(grid.qmax, 1))
    torch.testing.assert_close(scale.grad, grad_scale * factor, rtol=1e-9, atol=1e-12)


def test_known_gradient_at_every_kind_of_place() -> None:
    """Inside, at both edges after rounding, and clipped on both sides; N = 6 and qmax = 7."""
    x = torch.tensor([[2.25, 7.4, -8.4, 9.0, -11.0, 0.0]], requires_grad=True)
    scale = torch.ones(1, 1, requires_grad=True)
    incoming = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0, 5.0]])
    fake_quantize_learned(x, scale, Grid(4), ROWS).backward(incoming)
    assert x.grad.tolist() == [[1, 10, 100, 0, 0, 5]]
    terms = [-0.25 * 1, -0.4 * 10, 0.4 * 100, 7 * 1000, -8 * 10000]
    assert scale.grad.item() == pytest.approx(sum(terms) / math.sqrt(6 * 7), rel=1e-6)


@given(bits=st.floats(1, 32, exclude_min=True), seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_values_are_those_of_fake_quantize(bits: float, seed: int, dtype: torch.dtype) -> None:
    grid, x = Grid(bits), random_tensor(seed, dtype=dtype)
    scale = clipping_scale(x, grid, ROWS).float()
    value = fake_quantize_learned(x, scale, grid, ROWS)
    assert torch.equal(value, fake_quantize(x, QParams(scale), grid, ROWS))
    assert torch.equal(fake_quantize_learned(value, scale, grid, ROWS), value) or bits > 20


@given(bits=WIDTHS, seed=SEEDS, parts=st.integers(2, 5))
def test_gradient_of_the_sum_is_the_sum_of_the_gradients(bits: float, seed: int, parts: int) -> None:
    grid, x = Grid(bits), random_tensor(seed)
    qparams = QParams(clipping_scale(x, grid, ROWS))
    grads = [random_tensor(seed + 1 + part) for part in range(parts)]
    separate = [learned_scale_gradients(g, x, qparams, grid, ROWS) for g in grads]
    together = learned_scale_gradients(torch.stack(grads).sum(0), x, qparams, grid, ROWS)
    for index in (0, 1):
        expected = torch.stack([pair[index] for pair in separate]).sum(0)
        torch.testing.assert_close(together[index], expected, rtol=1e-5, atol=2e-5)


def test_descent_finds_the_scale_of_least_squared_error() -> None:
    """On |x - q(x)|^2 the gradient is that of a smooth function nearly everywhere, so descent must end beside its minimum."""
    x, grid = random_tensor(1, (1, 4096)), Grid(3)
    best = choose_qparams(x, grid, ROWS, RangeMethod.MSE).scale
    scale = (2 * best).requires_grad_()
    for _ in range(300):
        scale.grad = None
        (fake_quantize_learned(x, scale, grid, ROWS) - x).square().mean().backward()
        with torch.no_grad():
            scale -= 5 * scale.grad
    torch.testing.assert_close(scale.detach(), best, rtol=0.05, atol=0)


def test_scale_below_the_bound_is_used_as_the_bound_and_can_rise() -> None:
    x = torch.tensor([[1.0, -1.0]])
    scale = torch.tensor([[-0.5]], requires_grad=True)
    value = fake_quantize_learned(x, scale, Grid(4), ROWS)
    assert value.tolist() == [[7 * MIN_SCALE, -8 * MIN_SCALE]]
    (value - x).square().sum().backward()
    assert scale.grad.item() < 0  # descent raises it


def test_rounded_scale_is_used_and_the_gradient_passes_the_rounding() -> None:
    x, scale = random_tensor(3), torch.full((4, 1), 0.2003, requires_grad=True)
    rounded = scale.detach().bfloat16().float()
    value = fake_quantize_learned(x, scale, Grid(4), ROWS, scale_dtype=torch.bfloat16)
    assert torch.equal(value, fake_quantize(x, QParams(rounded), Grid(4), ROWS))
    value.backward(torch.ones_like(x))
    expected = learned_scale_gradients(torch.ones_like(x), x, QParams(rounded), Grid(4), ROWS)[1]
    assert torch.equal(scale.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_kept_forward_and_backward(dtype: torch.dtype) -> None:
    x = random_tensor(5, dtype=dtype).requires_grad_()
    scale = torch.full((4, 1), 0.2, requires_grad=True)
    value = fake_quantize_learned(x, scale, Grid(4), ROWS)
    value.sum().backward()
    assert (value.dtype, x.grad.dtype, scale.grad.dtype) == (dtype, dtype, torch.float32)
    assert (value.shape, x.grad.shape, scale.grad.shape) == (x.shape, x.shape, scale.shape)


def test_gradient_of_clipped_values_passes_where_the_mask_is_left_to_the_caller() -> None:
    x = torch.tensor([[7.4, 7.6, -8.4, -8.6]], requires_grad=True)
    incoming = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    value = fake_quantize(x, QParams(torch.ones(1, 1)), Grid(4), ROWS, masks_gradient=False)
    assert value.tolist() == [[7, 7, -8, -8]]
    value.backward(incoming)
    assert torch.equal(x.grad, incoming)
