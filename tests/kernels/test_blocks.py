"""Laws of blocks: they cover every row once, change no bit of a result, and keep temporaries small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from fraqat.kernels import EngineTable, Operands, blocks, engines_for, quantize_tokens
from fraqat.nn import ActivationSpec, EngineSpec, IntegerLayers, QuantSpec, WeightSpec, calibrate_, quantize_

CPU = torch.device("cpu")
PORTABLE = [engine for engine in engines_for(CPU) if engine.name in ("int_mm", "float32")]
SPECS = {
    "W4A8": QuantSpec(),
    "A6": QuantSpec(activation=ActivationSpec(bits=6)),
    "bfloat16 scales": QuantSpec(activation=ActivationSpec(scale_dtype="bfloat16")),
    "three sigma": QuantSpec(activation=ActivationSpec(range_method="three_sigma")),
    "one scale": QuantSpec(activation=ActivationSpec(granularity="tensor")),
    "scale of a sample": QuantSpec(activation=ActivationSpec(granularity="sample")),
    "static": QuantSpec(activation=ActivationSpec(granularity="tensor", static=True)),
    "static, zero point": QuantSpec(activation=ActivationSpec(granularity="tensor", static=True, symmetric=False)),
    "groups": QuantSpec(WeightSpec(granularity="group", group_size=8, group_scale="integer")),
}


@contextmanager
def limits(num_bytes: int, *, fewest_outputs: int = 512) -> Iterator[None]:
    """Blocks of another size: a few bytes cut every row off, very many cut nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_CACHED_BYTES", "_MAX_CACHED_BYTES", "_WHOLE_SUMS_BYTES", "_SUMS_BYTES"):
            patch.setattr(blocks, name, num_bytes)
        patch.setattr(blocks, "_FEWEST_OUTPUTS", fewest_outputs)
        yield


@given(
    num_rows=st.integers(0, 5000),
    row_bytes=st.integers(0, 300),
    limit_bytes=st.integers(1, 3000),
    multiple=st.sampled_from([1, 3, 64]),
)
def test_blocks_cover_every_row_once_within_the_limit(num_rows: int, row_bytes: int, limit_bytes: int, multiple: int):
    found = blocks.even_blocks(num_rows, row_bytes, limit_bytes, multiple=multiple)
    assert found
    assert [row for block in found for row in range(num_rows)[block]] == list(range(num_rows))
    for block in found[:-1]:
        assert (block.stop - block.start) % multiple == 0
    for block in found:
        num = block.stop - block.start
        assert num * row_bytes <= limit_bytes or num <= multiple


@given(num_tokens=st.integers(0, 300), num_outputs=st.integers(1, 300), limit_bytes=st.integers(1, 20_000))
def test_sums_are_cut_into_blocks_that_cover_them_once(num_tokens: int, num_outputs: int, limit_bytes: int):
    covered = torch.zeros(num_tokens, num_outputs, dtype=torch.int32)
    with limits(limit_bytes, fewest_outputs=64):
        found = blocks.sum_blocks(num_tokens, num_outputs, CPU)
    for tokens, outputs in found:
        covered[tokens, outputs] += 1
    assert (covered == 1).all()
    assert all(outputs.start % 64 == 0 for _, outputs in found)


def test_other_devices_and_graphs_keep_all_rows_together():
    whole = [slice(0, 10**6)]
    assert blocks.row_blocks(10**6, 10**4, torch.device("cuda")) == whole
    assert blocks.token_blocks(10**6, 10**4, torch.device("cuda")) == whole
    assert blocks.sum_blocks(10**6, 10**4, torch.device("cuda")) == [(whole[0], slice(0, 10**4))]
    assert len(blocks.row_blocks(10**6, 10**4, CPU)) > 1


@settings(max_examples=40, deadline=None)
@given(
    size_M=st.integers(1, 90),
    size_K=st.integers(1, 70),
    size_O=st.integers(1, 150),
    limit_bytes=st.integers(1, 6000),
    seed=st.integers(0, 10_000),
    is_static=st.booleans(),
    has_bias=st.booleans(),
    out_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_product_in_blocks_has_the_bits_of_the_whole_one(
    size_M, size_K, size_O, limit_bytes, seed, is_static, has_bias, out_dtype
):
    operands, codes_OK = random_operands(
        size_M, size_K, size_O, seed=seed, is_static=is_static, has_bias=has_bias, out_dtype=out_dtype
    )
    for engine in PORTABLE:
        prepared = engine.prepare(codes_OK)
        with limits(2**40):
            expected = engine.product(operands, prepared)
        with limits(limit_bytes, fewest_outputs=64):
            assert torch.equal(engine.product(operands, prepared), expected), engine.name


@settings(max_examples=30, deadline=None)
@given(
    size_M=st.integers(0, 40),
    size_K=st.integers(1, 50),
    limit_bytes=st.integers(1, 2000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_tokens_quantized_in_blocks_have_the_same_codes(size_M, size_K, limit_bytes, dtype, seed):
    x = torch.randn(size_M, size_K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with limits(2**40):
        codes, scale = quantize_tokens(x)
    with limits(limit_bytes):
        in_blocks = quantize_tokens(x)
    assert torch.equal(in_blocks[0], codes)
    assert torch.equal(in_blocks[1], scale)


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


def quantized(spec: QuantSpec, layer: nn.Module, x: Tensor, engine: str) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(layer)
    quantize_(model, spec)
    calibrate_(model, model, [x])
    IntegerLayers(model, EngineSpec(name=engine))
    return model


def step(model: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """Output, gradients, and what is kept for the backward pass."""
    kept: list[Tensor] = []
    x = x.clone().requires_grad_()
    keep: Callable[[Tensor], Tensor] = lambda t: (kept.append(t), t)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=autocast):
        y = model(x)
    (y.float() * torch.arange(y.shape[-1])).sum().backward()
    assert x.grad is not None
    results = {"y": y.detach(), "x": x.grad, **{f"kept {i}": t.detach() for i, t in enumerate(kept)}}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        results[name] = parameter.grad
        parameter.grad = None
    with torch.inference_mode(), torch.autocast("cpu", enabled=autocast):
        results["inference"] = model(x)
    return results


@pytest.mark.parametrize("engine", ["int_mm", "float32"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(37, 16), (3, 11, 16), (1, 16)], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_layer_in_blocks_gives_the_same_bits(spec: QuantSpec, shape: tuple[int, ...], autocast: bool, engine: str):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    model = quantized(spec, nn.Linear(16, 70), x / 4, engine)  # static ranges clip
    with limits(2**40):
        expected = step(model, x, autocast)
    with limits(4 * 16 * 5, fewest_outputs=64):
        found = step(model, x, autocast)
    assert found.keys() == expected.keys()
    assert any(t.dtype in (torch.int8, torch.uint8) and t.numel() == x.numel() for t in found.values())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_pointwise_convolution_in_blocks_gives_the_same_bits(spec: QuantSpec):
    x = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(1)) * 3
    model = quantized(spec, nn.Conv2d(16, 6, 1), x / 4, "int_mm")
    with limits(2**40):
        expected = step(model, x, autocast=False)
    with limits(4 * 16 * 4):
        found = step(model, x, autocast=False)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["W4A8", "A6", "static", "static, zero point"])
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_an_empty_batch_gives_an_empty_output_and_gradients_of_zero(name: str, shape: tuple[int, ...]):
    model = quantized(SPECS[name], nn.Linear(16, 7), torch.randn(5, 16), "int_mm")
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], 7)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("name", ["W4A8", "A6", "static, zero point"])
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_blocks_make_no_other_graph(name: str):
    torch._dynamo.reset()
    x = torch.randn(33, 16)
    model = quantized(SPECS[name], nn.Linear(16, 7), x, "int_mm")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with limits(2**40):
        expected = step(model, x, autocast=False)
    for num_bytes in (2**40, 4 * 16 * 5):
        with limits(num_bytes):
            found = step(compiled, x, autocast=False)
            for key in ("y", "x", "inference"):
                assert torch.equal(found[key], expected[key]), key
    training, inference = 1, 1
    assert counter.frame_count == training + inference
    torch._dynamo.reset()


def largest_allocation(run: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that is made meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    return max(event.self_cpu_memory_usage for event in recorded.events())


@pytest.mark.parametrize("name", ["W4A8", "A6", "static, zero point"])
def test_nothing_larger_than_codes_and_a_block_is_made_while_inputs_are_quantized(name: str):
    x = torch.randn(1000, 64)
    model = quantized(SPECS[name], nn.Linear(64, 4), x, "int_mm")
    with limits(4 * 64 * 100):
        assert largest_allocation(lambda: model(x.view(1, 1000, 64))) <= x.numel()
    with limits(2**40):  # of another tensor: the codes of the last one are kept
        assert largest_allocation(lambda: model(x.view(2, 500, 64))) >= 4 * x.numel()


@pytest.mark.parametrize("engine", PORTABLE, ids=[engine.name for engine in PORTABLE])
def test_nothing_larger_than_the_output_is_made_while_a_product_is_scaled(engine: Any):
    operands, codes_OK = random_operands(600, 64, 256, seed=0, is_static=False, has_bias=True, out_dtype=torch.bfloat16)
    prepared = engine.prepare(codes_OK)
    num_outputs = 600 * 256
    with limits(num_outputs, fewest_outputs=64):
        assert largest_allocation(lambda: engine.product(operands, prepared)) <= 2 * num_outputs
    with limits(2**40):
        assert largest_allocation(lambda: engine.product(operands, prepared)) >= 4 * num_outputs


def test_the_table_chooses_among_engines_that_work_in_blocks():
    """The largest layer of the benchmark's kind, at the limits as they are."""
    operands, codes_OK = random_operands(3000, 8, 2200, seed=0, is_static=True, has_bias=True, out_dtype=torch.bfloat16)
    assert len(blocks.sum_blocks(3000, 2200, CPU)) > 1
    results = [e.product(operands, e.prepare(codes_OK)) for e in EngineTable(CPU, engines=tuple(PORTABLE)).candidates]
    assert all(torch.equal(result, results[0]) for result in results)
