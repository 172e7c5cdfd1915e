"""Laws of the engines: the same integers and the same bits from all of them, and a choice that is measured and named."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fraqat.errors import ConfigError
from fraqat.kernels import (
    EngineName,
    EngineTable,
    Operands,
    PreparedWeight,
    engines_for,
    quantize_stochastic,
    quantize_tokens,
    scaled_product,
)

CPU = torch.device("cpu")
ENGINES = {engine.name: engine for engine in engines_for(CPU)}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest):
    found = ENGINES[request.param]
    if reason := found.why_unavailable(CPU):
        pytest.skip(reason)
    return found


def reference(operands: Operands, codes_OK: Tensor) -> Tensor:
    """The definition of `Operands`, with the sums in int64."""
    sums = operands.codes_MK.long() @ codes_OK.long().t()
    if operands.zero_point is not None:
        sums -= operands.zero_point.long() * codes_OK.long().sum(1)
    y = sums.float() * operands.weight_scale_O * operands.token_scale[:, None]
    return (y if operands.bias_O is None else y + operands.bias_O).to(operands.out_dtype)


def random_operands(
    size_M: int, size_K: int, size_O: int, *, seed: int, is_static: bool, has_bias: bool, out_dtype: torch.dtype
) -> tuple[Operands, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes_OK = torch.randint(-128, 128, (size_O, size_K), generator=generator).to(torch.int8)
    low, high, dtype = (0, 256, torch.uint8) if is_static else (-128, 128, torch.int8)
    operands = Operands(
        torch.randint(low, high, (size_M, size_K), generator=generator).to(dtype),
        torch.rand(size_O, generator=generator) + 0.01,
        torch.rand(1 if is_static else size_M, generator=generator) + 0.01,
        torch.tensor(seed % 256, dtype=torch.int32) if is_static else None,
        codes_OK.sum(1, dtype=torch.int32) if is_static else None,
        torch.randn(size_O, generator=generator) if has_bias else None,
        out_dtype,
    )
    return operands, codes_OK


@settings(max_examples=60, deadline=None)
@given(
    size_M=st.integers(1, 70),
    size_K=st.integers(1, 150),
    size_O=st.integers(1, 70),
    seed=st.integers(0, 10_000),
    is_static=st.booleans(),
    has_bias=st.booleans(),
    out_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_engine_gives_the_bits_of_the_definition(size_M, size_K, size_O, seed, is_static, has_bias, out_dtype):
    operands, codes_OK = random_operands(
        size_M, size_K, size_O, seed=seed, is_static=is_static, has_bias=has_bias, out_dtype=out_dtype
    )
    expected = reference(operands, codes_OK)
    for name, engine in ENGINES.items():
        if not engine.why_unavailable(CPU):
            assert torch.equal(engine.product(operands, engine.prepare(codes_OK)), expected), name


@pytest.mark.parametrize("width", [1025, 3001, 40_000])
def test_sums_that_float32_cannot_hold_are_exact(engine, width: int):
    """An odd sum above 2^24, less all but its last digit by a zero point."""
    codes_MK = torch.full((1, width), 255, dtype=torch.uint8)
    codes_OK = torch.full((1, width), 127, dtype=torch.int8)
    codes_OK[0, 0], codes_MK[0, 0] = 1, 254
    row_sums = codes_OK.sum(1, dtype=torch.int32)
    operands = Operands(
        codes_MK, torch.ones(1), torch.ones(1), torch.tensor(255, dtype=torch.int32), row_sums, None, torch.float32
    )
    assert int((codes_MK.long() * codes_OK.long()).sum()) > 2**24
    assert engine.product(operands, engine.prepare(codes_OK)).item() == -1


def test_autocast_does_not_round_codes(engine):
    operands, codes_OK = random_operands(7, 100, 5, seed=0, is_static=False, has_bias=False, out_dtype=torch.float32)
    weight = PreparedWeight(EngineTable(CPU, engines=(engine,)))
    with torch.autocast("cpu", torch.bfloat16):
        y = scaled_product(
            operands.codes_MK, operands.token_scale, codes_OK, operands.weight_scale_O,
            None, None, None, weight.handle, torch.float32,
        )  # fmt: skip
    assert torch.equal(y, reference(operands, codes_OK))


def test_a_choice_is_measured_once_per_shape_and_remembered():
    table = EngineTable(CPU)
    operands, codes_OK = random_operands(5, 16, 8, seed=0, is_static=False, has_bias=True, out_dtype=torch.float32)
    first = table.engine_for(operands, codes_OK)
    assert table.engine_for(operands, codes_OK) is first
    (choice,) = table.choices
    assert choice.engine == min(choice.times_ms, key=choice.times_ms.__getitem__) == first.name
    assert set(choice.times_ms) == {e.name for e in table.candidates}
    assert str(choice.shape) == "8 x 16 -> 8"


def test_tables_of_a_process_share_what_was_measured():
    class Counted(type(ENGINES["float32"])):
        num_calls = 0

        def product(self, operands: Operands, prepared: Tensor) -> Tensor:
            type(self).num_calls += 1
            return super().product(operands, prepared)

    operands, codes_OK = random_operands(5, 24, 8, seed=0, is_static=False, has_bias=True, out_dtype=torch.float32)
    calls = []
    for counts_preparation in (True, True, False):
        engines = (Counted(), ENGINES["int_mm"])
        table = EngineTable(CPU, engines=engines, counts_preparation=counts_preparation)
        assert table.engine_for(operands, codes_OK) in engines
        assert len(table.choices) == 1
        calls.append(Counted.num_calls)
    assert 0 < calls[0] == calls[1] < calls[2]


class Slow:
    """An engine that is always the slowest."""

    name = "int_mm"
    is_layout_cheap = False

    def why_unavailable(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else "cpu only"

    def prepare(self, codes_OK: Tensor) -> Tensor:
        return codes_OK

    def product(self, operands: Operands, prepared: Tensor) -> Tensor:
        for _ in range(200):
            result = reference(operands, prepared)
        return result


def test_the_fastest_engine_wins():
    operands, codes_OK = random_operands(5, 64, 8, seed=0, is_static=False, has_bias=True, out_dtype=torch.float32)
    table = EngineTable(CPU, engines=(Slow(), ENGINES["float32"]))
    assert table.engine_for(operands, codes_OK).name == "float32"


def test_a_named_engine_is_the_only_candidate():
    table = EngineTable(CPU, EngineName.FLOAT32, strict=True)
    assert [engine.name for engine in table.candidates] == ["float32"]


def test_strict_names_engine_reason_and_choices():
    with pytest.raises(
        ConfigError, match=r"engine.name = 'triton' is not possible: allowed is .*float32.*strict: false"
    ):
        EngineTable(CPU, EngineName.TRITON, strict=True)


def test_without_strict_an_engine_that_cannot_run_is_replaced_and_named():
    table = EngineTable(CPU, EngineName.TRITON)
    assert "float32" in {engine.name for engine in table.candidates}
    assert "triton" in table.reasons


def test_new_codes_are_never_computed_with_an_old_layout(engine):
    operands, codes_OK = random_operands(5, 64, 8, seed=0, is_static=False, has_bias=True, out_dtype=torch.float32)
    weight = PreparedWeight(EngineTable(CPU, engines=(engine,)))
    weight.product(operands, codes_OK)
    codes_OK.neg_()
    weight.renew()
    assert torch.equal(weight.product(operands, codes_OK), reference(operands, codes_OK))


@pytest.mark.parametrize("counts_preparation", [True, False])
def test_training_keeps_no_float_copy_of_codes(counts_preparation: bool):
    operands, codes_OK = random_operands(5, 64, 8, seed=0, is_static=False, has_bias=True, out_dtype=torch.float32)
    weight = PreparedWeight(EngineTable(CPU, EngineName.FLOAT32, counts_preparation=counts_preparation))
    weight.product(operands, codes_OK)
    assert (weight.layout("float32") is None) == counts_preparation


@pytest.mark.parametrize("largest", [1, 7, 127])
@pytest.mark.parametrize("is_static", [False, True])
def test_cuts_of_narrow_and_wide_codes_are_exact(largest: int, is_static: bool):
    operands, codes_OK = random_operands(
        3, 9000, 4, seed=largest, is_static=is_static, has_bias=True, out_dtype=torch.float32
    )
    codes_OK = codes_OK.clamp(-largest, largest)
    operands = dataclasses.replace(operands, row_sums_O=codes_OK.sum(1, dtype=torch.int32))
    engine = ENGINES["float32"]
    assert torch.equal(engine.product(operands, engine.prepare(codes_OK)), reference(operands, codes_OK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_quantized_as_the_formula_says(dtype: torch.dtype):
    x = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3] = 0
    codes, scale = quantize_tokens(x)
    expected = (x.float().abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(scale, expected)
    assert torch.equal(codes, torch.round(x.float() / expected[:, None]).to(torch.int8))


def test_stochastic_codes_are_right_on_average_and_never_further_than_one_step():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    total = torch.zeros_like(x)
    for seed in range(400):
        codes, scale = quantize_stochastic(x, torch.tensor(seed))
        values = codes * scale[:, None]
        assert (values - x).abs().le(scale[:, None] * (1 + 1e-5)).all()
        total += values
    deviation = (total / 400 - x).abs() / scale[:, None]
    assert deviation.max() < 5 * 0.5 / 400**0.5  # five standard deviations of the mean of the worst case
    again, _ = quantize_stochastic(x, torch.tensor(399))
    assert torch.equal(again, codes)


def test_operators_are_traced_and_compiled():
    """PyTorch's own checks of a custom operator: schema, fake tensors, compilation."""
    operands, codes_OK = random_operands(5, 64, 8, seed=0, is_static=True, has_bias=True, out_dtype=torch.bfloat16)
    weight = PreparedWeight(EngineTable(CPU))
    arguments = (
        operands.codes_MK, operands.token_scale, codes_OK, operands.weight_scale_O, operands.zero_point,
        operands.row_sums_O, operands.bias_O, weight.handle, torch.bfloat16,
    )  # fmt: skip
    torch.library.opcheck(scaled_product, arguments)
    torch.library.opcheck(quantize_tokens, (torch.randn(4, 9),))


def test_a_copied_weight_keeps_working():
    operands, codes_OK = random_operands(5, 64, 8, seed=0, is_static=False, has_bias=True, out_dtype=torch.float32)
    weight = PreparedWeight(EngineTable(CPU))
    copied = copy.deepcopy(weight)
    del weight
    assert int(copied.handle) >= 0
    y = scaled_product(
        operands.codes_MK, operands.token_scale, codes_OK, operands.weight_scale_O,
        None, None, operands.bias_O, copied.handle, torch.float32,
    )  # fmt: skip
    assert torch.equal(y, reference(operands, codes_OK))
