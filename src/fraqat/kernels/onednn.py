"""oneDNN's int8 linear of torch on x86 CPUs, with the weight's scale fused into the product."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fraqat.kernels.product import Operands, finish_product


class OneDnn:
    """`onednn.qlinear_pointwise`: exact sums, float32 or bfloat16 out."""

    name = "onednn"
    is_layout_cheap = False

    def why_unavailable(self, device: torch.device) -> str:
        """Runs on x86 CPUs whose torch was built with oneDNN."""
        if device.type != "cpu":
            return f"runs on cpu, not on {device.type}"
        if not torch.backends.mkldnn.is_available():
            return "this torch was built without oneDNN"
        if not torch.cpu._is_vnni_supported():  # pyright: ignore[reportPrivateUsage]
            return "the CPU has no VNNI"
        ratio = _slowness()
        return "" if ratio < _MAX_SLOWNESS else f"it takes {ratio:.0f} times as long as a float32 product on this CPU"

    def prepare(self, codes_OK: Tensor) -> Tensor:
        """The codes in oneDNN's own blocked layout."""
        return torch.ops.onednn.qlinear_prepack(codes_OK, None)

    def product(self, operands: Operands, prepared: Tensor) -> Tensor:
        """Zero point and weight scale inside the kernel, token scale and bias after it."""
        zero_point = 0 if operands.zero_point is None else int(operands.zero_point)
        y = _linear(operands.codes_MK, zero_point, prepared, operands.weight_scale_O)
        return finish_product(y, operands)


_PROBE_SIZE = 64
_MAX_SLOWNESS = 50.0
"""Of a small product against float32, far above what a kernel takes."""


@cache
def _slowness() -> float:
    """Time of a small product over that of float32, the lowest of three each; once for a process.

    On an AMD CPU with AVX512-VNNI a product of 4096 x 1152 x 1152 took two minutes, 4800 times as long as `torch._int_mm`: too
    long to be tried at its own shape. Why was not looked into.
    """
    codes = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=torch.int8)
    values, scale = codes.float(), torch.ones(_PROBE_SIZE)
    prepared = torch.ops.onednn.qlinear_prepack(codes, None)
    return _least_seconds(lambda: _linear(codes, 0, prepared, scale)) / _least_seconds(lambda: values @ values)


def _least_seconds(run: Callable[[], object]) -> float:
    run()
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _linear(codes_MK: Tensor, zero_point: int, prepared: Tensor, weight_scale_O: Tensor) -> Tensor:
    no_offset = torch.zeros_like(weight_scale_O, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        codes_MK, 1.0, zero_point, prepared, weight_scale_O, no_offset, None, 1.0, 0, torch.float32, "none", [], ""
    )
