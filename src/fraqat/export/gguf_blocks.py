"""Blocks of GGUF: Q4_0 of weights, packed from codes without rounding them again, and Q8_0 of inputs as llama.cpp makes them.

A Q4_0 block is 32 weights along the input in 18 bytes: the scale as little-endian float16, then 16 bytes of which byte i holds
code i + 8 in its low nibble and code i + 16, plus 8, in its high one; weight = scale * code. Reference: ggml-quants.c of
https://github.com/ggml-org/llama.cpp, functions dequantize_row_q4_0 and quantize_row_q8_0_ref.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqat.errors import config_error

BLOCK = 32
BLOCK_BYTES = 18
_HALF = BLOCK // 2


def pack_q4_0(codes_OI: Tensor, scale_OB: Tensor, name: str) -> Tensor:
    """Q4_0 bytes of a matrix.

    Args:
        codes_OI: Integers in [-8, 7]; I is a multiple of 32.
        scale_OB: Scale of every block, B = I / 32. A block of zeros may have any scale: 0 is written.
        name: For messages.

    Returns:
        uint8 [O, B * 18].

    Raises:
        ConfigError: A code or the width does not fit, or float16 does not hold a scale exactly.
    """
    if codes_OI.shape[1] % BLOCK:
        raise config_error(f"{name}.in_features", codes_OI.shape[1], allowed="multiples of 32", fix="leave it float")
    low, high = (int(codes_OI.min()), int(codes_OI.max())) if codes_OI.numel() else (0, 0)
    if low < -8 or high > 7:
        raise config_error(f"{name}.codes", [low, high], allowed="-8 to 7", fix="train with 4 bits or fewer")
    blocks_OBK = codes_OI.to(torch.int16).unflatten(1, (-1, BLOCK))
    used_OB = torch.where((blocks_OBK != 0).any(-1), scale_OB, 0)
    half_OB = used_OB.to(torch.float16)
    wrong = half_OB.to(scale_OB.dtype) != used_OB
    if bool(wrong.any()):
        raise config_error(
            f"{name}.weight.scale",
            float(used_OB[wrong][0]),
            allowed="numbers that float16 holds exactly",
            fix="train with scale_dtype: float16 (scales in bfloat16 fit from 2^-17 to 65504 only)",
        )
    stored = (blocks_OBK + 8).to(torch.uint8)
    nibbles = stored[..., :_HALF] | (stored[..., _HALF:] << 4)
    return torch.cat([half_OB.unsqueeze(-1).view(torch.uint8), nibbles], dim=-1).flatten(1)


def unpack_q4_0(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Undoes `pack_q4_0`.

    Args:
        packed: uint8 [O, B * 18].

    Returns:
        Codes int8 [O, B * 32] and scales float32 [O, B].
    """
    blocks = packed.unflatten(1, (-1, BLOCK_BYTES))
    scale_OB = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).to(torch.float32)
    nibbles = blocks[..., 2:]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).to(torch.int8) - 8
    return codes.flatten(1), scale_OB


def dequantize_q4_0(codes_OI: Tensor, scale_OB: Tensor) -> Tensor:
    """Weights in float32 [O, I]: one rounding per weight, as in the student."""
    return (codes_OI.unflatten(1, (-1, BLOCK)).to(torch.float32) * scale_OB.unsqueeze(-1)).flatten(1)


def round_to_q8_0(x: Tensor) -> Tensor:
    """`x` as llama.cpp's integer products on the CPU see it.

    Equation: per block of 32, d = max|x| / 127, q = round(x / d) with halves away from zero, value = float16(d) * q.

    Args:
        x: [..., I], I a multiple of 32.

    Returns:
        The same shape and dtype.
    """
    blocks = x.to(torch.float32).unflatten(-1, (-1, BLOCK))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    ratio = torch.where(d > 0, blocks * torch.where(d > 0, 1 / d, 0), 0)
    codes = torch.trunc(ratio + 0.5 * torch.sign(ratio))
    return (codes * d.to(torch.float16).to(torch.float32)).flatten(-2).to(x.dtype)
