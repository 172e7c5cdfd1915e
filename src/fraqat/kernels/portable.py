"""Engines that need nothing but torch: codes held as floats, and torch's own integer product."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqat.kernels.product import Operands, scale_product

_FLOAT32_EXACT = 2**24
_LARGEST_PRODUCT = 255 * 128


class FloatCodes:
    """The codes as floating-point numbers, cut along the input channels so that no partial sum leaves float32's integers."""

    name = "float32"
    _chunk = _FLOAT32_EXACT // _LARGEST_PRODUCT

    def why_unavailable(self, device: torch.device) -> str:
        """Runs everywhere."""
        return ""

    def prepare(self, codes_OK: Tensor) -> Tensor:
        """The codes in float32, [O, K]."""
        return codes_OK.float()

    def product(self, operands: Operands, prepared: Tensor) -> Tensor:
        """The sum of exact partial sums, in float64 where there are several."""
        codes = operands.codes_MK.float()
        width = codes.shape[1]
        if width <= self._chunk:
            return scale_product(self._to_integer(codes @ prepared.t()), operands)
        total = torch.zeros(codes.shape[0], prepared.shape[0], dtype=torch.int64, device=codes.device)
        for start in range(0, width, self._chunk):
            part = slice(start, start + self._chunk)
            total += (codes[:, part] @ prepared[:, part].t()).to(torch.int64)
        return scale_product(total, operands)

    def _to_integer(self, product_MO: Tensor) -> Tensor:
        return product_MO.to(torch.int32)


class IntegerMatmul:
    """`torch._int_mm`: int8 times int8 to int32, then scaled."""

    name = "int_mm"

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
