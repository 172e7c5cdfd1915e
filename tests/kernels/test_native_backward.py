"""The native gradient products equal float64's of the operands rounded to bfloat16; small integers give them exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fraqat.kernels.native import Native, input_gradient, weight_gradient

SIZE = st.integers(1, 100)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SEED = st.integers(0, 2**31)
THREADS = st.sampled_from([1, 2])
# Cut rows, cut sums, sums in several passes, odd ends, results that are streamed.
LARGE = pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1000, 320, 1100), (70, 97, 3500), (3500, 64, 97), (1601, 33, 650)]
)


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    if reason := Native().why_unavailable(torch.device("cpu")):
        pytest.skip(reason)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def exact_input_gradient(grad_MO: Tensor, scale_O: Tensor, codes_OK: Tensor) -> Tensor:
    return rounded(grad_MO * scale_O) @ codes_OK.double()


def exact_weight_gradient(grad_MO: Tensor, token_scale: Tensor, codes_MK: Tensor, zero_point: int) -> Tensor:
    return rounded(grad_MO * token_scale.unsqueeze(-1)).t() @ (codes_MK.double() - zero_point)


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """Within float32's rounding of the sum, and that of the result."""
    tolerance = 1e-5 if ours.dtype == torch.float32 else 4e-3
    assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def random_codes(*shape: int, unsigned: bool = False) -> Tensor:
    if unsigned:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def small_integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


@given(SIZE, SIZE, SIZE, FLOATS, FLOATS, THREADS, SEED)
def test_input_gradient_equals_the_exact_one(tokens, inputs, outputs, dtype, out_dtype, number, seed):
    torch.manual_seed(seed)
    grad, scale = torch.randn(tokens, outputs).to(dtype), torch.rand(outputs) + 1e-4
    codes = random_codes(outputs, inputs)
    with threads(number):
        ours = input_gradient(grad, scale, codes, out_dtype)
    assert ours.dtype == out_dtype
    assert_close(ours, exact_input_gradient(grad, scale, codes))


@given(SIZE, SIZE, SIZE, st.booleans(), st.booleans(), FLOATS, FLOATS, THREADS, SEED)
def test_weight_gradient_equals_the_exact_one(
    tokens, inputs, outputs, unsigned, shared, dtype, out_dtype, number, seed
):
    torch.manual_seed(seed)
    grad, scale = torch.randn(tokens, outputs).to(dtype), torch.rand(1 if shared else tokens) + 1e-4
    codes = random_codes(tokens, inputs, unsigned=unsigned)
    zero_point = int(torch.randint(0, 256, ())) - (0 if unsigned else 128)
    with threads(number):
        ours = weight_gradient(grad, scale, codes, zero_point, out_dtype)
    assert ours.dtype == out_dtype
    assert_close(ours, exact_weight_gradient(grad, scale, codes, zero_point))


@given(SIZE, SIZE, SIZE, st.integers(0, 255), FLOATS, THREADS, SEED)
def test_small_integers_give_exact_gradients(tokens, inputs, outputs, zero_point, dtype, number, seed):
    torch.manual_seed(seed)
    grad = small_integers(tokens, outputs, dtype=dtype)
    codes_OK, codes_MK = random_codes(outputs, inputs), random_codes(tokens, inputs, unsigned=True)
    scale_O, scale_M = 2.0 ** torch.randint(-3, 3, (outputs,)), 2.0 ** torch.randint(-3, 3, (tokens,))
    with threads(number):
        grad_MK = input_gradient(grad, scale_O, codes_OK, torch.float32)
        grad_OK = weight_gradient(grad, scale_M, codes_MK, zero_point)
    assert torch.equal(grad_MK.double(), exact_input_gradient(grad, scale_O, codes_OK))
    assert torch.equal(grad_OK.double(), exact_weight_gradient(grad, scale_M, codes_MK, zero_point))


@LARGE
@DTYPES
def test_gradients_are_exact_where_rows_and_sums_are_cut(tokens, inputs, outputs, dtype):
    grad = small_integers(tokens, outputs, dtype=dtype)
    codes_OK, codes_MK = random_codes(outputs, inputs) // 4, random_codes(tokens, inputs, unsigned=True) // 4
    one_O, one_M, bias = torch.ones(outputs), torch.ones(tokens), torch.empty(outputs)
    grad_OK = weight_gradient(grad, one_M, codes_MK, 17, bias_gradient_O=bias)
    assert torch.equal(
        input_gradient(grad, one_O, codes_OK, dtype), exact_input_gradient(grad, one_O, codes_OK).to(dtype)
    )
    assert torch.equal(grad_OK.double(), exact_weight_gradient(grad, one_M, codes_MK, 17))
    assert torch.equal(bias.double(), grad.double().sum(0))


@LARGE
def test_threads_change_nothing(tokens, inputs, outputs):
    grad, scale_O, scale_M = torch.randn(tokens, outputs), torch.rand(outputs), torch.rand(tokens)
    codes_OK, codes_MK = random_codes(outputs, inputs), random_codes(tokens, inputs)
    results: list[tuple[Tensor, ...]] = []
    for number in (1, 2, 3):
        with threads(number):
            bias = torch.empty(outputs)
            grad_OK = weight_gradient(grad, scale_M, codes_MK, bias_gradient_O=bias)
            results.append((input_gradient(grad, scale_O, codes_OK, torch.float32), grad_OK, bias))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@given(SIZE, SIZE, SIZE, FLOATS, SEED)
def test_a_gradient_is_added_to_what_is_there(tokens, inputs, outputs, dtype, seed):
    torch.manual_seed(seed)
    grad, scale, codes = torch.randn(tokens, outputs), torch.rand(1), random_codes(tokens, inputs)
    there = torch.randn(outputs, inputs).to(dtype)
    expected = (weight_gradient(grad, scale, codes) + there.float()).to(dtype)
    ours = weight_gradient(grad, scale, codes, accumulate_into=there)
    assert ours is there
    assert torch.equal(ours, expected)


@given(SIZE, SIZE, FLOATS, THREADS, SEED)
def test_bias_gradient_is_the_unscaled_sum(tokens, outputs, dtype, number, seed):
    torch.manual_seed(seed)
    grad, bias = torch.randn(tokens, outputs).to(dtype), torch.full((outputs,), float("nan"))
    with threads(number):
        weight_gradient(grad, torch.rand(tokens), random_codes(tokens, 40), bias_gradient_O=bias)
    assert torch.allclose(bias.double(), grad.double().sum(0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@DTYPES
def test_what_is_not_finite_stays_in_its_row(value, dtype):
    grad = torch.randn(70, 45, dtype=dtype)
    grad[50, 33] = value
    finite = input_gradient(grad, torch.ones(45), random_codes(45, 40), dtype).isfinite()
    assert not finite[50].any()
    assert finite.all(1).sum() == 69
    finite = weight_gradient(grad, torch.ones(70), random_codes(70, 40), 0, dtype).isfinite()
    assert not finite[33].any()
    assert finite.all(1).sum() == 44


def test_empty_sums_are_zero():
    assert input_gradient(torch.empty(3, 0), torch.empty(0), random_codes(0, 5), torch.float32).eq(0).all()
    assert input_gradient(torch.empty(0, 3), torch.ones(3), random_codes(3, 5), torch.bfloat16).shape == (0, 5)
    bias, there = torch.ones(4), torch.ones(4, 5)
    assert weight_gradient(torch.empty(0, 4), torch.ones(1), random_codes(0, 5), bias_gradient_O=bias).eq(0).all()
    assert bias.eq(0).all()
    assert weight_gradient(torch.empty(0, 4), torch.ones(1), random_codes(0, 5), accumulate_into=there).eq(1).all()


def test_other_layouts_are_refused():
    grad, codes = torch.randn(8, 6), random_codes(6, 5)
    with pytest.raises(AssertionError):
        input_gradient(grad.t().contiguous().t(), torch.ones(6), codes, torch.float32)
    with pytest.raises(AssertionError):
        input_gradient(grad, torch.ones(5), codes, torch.float32)
    with pytest.raises(AssertionError):
        weight_gradient(grad, torch.ones(8), random_codes(8, 5, unsigned=True), -1)
    with pytest.raises(AssertionError):
        weight_gradient(grad, torch.ones(8), random_codes(8, 5), accumulate_into=torch.empty(5, 6))


def test_torch_finds_the_tiles_as_it_left_them():
    grad, scale, codes = torch.randn(64, 256).bfloat16(), torch.ones(256), random_codes(256, 64)
    product, ours = grad @ codes.bfloat16(), input_gradient(grad, scale, codes, torch.bfloat16)
    for _ in range(3):
        assert torch.equal(grad @ codes.bfloat16(), product)
        assert torch.equal(input_gradient(grad, scale, codes, torch.bfloat16), ours)
