"""The Triton kernels are exact: under Triton's interpreter, and on a GPU where there is one.

The interpreter has to be chosen before Triton is imported. The laws therefore hold in a process of their own, which is this
file run as a script; it prints what became of each of them.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fraqat.kernels import triton as kernels
from fraqat.kernels.product import Operands

pytestmark = pytest.mark.xdist_group("triton")  # one worker interprets all laws

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ENGINE = kernels.Triton()
TINY = torch.finfo(torch.float32).tiny


def random_operands(
    device: str, sizes: tuple[int, int, int], *, unsigned: bool, shared: bool, dtype: torch.dtype
) -> tuple[Operands, Tensor]:
    num_tokens, width_in, width_out = sizes
    weight = torch.randint(-128, 128, (width_out, width_in), dtype=torch.int8)
    low, code_dtype = (0, torch.uint8) if unsigned else (-128, torch.int8)
    operands = Operands(
        codes_MK=torch.randint(low, low + 256, (num_tokens, width_in)).to(code_dtype).to(device),
        weight_scale_O=torch.rand(width_out).to(device),
        token_scale=torch.rand(1 if shared else num_tokens).to(device),
        zero_point=torch.tensor(131, dtype=torch.int32, device=device) if unsigned else None,
        row_sums_O=weight.sum(1, dtype=torch.int32).to(device) if unsigned else None,
        bias_O=torch.randn(width_out).to(device) if shared else None,
        out_dtype=dtype,
    )
    return operands, weight.to(device)


def expected_product(operands: Operands, weight: Tensor) -> Tensor:
    codes = operands.codes_MK.cpu().long()
    if operands.zero_point is not None:
        codes = codes - int(operands.zero_point)
    y = (codes @ weight.cpu().long().t()).float() * operands.weight_scale_O.cpu()
    y = y * operands.token_scale.cpu()[:, None]
    if operands.bias_O is not None:
        y = y + operands.bias_O.cpu()
    return y.to(operands.out_dtype)


def expected_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.float().abs().amax(1) / 127).clamp(min=TINY)
    return torch.round(x.float() / scale[:, None]).to(torch.int8), scale


def assert_same(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def product_is_that_of_int64(device: str) -> None:
    for sizes in ((5, 37, 70), (1, 64, 32), (33, 200, 65), (70, 65, 33)):
        for unsigned in (False, True):
            for shared, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
                operands, weight = random_operands(device, sizes, unsigned=unsigned, shared=shared, dtype=dtype)
                y = ENGINE.product(operands, ENGINE.prepare(weight))
                assert y.dtype == dtype
                assert_same(y, expected_product(operands, weight))


def product_sums_what_float32_cannot(device: str) -> None:
    width = 4001
    weight = torch.full((2, width), 127, dtype=torch.int8)
    weight[1] = -128
    codes = torch.full((2, width), 127, dtype=torch.int8)
    codes[0, 0] = 124
    ones = torch.ones(2, device=device)
    expected = codes.long() @ weight.long().t()
    assert (expected.abs() > 2**24).all() and (expected % 2 == 1).any()

    # One more unit of the sum is a different float32 after the zero point has taken most of it away.
    for zero_point in (0, 120):
        operands = Operands(
            codes_MK=codes.to(torch.uint8).to(device),
            weight_scale_O=ones,
            token_scale=ones[:1],
            zero_point=torch.tensor(zero_point, dtype=torch.int32, device=device),
            row_sums_O=weight.sum(1, dtype=torch.int32).to(device),
            bias_O=None,
            out_dtype=torch.float32,
        )
        assert_same(
            ENGINE.product(operands, weight.to(device)), ((codes.long() - zero_point) @ weight.long().t()).float()
        )
    operands = Operands(codes.to(device), ones, ones[:1], None, None, None, torch.float32)
    assert_same(ENGINE.product(operands, weight.to(device)), expected.float())


def product_of_no_tokens_is_empty(device: str) -> None:
    operands, weight = random_operands(device, (0, 8, 4), unsigned=False, shared=True, dtype=torch.bfloat16)
    y = ENGINE.product(operands, weight)
    assert y.shape == (0, 4) and y.dtype == torch.bfloat16


def tokens_are_quantized_like_torch_does(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for sizes in ((5, 37), (1, 1), (130, 64), (3, 1000), (2, 16384), (2, 16500)):
            x = torch.randn(sizes) * 5
            x[0, 1:] = 0
            codes, scale = ENGINE.quantize_tokens(x.to(dtype).to(device))
            expected_codes, expected_scale = expected_tokens(x.to(dtype))
            assert_same(codes, expected_codes)
            assert_same(scale, expected_scale)


def ties_go_to_even(device: str) -> None:
    x = torch.cat([torch.arange(-127, 127) + 0.5, torch.tensor([127.0])])
    codes, scale = ENGINE.quantize_tokens(x[None].to(device))
    assert scale.item() == 1
    assert_same(codes[0], torch.round(x).to(torch.int8))


def small_tokens_keep_the_smallest_scale(device: str) -> None:
    x = torch.randn(3, 16) * torch.tensor([[0.0], [1e-39], [1e-35]])
    codes, scale = ENGINE.quantize_tokens(x.to(device))
    expected_codes, expected_scale = expected_tokens(x)
    assert (expected_scale == TINY).tolist() == [True, True, False]
    assert_same(scale, expected_scale)
    assert_same(codes, expected_codes)


def what_is_not_finite_shows(device: str) -> None:
    weight = torch.ones(3, 40, dtype=torch.int8, device=device)
    ones = torch.ones(3, device=device)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for width in (40, 16500) if dtype == torch.bfloat16 else (40,):
                x = torch.ones(2, width, dtype=dtype)
                x[1, 7] = bad
                codes, scale = ENGINE.quantize_tokens(x.to(device))
                assert scale.isfinite().tolist() == [True, False]
                assert not ENGINE.quantize_stochastic(x[:, :40].to(device), seed=1)[1][1].isfinite()
                operands = Operands(codes[:, :40].contiguous(), ones, scale, None, None, None, torch.float32)
                is_finite = ENGINE.product(operands, weight).isfinite()
                assert is_finite[0].all() and not is_finite[1].any()


def weights_are_quantized_like_torch_does(device: str) -> None:
    limits = ((-8, 7), (torch.tensor(-7), torch.tensor(7.0)), (-128, 127), (0, 15))
    for dtype in (torch.float32, torch.bfloat16):
        for qmin, qmax in limits:
            weight, scale = torch.randn(17, 4201).to(dtype), torch.rand(17) * 0.3 + 0.001
            codes, row_sums = ENGINE.quantize_weight(weight.to(device), scale.to(device), qmin, qmax)
            expected = torch.round(weight.float() / scale[:, None]).clamp(qmin, qmax).to(torch.int8)
            assert_same(codes, expected)
            assert_same(row_sums, expected.sum(1, dtype=torch.int32))


def stochastic_rounding_is_unbiased(device: str) -> None:
    num_rows, num_seeds = 256, 6
    row = torch.randn(70)
    x = row.expand(num_rows, -1).to(device)
    mean = torch.zeros(70, dtype=torch.float64)
    for seed in range(num_seeds):
        codes, scale = ENGINE.quantize_stochastic(x, seed)
        mean += codes.double().mean(0).cpu() / num_seeds
    ratio = row.double() / scale[0].item()
    share = ratio - ratio.floor()
    deviation = (share * (1 - share) / (num_rows * num_seeds)).sqrt() + 1e-5
    z = (mean - ratio) / deviation
    assert z.abs().max() < 4.5
    assert 0.7 < z.std() < 1.3
    assert abs(z.mean()) < 0.5


def stochastic_rounding_takes_a_neighbour(device: str) -> None:
    for sizes in ((7, 1), (7, 3), (3, 5000)):
        x = torch.randn(sizes)
        codes, scale = ENGINE.quantize_stochastic(x.to(device), seed=9)
        ratio = x / scale.cpu()[:, None]
        assert_same(scale, expected_tokens(x)[1])
        assert ((codes.cpu() - ratio).abs() <= 1).all()
        assert codes.abs().max() == 127


def stochastic_rounding_repeats_no_number(device: str) -> None:
    x = torch.full((3, 8193), 0.5, device=device)
    x[:, -1] = 127
    codes, _ = ENGINE.quantize_stochastic(x, seed=5)
    stretches = codes[:, :8192].reshape(-1, 256)
    assert stretches.unique(dim=0).shape == stretches.shape
    assert set(stretches.unique().tolist()) == {0, 1}


def stochastic_rounding_follows_its_seed(device: str) -> None:
    x = torch.randn(4, 70, device=device)
    first, again, other = (ENGINE.quantize_stochastic(x, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def codes_use_integer_matrix_units(capability: str) -> None:
    """Every kernel compiles without a GPU; the product has the instructions that make it fast, and no fused rounding."""
    triton = importlib.import_module("triton")
    source = importlib.import_module("triton.compiler").ASTSource
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", int(capability), 32)

    def compile_to_ptx(kernel: object, types: str, constants: dict[str, object], **options: int) -> str:
        while not isinstance(kernel, triton.JITFunction):
            kernel = kernel.fn
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else None for name in names}
        signature.update(zip((name for name in names if name not in constants), types.split(), strict=True))
        aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ("size_K", "size_O")]
        module = source(
            kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        return triton.compile(module, target=target, options={"enable_fp_fusion": False, **options}).asm["ptx"]

    instruction = {"80": "mma.sync.aligned.m16n8k32", "90": "wgmma.mma_async"}[capability]
    tile = {"TOKEN_STRIDE": 1, "GROUP": 8, "BLOCK_M": 128, "BLOCK_O": 128, "BLOCK_K": 64}
    signed = {**tile, "OFFSET": 0, "zero_point": None, "row_sums_O": None, "bias_O": None}
    for types, constants in (
        ("*i8 *i8 *fp32 *fp32 *bf16 i32 i32 i32 i32", signed),
        ("*u8 *i8 *fp32 *fp32 *i32 *i32 *fp32 *fp32 i32 i32 i32 i32", {**tile, "OFFSET": 128}),
    ):
        ptx = compile_to_ptx(kernels._product_kernel, types, constants, num_warps=4, num_stages=3)
        assert any(instruction in line and "s32.s8.s8" in line for line in ptx.splitlines())
        assert "cp.async" in ptx and "fma.rn.f32" not in ptx
    rows = {"BLOCK_M": 1, "BLOCK_K": 1024}
    for one_part in (True, False):
        constants = {**rows, "ONE_PART": one_part}
        ptx = compile_to_ptx(kernels._quantize_tokens_kernel, "*bf16 *i8 *fp32 i32 i32", constants)
        assert "div.rn.f32" in ptx and "div.full.f32" not in ptx
    constants = {"BLOCK_O": 1, "BLOCK_K": 1024}
    compile_to_ptx(kernels._quantize_weight_kernel, "*bf16 *fp32 *fp32 *i32 *i8 *i32 i32 i32", constants)
    compile_to_ptx(kernels._quantize_stochastic_kernel, "*bf16 *i8 *fp32 i32 i32 i32", rows)


LAWS: tuple[Callable[[str], None], ...] = (
    product_is_that_of_int64,
    product_sums_what_float32_cannot,
    product_of_no_tokens_is_empty,
    tokens_are_quantized_like_torch_does,
    ties_go_to_even,
    small_tokens_keep_the_smallest_scale,
    what_is_not_finite_shows,
    weights_are_quantized_like_torch_does,
    stochastic_rounding_is_unbiased,
    stochastic_rounding_takes_a_neighbour,
    stochastic_rounding_repeats_no_number,
    stochastic_rounding_follows_its_seed,
)
NAMES = [law.__name__ for law in LAWS]


def outcomes(laws: tuple[Callable[[str], None], ...], argument: str) -> dict[str, str]:
    result: dict[str, str] = {}
    for law in laws:
        torch.manual_seed(1234)
        try:
            law(argument)
        except Exception:  # noqa: BLE001 - whatever breaks a law is reported under its name
            result[law.__name__] = traceback.format_exc()
        else:
            result[law.__name__] = "holds"
    return result


def run_laws(argument: str, cache: Path, *, interpreted: bool) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    environment["TRITON_INTERPRET"] = "1" if interpreted else "0"
    command = [sys.executable, __file__, argument]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_laws("cpu", tmp_path_factory.mktemp("triton"), interpreted=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_laws("cuda", tmp_path_factory.mktemp("triton"), interpreted=False)


@needs_triton
@pytest.mark.parametrize("law", NAMES)
def test_law_holds_under_the_interpreter(law: str, interpreted: dict[str, str]) -> None:
    assert interpreted[law] == "holds", interpreted[law]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("law", NAMES)
def test_law_holds_on_the_gpu(law: str, compiled: dict[str, str]) -> None:
    assert compiled[law] == "holds", compiled[law]


@needs_triton
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_to_integer_matrix_units(capability: str, tmp_path: Path) -> None:
    (outcome,) = run_laws(capability, tmp_path, interpreted=False).values()
    assert outcome == "holds", outcome


def load_anew() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_loaded_anew", kernels.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_engine_without_triton_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = load_anew().Triton().why_unavailable(torch.device("cuda"))
    assert "fraqat[gpu]" in reason


@needs_triton
def test_engine_runs_on_the_cpu_under_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_IS_INTERPRETED", False)
    assert "not on cpu" in ENGINE.why_unavailable(torch.device("cpu"))
    monkeypatch.setattr(kernels, "_IS_INTERPRETED", True)
    assert ENGINE.why_unavailable(torch.device("cpu")) == ""
    assert "not on mps" in ENGINE.why_unavailable(torch.device("mps"))


@needs_triton
def test_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in ENGINE.why_unavailable(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert ENGINE.why_unavailable(torch.device("cuda")) == ""


if __name__ == "__main__":
    argument = sys.argv[1]
    print(json.dumps(outcomes((codes_use_integer_matrix_units,) if argument.isdigit() else LAWS, argument)))
