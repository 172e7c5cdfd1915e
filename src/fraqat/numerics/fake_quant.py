"""quantize, dequantize, and fake_quantize with the straight-through estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fraqat.errors import config_error
from fraqat.numerics.granularity import BlockLayout
from fraqat.numerics.grid import FLOAT32_EXACT_BITS, Grid
from fraqat.numerics.qparams import Levels, QParams, clamp_codes, decode, encode, round_to_codes


def quantize(tensor: Tensor, qparams: QParams, grid: Grid, layout: BlockLayout) -> Tensor:
    """Values to integer codes: clamp(round((x - offset) / scale) + zero_point, qmin, qmax).

    Args:
        tensor: Values, any shape and floating dtype.
        qparams: Scale and zero point of the layout's scale shape.
        grid: The codes allowed.
        layout: Which elements share a scale.

    Returns:
        Codes of the tensor's shape: int8 if they fit, else uint8, int16, int32 or int64.

    Raises:
        ConfigError: The values hold NaN, which has no code. Infinity saturates.

    Numerics: computed in float32, above 24 bits in float64; ties round to even.
    """
    blocks = layout.split(tensor).to(choose_compute_dtype(tensor, grid))
    codes = encode(blocks, _cast(qparams, blocks.dtype), grid)
    if bool(torch.isnan(codes).any()):
        raise config_error("tensor", "nan", allowed="numbers and infinities", fix="find where the NaN comes from")
    return layout.join(codes, tuple(tensor.shape)).to(code_dtype(grid))


def dequantize(codes: Tensor, qparams: QParams, layout: BlockLayout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integer codes to values: scale * (code - zero_point) + offset, of the codes' shape, in `dtype`."""
    blocks = layout.split(codes).to(qparams.scale.dtype)
    return layout.join(decode(blocks, qparams), tuple(codes.shape)).to(dtype)


def fake_quantize(
    tensor: Tensor,
    qparams: QParams,
    levels: Levels,
    layout: BlockLayout,
    *,
    can_clip: bool = True,
    masks_gradient: bool = True,
) -> Tensor:
    """dequantize(quantize(x)) in floating point, differentiable by the straight-through estimator.

    Args:
        tensor: Values, any shape and floating dtype.
        qparams: Scale and zero point; constants for autograd.
        levels: A `Grid`, or its numbers as 0-dim tensors.
        layout: Which elements share a scale.
        can_clip: False promises that no code falls outside [qmin, qmax]: see `covers_every_value`. It changes no result and
            saves the clipping, its mask and their memory.
        masks_gradient: False passes the gradient of clipped values too: for a caller that applies the mask later, once for
            many backward passes.

    Returns:
        Values on the grid, shape and dtype of `tensor`.

    Gradient: to `tensor`, the incoming gradient where the rounded code lies inside [qmin, qmax], zero where it was clipped;
        none to the scale (the paper's Algorithm 1 trains the master weights only; see `fake_quantize_learned` for LSQ).

    Numerics: computed in float32 (float64 for float64 input or a `Grid` above 24 bits), ties to even, result rounded once to
        the tensor's dtype. NaN gives NaN. Infinity saturates when the scale is fixed; a scale measured on the same block is
        infinite then, and the whole block becomes NaN.
    """
    blocks = layout.split(tensor)
    compute_dtype = choose_compute_dtype(tensor, levels)
    output = _FakeQuantize.apply(blocks, _cast(qparams, compute_dtype), levels, compute_dtype, can_clip, masks_gradient)
    return layout.join(output, tuple(tensor.shape))


def code_dtype(grid: Grid) -> torch.dtype:
    """The smallest integer dtype that holds every code of the grid."""
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= grid.qmin and grid.qmax <= info.max:
            return dtype
    return torch.int64


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        blocks: Tensor,
        qparams: QParams,
        levels: Levels,
        compute_dtype: torch.dtype,
        can_clip: bool,
        masks_gradient: bool,
    ) -> Tensor:
        codes = round_to_codes(blocks.to(compute_dtype), qparams)
        ctx.has_mask = can_clip and masks_gradient
        if can_clip:
            rounded, codes = codes, clamp_codes(codes, levels)
            if masks_gradient:
                ctx.save_for_backward(codes == rounded)
        return decode(codes, qparams).to(blocks.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if not ctx.has_mask:
            return grad_outputs[0], None, None, None, None, None
        (is_inside,) = ctx.saved_tensors
        return grad_outputs[0] * is_inside, None, None, None, None, None


def choose_compute_dtype(tensor: Tensor, levels: Levels) -> torch.dtype:
    """float64 for float64 tensors and a `Grid` above 24 bits, else float32."""
    is_wide = isinstance(levels, Grid) and levels.bits > FLOAT32_EXACT_BITS
    return torch.float64 if tensor.dtype == torch.float64 or is_wide else torch.float32


def _cast(qparams: QParams, dtype: torch.dtype) -> QParams:
    if qparams.scale.dtype == dtype:
        return qparams

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    return QParams(qparams.scale.to(dtype), cast(qparams.zero_point), cast(qparams.offset), cast(qparams.multiplier))
