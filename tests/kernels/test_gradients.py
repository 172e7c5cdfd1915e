"""Laws of the backward products: what the formulas say on every path, whatever the number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fraqat.kernels import gradients, input_gradient, native, weight_gradient

HAS_NATIVE = not native.Native().why_unavailable(torch.device("cpu"))
SIZES = st.integers(1, 130)


def random_case(size_M: int, size_K: int, size_O: int, seed: int, dtype: torch.dtype, is_static: bool):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(size_M, size_O, generator=generator).to(dtype)
    weight_codes = torch.randint(-128, 128, (size_O, size_K), generator=generator).to(torch.int8)
    low, high, code_dtype = (0, 256, torch.uint8) if is_static else (-128, 128, torch.int8)
    codes = torch.randint(low, high, (size_M, size_K), generator=generator).to(code_dtype)
    scale = torch.rand(size_O, generator=generator) + 0.01
    token_scale = torch.rand(1 if is_static else size_M, generator=generator) + 0.01
    zero_point = torch.tensor(seed % 256, dtype=torch.int32) if is_static else None
    return grad, weight_codes, codes, scale, token_scale, zero_point


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-12))


@settings(max_examples=80, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_gradients_are_those_of_the_rounded_operands(size_M, size_K, size_O, seed, dtype, is_static):
    grad, weight_codes, codes, scale, token_scale, zero_point = random_case(
        size_M, size_K, size_O, seed, dtype, is_static
    )
    found = input_gradient(grad, scale, weight_codes, torch.bfloat16, is_native=HAS_NATIVE)
    expected = (grad * scale).bfloat16().double() @ weight_codes.double()
    assert found.dtype == torch.bfloat16 and relative_error(found, expected) < 4e-3
    centred = codes.double() - (0 if zero_point is None else int(zero_point))
    expected = (grad * token_scale[:, None]).bfloat16().double().t() @ centred
    for out_dtype, bound in ((torch.float32, 1e-5 if HAS_NATIVE else 4e-3), (torch.bfloat16, 4e-3)):
        found = weight_gradient(grad, token_scale, codes, zero_point, torch.bfloat16, out_dtype, is_native=HAS_NATIVE)
        assert found.dtype == out_dtype and relative_error(found, expected) < bound


@pytest.mark.parametrize("multiplies_in_float32", [False, True])
def test_a_cpu_without_bfloat16_products_gives_the_same_gradients(multiplies_in_float32: bool, monkeypatch):
    monkeypatch.setattr(gradients, "_HAS_SLOW_BFLOAT16", multiplies_in_float32)
    grad, weight_codes, codes, scale, token_scale, zero_point = random_case(40, 70, 50, 3, torch.bfloat16, True)
    expected = (grad * scale).bfloat16().double() @ weight_codes.double()
    found = input_gradient(grad, scale, weight_codes, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and relative_error(found, expected) < 4e-3
    with torch.autocast("cpu", torch.bfloat16):  # it must not bring the slow product back
        found = weight_gradient(grad, token_scale, codes, zero_point, torch.bfloat16, torch.float32)
    expected = (grad * token_scale[:, None]).bfloat16().double().t() @ (codes.double() - int(zero_point))
    assert relative_error(found, expected) < (1e-6 if multiplies_in_float32 else 4e-3)


def test_float32_gradients_are_not_rounded():
    grad, weight_codes, codes, scale, token_scale, _ = random_case(40, 70, 50, 0, torch.float32, False)
    expected = (grad * scale).double() @ weight_codes.double()
    assert relative_error(input_gradient(grad, scale, weight_codes, torch.float32), expected) < 1e-6
    found = weight_gradient(grad, token_scale, codes, None, torch.float32, torch.float32)
    assert relative_error(found, (grad * token_scale[:, None]).double().t() @ codes.double()) < 1e-6


@pytest.mark.parametrize("sizes", [(70, 130, 90), (1700, 50, 70), (70, 50, 3300)])
def test_the_number_of_threads_changes_no_bit(sizes: tuple[int, int, int]):
    grad, weight_codes, codes, scale, token_scale, _ = random_case(*sizes, 0, torch.bfloat16, False)
    kept, results = torch.get_num_threads(), []
    if not HAS_NATIVE:
        pytest.skip("the native kernel does not run here")
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(
                (
                    input_gradient(grad, scale, weight_codes, torch.bfloat16, is_native=HAS_NATIVE),
                    weight_gradient(
                        grad, token_scale, codes, None, torch.bfloat16, torch.float32, is_native=HAS_NATIVE
                    ),
                )
            )
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_batch_without_tokens_gives_zeros():
    grad, weight_codes, codes, scale, token_scale, _ = random_case(3, 8, 5, 0, torch.bfloat16, False)
    assert input_gradient(grad[:0], scale, weight_codes, torch.bfloat16, is_native=HAS_NATIVE).shape == (0, 8)
    found = weight_gradient(
        grad[:0], token_scale[:0], codes[:0], None, torch.bfloat16, torch.float32, is_native=HAS_NATIVE
    )
    assert torch.equal(found, torch.zeros(5, 8))
