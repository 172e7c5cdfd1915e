"""The two products of a backward pass, from the codes that the forward pass used.

Shape suffixes: M tokens, K input channels, O output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def input_gradient(grad_MO: Tensor, scale_O: Tensor, codes_OK: Tensor, dtype: torch.dtype) -> Tensor:
    """dX = (dY * scale) @ codes.

    Args:
        grad_MO: float32 or bfloat16.
        scale_O: float32, the weight's.
        codes_OK: int8, the weight's.
        dtype: Of the operands and of the result; every code is exact in bfloat16.

    Returns:
        [M, K] in `dtype`.

    Numerics: dY * scale is computed in float32 and rounded once; sums are float32.
    """
    return (grad_MO * scale_O).to(dtype) @ codes_OK.to(dtype)


def weight_gradient(
    grad_MO: Tensor, token_scale: Tensor, codes_MK: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dW = (dY * token_scale)^T @ (codes - zero_point).

    Args:
        grad_MO: float32 or bfloat16.
        token_scale: float32, [M] or [1].
        codes_MK: int8 or uint8, the input's.
        zero_point: int32, 0-dim, or None.
        dtype: Of the operands.

    Returns:
        [O, K] in `dtype`.

    Numerics: as `input_gradient`; codes less zero point, at most 255, are exact in bfloat16.
    """
    scaled_MO = (grad_MO * token_scale.unsqueeze(-1)).to(dtype)
    return scaled_MO.t() @ centred_codes(codes_MK, zero_point, dtype)


def centred_codes(codes_MK: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes - zero_point in `dtype`, exact."""
    values = codes_MK.to(dtype)
    return values if zero_point is None else values - zero_point.to(dtype)
