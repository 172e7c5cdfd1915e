"""Laws of torch.compile: one graph serves every width of a schedule, and computes what eager mode computes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fraqat.nn import ActivationSpec, QuantSpec, WeightSpec, calibrate_, quantize_, serve_widths_, set_bits_

# torch._dynamo instantiates torch.autograd.Function itself and warns about it.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")

TABLE_4 = (8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4)
SPECS = {
    "W4A8": QuantSpec(),
    "group, MSE": QuantSpec(WeightSpec(granularity="group", group_size=4, range_method="mse")),
    "group, integer": QuantSpec(WeightSpec(granularity="group", group_size=4, group_scale="integer")),
    "learned": QuantSpec(WeightSpec(range_method="learned", scale_dtype="bfloat16")),
    "group, learned": QuantSpec(WeightSpec(granularity="group", group_size=4, range_method="learned")),
    "asymmetric, tensor": QuantSpec(
        WeightSpec(symmetric=False, granularity="tensor", range_method="min_max"),
        ActivationSpec(symmetric=False, range_method="three_sigma"),
    ),
    "static": QuantSpec(WeightSpec(), ActivationSpec(granularity="tensor", static=True, symmetric=False)),
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.linear(x)).movedim(-1, 1))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one training step."""
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_one_graph_serves_every_width_of_table_4(spec: QuantSpec) -> None:
    model, x = Small(), torch.randn(2, 3, 5, 8)
    quantize_(model, spec)
    calibrate_(model, model, [x])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for bits in TABLE_4:
        set_bits_(model, bits)
        expected = step(model, model, x)
        for ours, theirs in zip(step(compiled, model, x), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", ["mse", "learned"])
def test_one_graph_serves_several_widths_with_scales_of_their_own(method: str) -> None:
    model, x = Small(), torch.randn(2, 3, 5, 8)
    quantize_(model, QuantSpec(WeightSpec(range_method=method)))
    serve_widths_(model, (8, 6, 5, 4))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for bits in (8, 6, 5, 4, 8, 4):
        set_bits_(model, bits)
        expected = [None if t is None else t.clone() for t in step(model, model, x)]
        for ours, theirs in zip(step(compiled, model, x), expected, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert counter.frame_count == 1


def test_graph_above_24_bits_is_another_one_and_exact() -> None:
    model, x = Small(), torch.randn(2, 3, 5, 8)
    quantize_(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for bits in (32, 8, 4):
        set_bits_(model, bits)
        for ours, theirs in zip(step(compiled, model, x), step(model, model, x), strict=True):
            assert torch.equal(ours, theirs)
    set_bits_(model, 8)
    num_graphs = counter.frame_count
    step(compiled, model, x)
    assert counter.frame_count == num_graphs
