"""Scales that are trained by gradient descent: LSQ, learned step size quantization (Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fraqat.numerics.fake_quant import choose_compute_dtype
from fraqat.numerics.granularity import BlockLayout
from fraqat.numerics.qparams import Levels, QParams, clamp_codes, decode, encode, finish_scale, round_to_codes


def fake_quantize_learned(
    tensor: Tensor, scale: Tensor, levels: Levels, layout: BlockLayout, *, scale_dtype: torch.dtype | None = None
) -> Tensor:
    """`fake_quantize` on a symmetric grid with a scale that receives a gradient.

    Args:
        tensor: Values, any shape and floating dtype.
        scale: float32, of the layout's scale shape. What is used is `finish_scale` of it: rounded to `scale_dtype`, at least
            `MIN_SCALE`.
        levels: Symmetric `Grid`, or its numbers as 0-dim tensors.
        layout: Which elements share a scale.
        scale_dtype: Round the scale to this dtype.

    Returns:
        Values on the grid, shape and dtype of `tensor`; bit for bit those of `fake_quantize` with the same scale.

    Gradient: see `learned_scale_gradients`. Rounding and the lower bound of the scale are passed straight through, so that a
        scale that fell to the bound can rise again.

    Numerics: as `fake_quantize`. Nothing but the tensor and the scale is kept for the backward pass.
    """
    blocks = layout.split(tensor)
    compute_dtype = choose_compute_dtype(tensor, levels)
    output = _FakeQuantizeLearned.apply(blocks, scale, levels, layout, compute_dtype, scale_dtype)
    return layout.join(output, tuple(tensor.shape))


def learned_scale_gradients(
    grad: Tensor, tensor: Tensor, qparams: QParams, levels: Levels, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    """Gradients to a tensor and to its scale from the one to its quantized values; linear in `grad`.

    To the tensor: grad where the rounded code lies inside [qmin, qmax], else 0.
    To the scale, the sum over the elements of its block, with LSQ's factor (Eq. 3 and section 2.2):

        1 / sqrt(N max(qmax, 1)) * sum grad * (round(x / s) - x / s   inside,   qmin or qmax   where clipped)

    N is the number of elements that share the scale; the paper has one scale per layer, hence its N is that of the layer.
    Inside is decided after rounding, as for the tensor's own gradient; the paper decides before it, which differs for values
    less than half a step beyond the last code.

    Args:
        grad: Gradient to the quantized values, of the tensor's shape.
        tensor: The values that were quantized.
        qparams: The scale that was used, without zero point or offset.
        levels: Their grid.
        layout: Which elements share a scale.

    Returns:
        Gradient to `tensor`, shape and dtype of `grad`, and to the scale, its shape, in the compute dtype.

    Numerics: computed in float32, above 24 bits and for float64 tensors in float64.
    """
    blocks, grad_blocks = layout.split(tensor), layout.split(grad)
    dims = layout.reduce_dims(blocks.ndim)
    blocks = blocks.to(choose_compute_dtype(tensor, levels))
    used = QParams(qparams.scale.to(blocks.dtype))
    rounded = round_to_codes(blocks, used)
    codes = clamp_codes(rounded, levels)
    is_inside = codes == rounded
    slope = torch.where(is_inside, codes - blocks / used.scale, codes)
    grad_scale = (grad_blocks * slope).sum(dim=dims, keepdim=True) * _gradient_factor(blocks, levels, dims)
    return layout.join(grad_blocks * is_inside, tuple(grad.shape)), grad_scale


def _gradient_factor(blocks: Tensor, levels: Levels, dims: tuple[int, ...]) -> Tensor:
    qmax = torch.as_tensor(levels.qmax, dtype=blocks.dtype, device=blocks.device)
    num_elements = 1
    for dim in dims:
        num_elements *= blocks.shape[dim]
    return torch.rsqrt(num_elements * qmax.clamp(min=1.0))  # below 2 bits no code is positive


class _FakeQuantizeLearned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        blocks: Tensor,
        scale: Tensor,
        levels: Levels,
        layout: BlockLayout,
        compute_dtype: torch.dtype,
        scale_dtype: torch.dtype | None,
    ) -> Tensor:
        used = QParams(finish_scale(scale.to(compute_dtype), scale_dtype))
        ctx.save_for_backward(blocks, used.scale)
        ctx.levels, ctx.layout, ctx.scale_dtype = levels, layout, scale.dtype
        return decode(encode(blocks.to(compute_dtype), used, levels), used).to(blocks.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        blocks, scale = ctx.saved_tensors
        grad_blocks, grad_scale = learned_scale_gradients(
            grad_outputs[0], blocks, QParams(scale), ctx.levels, ctx.layout
        )
        return grad_blocks, grad_scale.to(ctx.scale_dtype), None, None, None, None
