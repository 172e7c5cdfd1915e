"""Integer zero points of dynamic inputs are those of the runtimes, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fraqat import ActivationSpec, QuantSpec
from fraqat.errors import ConfigError
from fraqat.nn.integer import why_not_integer
from fraqat.nn.quantizers import ActivationQuantizer
from fraqat.numerics import ZeroPoint
from fraqat.quiet import quiet_torchao

HALF = 128  # the runtimes' codes are signed


def quantizer(form: ZeroPoint) -> ActivationQuantizer:
    spec = ActivationSpec(symmetric=False, range_method="min_max", zero_point=form)
    return ActivationQuantizer(spec, -1, torch.device("cpu"))


@st.composite
def inputs(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    size = 2.0 ** draw(st.integers(-20, 20))
    shift = draw(st.sampled_from([0.0, 0.0, 1.0, -3.0, 100.0]))
    x = (torch.randn(7, draw(st.integers(2, 40)), generator=generator) + shift) * size
    return torch.where(torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])), 0.0, x)


def xnnpack_reference(low: np.float32, high: np.float32) -> tuple[np.float32, np.float32, np.float32]:
    """XNNPACK's C function, line by line in float32: multiplier, scale, zero point."""
    one, qmin, qmax = np.float32(1), np.float32(-128), np.float32(127)
    low, high = min(np.float32(0), low), max(np.float32(0), high)
    scale = one if low == high else (qmax - qmin) / (high - low)
    scaled_low, scaled_high = low * scale, high * scale
    zero_point = qmin - scaled_low if (qmin + scaled_low) + (qmax + scaled_high) > 0 else qmax - scaled_high
    return scale, one / scale, np.rint(min(max(zero_point, qmin), qmax))


@given(inputs())
def test_integer_is_torchaos(x: Tensor) -> None:
    with quiet_torchao():
        from torchao.quantization import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine
    block, limits = (1, x.shape[1]), {"quant_min": -128, "quant_max": 127}
    scale, zero_point = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block, target_dtype=torch.int8, zero_point_dtype=torch.int8, **limits
    )
    codes = quantize_affine(x, block, scale, zero_point, output_dtype=torch.int8, **limits)
    values = dequantize_affine(codes, block, scale, zero_point, torch.int8, output_dtype=torch.float32, **limits)
    ours = quantizer(ZeroPoint.INTEGER)
    qparams = ours.qparams(x)
    assert qparams.zero_point is not None
    assert torch.equal(qparams.scale.flatten(), scale)
    assert torch.equal(qparams.zero_point.flatten() - HALF, zero_point.float())
    assert torch.equal(ours(x), values)


@given(inputs())
def test_xnnpack_is_xnnpacks(x: Tensor) -> None:
    ours = quantizer(ZeroPoint.XNNPACK)
    qparams = ours.qparams(x)
    assert qparams.zero_point is not None and qparams.multiplier is not None
    values = ours(x)
    for row in range(len(x)):
        multiplier, scale, zero_point = xnnpack_reference(x[row].min().numpy()[()], x[row].max().numpy()[()])
        assert float(qparams.multiplier[row]) == multiplier
        assert float(qparams.scale[row]) == scale
        assert float(qparams.zero_point[row]) - HALF == zero_point
        codes = np.clip(np.rint(x[row].numpy() * multiplier) + zero_point, np.float32(-128), np.float32(127))
        assert np.array_equal(values[row].numpy(), (codes - zero_point) * scale)


@pytest.mark.parametrize("form", [ZeroPoint.INTEGER, ZeroPoint.XNNPACK])
def test_zero_is_exact_and_the_error_is_half_a_step(form: ZeroPoint) -> None:
    x = torch.randn(9, 33) + 2
    x[:, 0] = 0
    ours = quantizer(form)
    values, scale = ours(x), ours.qparams(x).scale
    assert bool((values[:, 0] == 0).all())
    assert bool(((values - x).abs() <= 1.001 * scale).all())  # the zero point's own rounding may clip half a step


@pytest.mark.parametrize(
    "changes", [{"symmetric": True}, {"static": True, "granularity": "tensor"}, {"scale_dtype": "bfloat16"}]
)
def test_a_zero_point_where_there_can_be_none_is_refused(changes: dict[str, object]) -> None:
    values = {"symmetric": False, "range_method": "min_max", "zero_point": "integer"} | changes
    with pytest.raises(ConfigError, match=r"activation\.zero_point = 'integer' is not possible"):
        ActivationSpec(**values)


def test_such_inputs_take_the_floating_point_path() -> None:
    assert "zero point per token" in why_not_integer(QuantSpec(activation=quantizer(ZeroPoint.INTEGER).spec))
