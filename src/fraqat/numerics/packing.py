"""Integer codes <-> packed bytes: little-endian bit order, so 4-bit codes lie low nibble first."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqat.errors import config_error


def pack_codes(codes: Tensor, num_bits: int) -> Tensor:
    """Packs the last axis of integer codes into bytes.

    Args:
        codes: [..., n] integers that fit in `num_bits` bits: two's complement if any is negative, else unsigned.
        num_bits: Bits per code, 1 to 8.

    Returns:
        uint8 [..., ceil(n * num_bits / 8)]; unused bits at the end are zero.

    Raises:
        ConfigError: A code does not fit, or `num_bits` is out of range.
    """
    _check_num_bits(num_bits)
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < -(2 ** (num_bits - 1)) or high >= 2**num_bits or (low < 0 and high >= 2 ** (num_bits - 1)):
        raise config_error("codes", [low, high], allowed=f"integers of {num_bits} bits", fix="pack with more bits")
    unsigned = codes.to(torch.int16) & (2**num_bits - 1)
    bits = (unsigned.unsqueeze(-1) >> torch.arange(num_bits, dtype=torch.int16, device=codes.device)) & 1
    stream = bits.flatten(-2).to(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return (stream.unflatten(-1, (-1, 8)) * place).sum(dim=-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, num_bits: int, length: int, *, signed: bool) -> Tensor:
    """Undoes `pack_codes`.

    Args:
        packed: uint8 [..., bytes].
        num_bits: Bits per code, 1 to 8.
        length: Number of codes on the last axis.
        signed: Read two's complement.

    Returns:
        [..., length]: int8 if signed, else uint8.

    Raises:
        ConfigError: The bytes do not hold `length` codes.
    """
    _check_num_bits(num_bits)
    needed = -(-length * num_bits // 8)
    if packed.shape[-1] != needed:
        raise config_error("packed bytes per row", packed.shape[-1], allowed=f"{needed}", fix="write the file again")
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    bits = bits.flatten(-2)[..., : length * num_bits].unflatten(-1, (length, num_bits)).to(torch.int16)
    place = 2 ** torch.arange(num_bits, dtype=torch.int16, device=packed.device)
    if signed:
        place[-1] = -place[-1]
    return (bits * place).sum(dim=-1, dtype=torch.int16).to(torch.int8 if signed else torch.uint8)


def _check_num_bits(num_bits: int) -> None:
    if not 1 <= num_bits <= 8:
        raise config_error("num_bits", num_bits, allowed="1 to 8", fix="store wider codes as int16 or int32")
