"""Quantizers of inputs and weights as single passes over memory, where an engine has one; the same codes as torch's own.

Shape suffixes: M tokens, K input channels, O output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqat.kernels import native
from fraqat.kernels.blocks import row_blocks
from fraqat.kernels.engine import PreparedWeight

_SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)
_LARGEST_CODE = 127
_DTYPES = (torch.float32, torch.bfloat16)
_NATIVE = native.Native()


@torch.library.custom_op("fraqat::quantize_tokens", mutates_args=())
def quantize_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit codes of each token, scaled by its largest magnitude.

    scale = max(max|x| / 127, least normal float32), codes = round(x / scale)

    Args:
        x_MK: Any floating dtype but float64; contiguous.

    Returns:
        int8 codes [M, K] and float32 scales [M]; a token with NaN or infinity has a scale that is not finite.

    Numerics: computed in float32, ties to even; the same bits on every path of a CPU.
    """
    if x_MK.dtype in _DTYPES and not _NATIVE.why_unavailable(x_MK.device):
        return native.quantize_tokens(x_MK)
    if x_MK.device.type == "cuda":
        from fraqat.kernels.triton import Triton

        if not (triton := Triton()).why_unavailable(x_MK.device):
            return triton.quantize_tokens(x_MK)
    blocks = row_blocks(x_MK.shape[0], 4 * x_MK.shape[1], x_MK.device)
    if len(blocks) == 1:
        return _quantize_rows(x_MK)
    codes_MK, scale_M = torch.empty_like(x_MK, dtype=torch.int8), x_MK.new_empty(x_MK.shape[0], dtype=torch.float32)
    for rows in blocks:
        codes_MK[rows], scale_M[rows] = _quantize_rows(x_MK[rows])
    return codes_MK, scale_M


def _quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    x = x_MK.float()
    scale = (x.abs().amax(-1) / _LARGEST_CODE).clamp(min=_SMALLEST_SCALE)
    return torch.round(x / scale.unsqueeze(-1)).to(torch.int8), scale


@quantize_tokens.register_fake
def _(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_MK, dtype=torch.int8), x_MK.new_empty(x_MK.shape[0], dtype=torch.float32)


@torch.library.custom_op("fraqat::quantize_stochastic", mutates_args=())
def quantize_stochastic(x_MK: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_tokens` with stochastic rounding: a code is x / scale on average over the seeds.

    scale = max(max|x| / 127, least normal float32), codes = floor(x / scale + u), u uniform in [0, 1)

    Args:
        x_MK: Any floating dtype but float64; contiguous.
        seed: int64, 0-dim, on the CPU, 0 to 2^31 - 1: the same seed gives the same codes on the same kind of device.

    Returns:
        int8 codes [M, K] within [-127, 127], and float32 scales [M]; a token that is not finite has such a scale.
    """
    if x_MK.device.type == "cuda":
        from fraqat.kernels.triton import Triton

        if not (triton := Triton()).why_unavailable(x_MK.device):
            return triton.quantize_stochastic(x_MK, int(seed))
    x = x_MK.float()
    scale = (x.abs().amax(-1) / _LARGEST_CODE).clamp(min=_SMALLEST_SCALE)
    generator = torch.Generator(x.device).manual_seed(int(seed))
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    codes = noise.add_(x / scale.unsqueeze(-1)).floor_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return codes.to(torch.int8), scale


@quantize_stochastic.register_fake
def _(x_MK: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_MK, dtype=torch.int8), x_MK.new_empty(x_MK.shape[0], dtype=torch.float32)


def quantize_weight(
    weight_OK: Tensor,
    scale_O: Tensor,
    qmin: int,
    qmax: int,
    codes_OK: Tensor,
    row_sums_O: Tensor,
    prepared: PreparedWeight,
    *,
    divisor: float | None = None,
) -> bool:
    """Codes of a weight in one pass, in the layout of the engine that has one: clamp(round(weight / scale), qmin, qmax).

    Args:
        weight_OK: Master weight.
        scale_O: float32, one per output channel.
        qmin, qmax: Smallest and largest code, within int8.
        codes_OK: int8, receives the codes.
        row_sums_O: int32, receives their sums.
        prepared: Receives the layout; the others are forgotten.
        divisor: With one the scales are made here, in the same pass: max|row| / divisor, and `scale_O` receives them.

    Returns:
        False where no engine has such a pass; nothing is changed then.
    """
    if weight_OK.dtype not in _DTYPES or not weight_OK.is_contiguous() or _NATIVE.why_unavailable(weight_OK.device):
        return False
    *_, packed = native.quantize_and_pack(
        weight_OK,
        scale_O,
        qmin,
        qmax,
        divisor=divisor,
        codes_OK=codes_OK,
        row_sums_O=row_sums_O,
        packed=prepared.layout(_NATIVE.name),
    )
    prepared.renew({_NATIVE.name: packed})
    return True
