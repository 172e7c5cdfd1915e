"""The two products of a backward pass, from the codes that the forward pass used.

Shape suffixes: M tokens, K input channels, O output channels.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from fraqat.kernels import native
from fraqat.kernels.blocks import row_blocks

_DTYPES = (torch.float32, torch.bfloat16)
_NATIVE = native.Native()
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_HAS_SLOW_BFLOAT16 = _IS_X86 and not (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether products in bfloat16 run in torch's plain loops on this CPU, ten times and more slower than those in float32."""


def has_native_gradients(device: torch.device) -> bool:
    """Whether the products of bfloat16 have a kernel of our own on a device; fixed, so that results never depend on timing."""
    return not _NATIVE.why_unavailable(device)


def input_gradient(
    grad_MO: Tensor, scale_O: Tensor, codes_OK: Tensor, dtype: torch.dtype, *, is_native: bool = False
) -> Tensor:
    """dX = (dY * scale) @ codes.

    Args:
        grad_MO: float32 or bfloat16.
        scale_O: float32, the weight's.
        codes_OK: int8, the weight's.
        dtype: Of the operands and of the result; every code is exact in bfloat16.
        is_native: What `has_native_gradients` says.

    Returns:
        [M, K] in `dtype`.

    Numerics: dY * scale is computed in float32 and rounded once to `dtype`; sums are float32. A CPU without products in
        bfloat16 multiplies the rounded operands in float32 and rounds the result.
    """
    if is_native and dtype == torch.bfloat16 and grad_MO.dtype in _DTYPES:
        return _native_input_gradient(grad_MO.contiguous(), scale_O, codes_OK)
    return _product(_scaled(grad_MO, scale_O.unsqueeze(0), dtype), codes_OK, dtype).to(dtype)


def weight_gradient(
    grad_MO: Tensor,
    token_scale: Tensor,
    codes_MK: Tensor,
    zero_point: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    is_native: bool = False,
) -> Tensor:
    """dW = (dY * token_scale)^T @ (codes - zero_point).

    Args:
        grad_MO: float32 or bfloat16.
        token_scale: float32, [M] or [1].
        codes_MK: int8 or uint8, the input's.
        zero_point: int32, 0-dim, or None.
        dtype: Of the operands.
        out_dtype: Of the result.
        is_native: What `has_native_gradients` says.

    Returns:
        [O, K] in `out_dtype`.

    Numerics: as `input_gradient`; codes less zero point, at most 255, are exact in bfloat16. The native kernel, and a CPU
        without products in bfloat16, round sums to `out_dtype` alone, the other path to `dtype` before.
    """
    if is_native and dtype == torch.bfloat16 and grad_MO.dtype in _DTYPES and out_dtype in _DTYPES:
        return _native_weight_gradient(grad_MO.contiguous(), token_scale, codes_MK, zero_point, out_dtype)
    scaled_MO = _scaled(grad_MO, token_scale.unsqueeze(-1), dtype)
    return _product(scaled_MO.t(), centred_codes(codes_MK, zero_point, dtype), dtype).to(out_dtype)


def _scaled(grad_MO: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale, [1, O], [M, 1] or [1, 1], in float32, rounded to `dtype`; the same bits in blocks of rows."""
    blocks = row_blocks(grad_MO.shape[0], 4 * grad_MO.shape[1], grad_MO.device)
    if len(blocks) == 1 or grad_MO.dtype == dtype == torch.float32:  # in float32 there is nothing to round
        return (grad_MO * scale).to(dtype)
    scaled_MO = torch.empty_like(grad_MO, dtype=dtype)
    for rows in blocks:
        scaled_MO[rows] = grad_MO[rows] * (scale if len(scale) == 1 else scale[rows])
    return scaled_MO


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left, of `dtype`, times integers that `dtype` holds; in `dtype` or in float32, whichever the device is made for."""
    if _HAS_SLOW_BFLOAT16 and dtype == torch.bfloat16 and left.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return left.float() @ right.float()
    return left @ right.to(dtype)


def centred_codes(codes_MK: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes - zero_point in `dtype`, exact."""
    values = codes_MK.to(dtype)
    return values if zero_point is None else values - zero_point.to(dtype)


@torch.library.custom_op("fraqat::native_input_gradient", mutates_args=())
def _native_input_gradient(grad_MO: Tensor, scale_O: Tensor, codes_OK: Tensor) -> Tensor:
    return native.input_gradient(grad_MO, scale_O, codes_OK, torch.bfloat16)


@_native_input_gradient.register_fake
def _(grad_MO: Tensor, scale_O: Tensor, codes_OK: Tensor) -> Tensor:
    return grad_MO.new_empty((grad_MO.shape[0], codes_OK.shape[1]), dtype=torch.bfloat16)


@torch.library.custom_op("fraqat::native_weight_gradient", mutates_args=())
def _native_weight_gradient(
    grad_MO: Tensor, token_scale: Tensor, codes_MK: Tensor, zero_point: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    number = 0 if zero_point is None else int(zero_point)
    return native.weight_gradient(grad_MO, token_scale, codes_MK, number, out_dtype)


@_native_weight_gradient.register_fake
def _(
    grad_MO: Tensor, token_scale: Tensor, codes_MK: Tensor, zero_point: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return grad_MO.new_empty((grad_MO.shape[1], codes_MK.shape[1]), dtype=out_dtype)
