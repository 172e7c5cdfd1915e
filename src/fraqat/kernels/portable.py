"""Engines that need nothing but torch: codes held as floats, and torch's own integer product."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from fraqat.kernels.blocks import sum_blocks, token_blocks
from fraqat.kernels.product import Operands, product_in_blocks

_FLOAT32_EXACT = 2**24


class _Floats(NamedTuple):
    """Codes of a weight in float32, [O, K], and their largest magnitude."""

    codes_OK: Tensor
    largest: int


class FloatCodes:
    """The codes as floating-point numbers, cut along the input channels so that no partial sum leaves float32's integers."""

    name = "float32"
    is_layout_cheap = True

    def why_unavailable(self, device: torch.device) -> str:
        """Runs everywhere."""
        return ""

    def prepare(self, codes_OK: Tensor) -> _Floats:
        """The codes in float32, and how large they are: narrow ones need fewer cuts."""
        largest = max(-int(codes_OK.min()), int(codes_OK.max()), 1) if codes_OK.numel() else 1
        return _Floats(codes_OK.float(), largest)

    def product(self, operands: Operands, prepared: _Floats) -> Tensor:
        """The sum of exact partial sums, in integers where there are several; on a CPU in blocks of tokens."""
        num_outputs, num_inputs = prepared.codes_OK.shape
        rows = token_blocks(operands.num_tokens, 4 * max(num_inputs, num_outputs), operands.codes_MK.device)
        blocks = [(tokens, slice(0, num_outputs)) for tokens in rows]
        return product_in_blocks(operands, num_outputs, blocks, lambda part, _: self._sums(part, prepared))

    def _sums(self, operands: Operands, prepared: _Floats) -> Tensor:
        codes, num_inputs = operands.codes_MK, operands.codes_MK.shape[1]
        largest_product = prepared.largest * (255 if codes.dtype == torch.uint8 else 128)
        chunk = _FLOAT32_EXACT // largest_product
        if num_inputs <= chunk:
            return (codes.float() @ prepared.codes_OK.t()).to(torch.int32)
        dtype = torch.int32 if 2 * num_inputs * largest_product < 2**31 else torch.int64
        total = torch.zeros(codes.shape[0], prepared.codes_OK.shape[0], dtype=dtype, device=codes.device)
        for start in range(0, num_inputs, chunk):
            part = slice(start, start + chunk)
            total += (codes[:, part].float() @ prepared.codes_OK[:, part].t()).to(dtype)
        return total


class IntegerMatmul:
    """`torch._int_mm`: int8 times int8 to int32, then scaled."""

    name = "int_mm"
    is_layout_cheap = False

    def why_unavailable(self, device: torch.device) -> str:
        """Runs on a CPU and on CUDA devices with int8 matrix units."""
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
            return "needs compute capability 7.5"
        return "" if device.type in ("cpu", "cuda") else f"runs on cpu and cuda, not on {device.type}"

    def prepare(self, codes_OK: Tensor) -> Tensor:
        """The codes, transposed; a row with strides (1, 1) gives wrong products (torch 2.13, CPU)."""
        return codes_OK.reshape(1, -1) if codes_OK.shape[1] == 1 else codes_OK.t()

    def product(self, operands: Operands, prepared: Tensor) -> Tensor:
        """On a CPU in blocks of output channels. Unsigned codes are moved by 128, and the zero point with them."""
        if operands.codes_MK.dtype == torch.uint8:
            assert operands.zero_point is not None
            codes_MK = (operands.codes_MK ^ 128).view(torch.int8)  # flips the highest bit: x - 128
            operands = dataclasses.replace(operands, codes_MK=codes_MK, zero_point=operands.zero_point - 128)
        num_outputs = prepared.shape[1]
        blocks = sum_blocks(operands.num_tokens, num_outputs, operands.codes_MK.device)

        def sums_of(part: Operands, outputs: slice) -> Tensor:
            return torch._int_mm(part.codes_MK, prepared[:, outputs])  # pyright: ignore[reportPrivateUsage]

        return product_in_blocks(operands, num_outputs, blocks, sums_of)
