"""The planned size of the result is what the export writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fraqat.export import ModelDescription, write_packed
from fraqat.nn import ActivationSpec, LayerRule, QuantSpec, WeightSpec, calibrate_, quantize_
from fraqat.planning import packed_size


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 33)
        self.conv = nn.Conv2d(33, 7, 1, bias=False)
        self.depthwise = nn.Conv2d(7, 7, 3, groups=7)
        self.norm = nn.LayerNorm(7)
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.depthwise(self.conv(self.first(x).permute(0, 3, 1, 2)))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(),
        QuantSpec(WeightSpec(scale_dtype="bfloat16", range_method="mse"), None),
        QuantSpec(WeightSpec(bits=3, symmetric=False), ActivationSpec()),
        QuantSpec(WeightSpec(bits=5.5, granularity="tensor")),
        QuantSpec(WeightSpec(bits=12)),
        QuantSpec(activation=ActivationSpec(granularity="tensor", static=True, symmetric=False)),
    ],
)
@pytest.mark.parametrize("float_dtype", ["float32", "bfloat16"])
def test_planned_bytes_are_the_written_tensors(spec: QuantSpec, float_dtype, tmp_path: Path) -> None:
    model = Mixed()
    quantize_(model, spec, rules=(LayerRule(pattern="first", weight_granularity="group", group_size=16),))
    calibrate_(model, model, [torch.randn(2, 4, 4, 48)])
    description = ModelDescription("Mixed", {}, "none")
    written = write_packed(model, description, tmp_path / "out", float_dtype=float_dtype)
    planned = packed_size(model, getattr(torch, float_dtype))
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert planned.num_bytes == written.num_file_bytes - 8 - header
    assert planned.num_other_bytes == written.num_other_bytes
    assert planned.num_quantized_weights == written.num_quantized_weights


def test_the_size_needs_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100_000, 100_000, bias=False))
    quantize_(model)
    size = packed_size(model)
    assert size.num_code_bytes == 100_000 * 50_000
    assert size.bits_per_weight == pytest.approx(4 + 32 / 100_000)
