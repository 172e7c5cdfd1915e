"""Engines that need nothing but torch: codes held as floats, and torch's own integer product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fraqat.kernels.product import Operands, scale_product

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
        """The sum of exact partial sums, in integers where there are several."""
        codes, num_inputs = operands.codes_MK, operands.codes_MK.shape[1]
        largest_product = prepared.largest * (255 if codes.dtype == torch.uint8 else 128)
        chunk = _FLOAT32_EXACT // largest_product
        if num_inputs <= chunk:
            return scale_product((codes.float() @ prepared.codes_OK.t()).to(torch.int32), operands)
        dtype = torch.int32 if 2 * num_inputs * largest_product < 2**31 else torch.int64
        total = torch.zeros(codes.shape[0], prepared.codes_OK.shape[0], dtype=dtype, device=codes.device)
        for start in range(0, num_inputs, chunk):
            part = slice(start, start + chunk)
            total += (codes[:, part].float() @ prepared.codes_OK[:, part].t()).to(dtype)
        return scale_product(total, operands)


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
        """Unsigned codes are moved by 128, which the zero point takes up again."""
        codes = operands.codes_MK
        if codes.dtype == torch.uint8:
            codes = (codes.to(torch.int16) - 128).to(torch.int8)
            assert operands.row_sums_O is not None
            sums = torch._int_mm(codes, prepared) + 128 * operands.row_sums_O  # pyright: ignore[reportPrivateUsage]
        else:
            sums = torch._int_mm(codes, prepared)  # pyright: ignore[reportPrivateUsage]
        return scale_product(sums, operands)
