"""The native engine is exact: bit for bit the scaled int64 product, and bit for bit torch's own quantization."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fraqat.kernels import native, native_build
from fraqat.kernels.native import Native, quantize_and_pack, quantize_tokens
from fraqat.kernels.product import Operands, scale_product

CPU = torch.device("cpu")
SIZE = st.integers(1, 200)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(scope="module")
def engine() -> Native:
    engine = Native()
    if reason := engine.why_unavailable(CPU):
        pytest.skip(reason)
    return engine


def exact(operands: Operands, codes_OK: Tensor) -> Tensor:
    """float64 holds every partial sum of these tests."""
    return scale_product((operands.codes_MK.double() @ codes_OK.double().t()).long(), operands)


def random_operands(
    codes_MK: Tensor,
    codes_OK: Tensor,
    *,
    shared: bool = False,
    bias: bool = True,
    out_dtype: torch.dtype = torch.float32,
) -> Operands:
    has_offset = codes_MK.dtype == torch.uint8
    num_tokens, num_outputs = len(codes_MK), len(codes_OK)
    return Operands(
        codes_MK=codes_MK,
        weight_scale_O=torch.rand(num_outputs) + 1e-4,
        token_scale=torch.rand(1 if shared else num_tokens) + 1e-4,
        zero_point=torch.randint(0, 256, (), dtype=torch.int32) if has_offset else None,
        row_sums_O=codes_OK.sum(1, dtype=torch.int32) if has_offset else None,
        bias_O=torch.randn(num_outputs) if bias else None,
        out_dtype=out_dtype,
    )


def random_codes(*shape: int, unsigned: bool = False) -> Tensor:
    if unsigned:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@given(SIZE, SIZE, SIZE, st.booleans(), st.booleans(), st.booleans(), FLOATS, st.integers(0, 2**31))
def test_product_equals_the_exact_one(engine, tokens, inputs, outputs, unsigned, shared, bias, dtype, seed):
    torch.manual_seed(seed)
    codes_MK, codes_OK = random_codes(tokens, inputs, unsigned=unsigned), random_codes(outputs, inputs)
    operands = random_operands(codes_MK, codes_OK, shared=shared, bias=bias, out_dtype=dtype)
    y = engine.product(operands, engine.prepare(codes_OK))
    assert y.dtype == dtype
    assert torch.equal(y, exact(operands, codes_OK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1000, 1152, 640), (70, 6144, 97), (700, 4000, 512)])
def test_product_is_exact_where_rows_are_cut_and_results_streamed(engine, tokens, inputs, outputs, dtype):
    codes_MK, codes_OK = random_codes(tokens, inputs, unsigned=True), random_codes(outputs, inputs)
    operands = random_operands(codes_MK, codes_OK, out_dtype=dtype)
    assert torch.equal(engine.product(operands, engine.prepare(codes_OK)), exact(operands, codes_OK))


def test_threads_change_nothing(engine):
    codes_MK, codes_OK = random_codes(90, 700), random_codes(333, 700)
    operands = random_operands(codes_MK, codes_OK)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        y = engine.product(operands, engine.prepare(codes_OK))
        codes, scale = quantize_tokens(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, exact(operands, codes_OK))
    assert torch.equal(codes, quantize_tokens(y)[0])
    assert torch.equal(scale, quantize_tokens(y)[1])


@pytest.mark.parametrize("value", [-128, 127])
def test_greatest_sums_and_odd_ones_beyond_float32_are_exact(engine, value):
    codes = torch.full((17, 6145), value, dtype=torch.int8)
    codes[:, -1] = 1
    total = value * value * 6144 + 1
    assert total > 2**24 and total % 2
    one = torch.ones(17)
    row_sums = torch.full((17,), total - 1, dtype=torch.int32)
    operands = Operands(codes, one, one, torch.tensor(1, dtype=torch.int32), row_sums, None, torch.float32)
    assert engine.product(operands, engine.prepare(codes)).eq(1).all()


def test_denormal_results_are_rounded_not_flushed(engine):
    codes_MK, codes_OK = random_codes(40, 64), random_codes(48, 64)
    for dtype in (torch.float32, torch.bfloat16):
        scale = torch.full((48,), 1e-30)
        operands = Operands(codes_MK, scale, torch.full((40,), 3e-14), None, None, None, dtype)
        reference = exact(operands, codes_OK)
        assert (reference != 0).any() and reference.abs().max() < torch.finfo(torch.float32).tiny
        assert torch.equal(engine.product(operands, engine.prepare(codes_OK)), reference)


def test_torch_finds_the_tiles_as_it_left_them(engine):
    codes_MK, codes_OK = random_codes(64, 256), random_codes(64, 256)
    operands, prepared = random_operands(codes_MK, codes_OK), engine.prepare(codes_OK)
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(64, 256).bfloat16()
    linear, product = torch.nn.functional.linear(x, weight), engine.product(operands, prepared)
    for _ in range(3):
        assert torch.equal(torch.nn.functional.linear(x, weight), linear)
        assert torch.equal(engine.product(operands, prepared), product)


def test_no_tokens_give_no_results(engine):
    codes_OK = random_codes(48, 64)
    operands = random_operands(random_codes(0, 64), codes_OK)
    assert engine.product(operands, engine.prepare(codes_OK)).shape == (0, 48)


def test_product_notices_a_weight_of_another_size(engine):
    operands = random_operands(random_codes(4, 200), random_codes(8, 200))
    with pytest.raises(AssertionError):
        engine.product(operands, engine.prepare(random_codes(8, 100)))


@given(SIZE, SIZE, st.sampled_from([(-128, 127), (-8, 7), (-2, 1), (-1, 1)]), FLOATS, st.integers(0, 2**31))
def test_quantized_weight_equals_torch(engine, outputs, inputs, grid, dtype, seed):
    torch.manual_seed(seed)
    weight = (torch.randn(outputs, inputs) * 10 ** torch.empty(outputs, 1).uniform_(-20, 20)).to(dtype)
    scale = weight.float().abs().amax(1).clamp(min=1e-30) / torch.randint(1, 200, (outputs,))
    check_quantized_weight(engine, weight, scale, *grid)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 1e-40, 1e-28, 2.0**-100, 1e30, 3e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_and_their_neighbours_are_rounded_as_torch_does(engine, scale, dtype):
    scale = torch.full((64,), scale) * (1 + torch.rand(64) / 4)
    halves = torch.randint(-5, 6, (64, 4000)) + 0.5
    weight = (halves * scale[:, None]).to(dtype)
    for other in (weight, torch.nextafter(weight, weight * 2), torch.nextafter(weight, weight * 0)):
        check_quantized_weight(engine, other, scale, -128, 127)


def check_quantized_weight(engine: Native, weight: Tensor, scale: Tensor, qmin: int, qmax: int) -> None:
    codes, row_sums, packed = quantize_and_pack(weight, scale, qmin, qmax)
    reference = torch.round(weight / scale[:, None]).clamp(qmin, qmax).to(torch.int8)
    assert torch.equal(codes, reference)
    assert torch.equal(packed, engine.prepare(reference))
    assert torch.equal(row_sums, reference.sum(1, dtype=torch.int32))


@given(SIZE, SIZE, st.floats(0.4, 200), FLOATS, st.integers(0, 2**31))
def test_scales_from_the_largest_magnitude_equal_torch(engine, outputs, inputs, divisor, dtype, seed):
    torch.manual_seed(seed)
    weight = (torch.randn(outputs, inputs) * 10 ** torch.empty(outputs, 1).uniform_(-44, 36)).to(dtype)
    weight[0] = 0
    scale = torch.full((outputs,), float("nan"))
    computed = quantize_and_pack(weight, scale, -128, 127, divisor=divisor)
    reference = (weight.float().abs().amax(1) / divisor).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(scale, reference)
    for ours, theirs in zip(computed, quantize_and_pack(weight, reference, -128, 127), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_a_row_that_is_not_finite_is_not_either(engine, value, dtype):
    weight, scale = torch.randn(5, 100, dtype=dtype), torch.empty(5)
    weight[2, 50] = value
    quantize_and_pack(weight, scale, -8, 7, divisor=7.5)
    assert scale.isfinite().tolist() == [True, True, False, True, True]


@given(SIZE, SIZE, FLOATS, st.integers(0, 2**31))
def test_quantized_tokens_equal_torch(engine, tokens, inputs, dtype, seed):
    torch.manual_seed(seed)
    x = (torch.randn(tokens, inputs) * 10 ** torch.empty(tokens, 1).uniform_(-44, 36)).to(dtype)
    x[0] = 0
    codes, scale = quantize_tokens(x)
    reference = (x.float().abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(scale, reference)
    assert torch.equal(codes, torch.round(x.float() / reference[:, None]).to(torch.int8))


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_not_finite_stays_so(engine, value, dtype):
    x = torch.randn(5, 100, dtype=dtype)
    x[2, 50] = value
    codes, scale = quantize_tokens(x)
    codes_OK = random_codes(40, 100)
    operands = Operands(codes, torch.rand(40), scale, None, None, torch.randn(40), dtype)
    finite = engine.product(operands, engine.prepare(codes_OK)).isfinite()
    assert finite.all(1).tolist() == [True, True, False, True, True]
    assert not finite[2].any()


def test_other_devices_are_refused():
    assert Native().why_unavailable(torch.device("cuda")) == "runs on cpu, not on cuda"


def test_the_library_is_built_once(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAQAT_CACHE", str(tmp_path))
    folder = native_build.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    library = native_build.built_library(folder)
    monkeypatch.setattr(native_build, "_compile", lambda command: pytest.fail("compiled again"))
    assert native_build.built_library(folder) == library
    assert list(folder.iterdir()) == [library]


def test_processes_may_build_at_once(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAQAT_CACHE", str(tmp_path))
    code = (
        "import torch; from fraqat.kernels.native import Native; print(Native().why_unavailable(torch.device('cpu')))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["\n", "\n"]
    assert len(list((tmp_path / "native").iterdir())) == 1


def test_a_folder_that_others_can_write_to_is_refused(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAQAT_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir()
    (tmp_path / "native").chmod(0o777)
    assert why_not_built() == f"{tmp_path / 'native'} is not a folder that only this user can write to"


def test_the_reason_of_a_failed_build_is_the_compilers(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAQAT_CACHE", str(tmp_path))
    script = "import sys; sys.exit('a note\\nnative.cpp:1: error: what is this?')"
    monkeypatch.setenv("CXX", shlex.join([sys.executable, "-c", script]))
    assert why_not_built() == f"{sys.executable} could not build the kernels: native.cpp:1: error: what is this?"
    assert not list((tmp_path / "native").iterdir())
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert "the C++ compiler cannot be run: " in why_not_built()


def test_a_missing_compiler_is_the_reason(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAQAT_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not_built() == "no C++ compiler was found (c++, g++, clang++; set CXX to name one)"


def why_not_built() -> str:
    library, reason = native._load.__wrapped__()
    assert library is None
    return reason


@pytest.mark.parametrize("name", ["native.cpp", "native_backward.cpp", "native_tiles.h"])
def test_the_sources_come_with_the_package(name):
    assert Path(native.__file__).with_name(name).is_file()


def test_every_source_decides_which_library_it_is(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "_compile", lambda command: Path(command[-1]).touch())
    before = native_build.built_library(tmp_path)
    changed = tmp_path / "native_tiles.h"
    changed.write_text("// another one")
    monkeypatch.setattr(native_build, "_HEADERS", (changed,))
    assert native_build.built_library(tmp_path) != before
