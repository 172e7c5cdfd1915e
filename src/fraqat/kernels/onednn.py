"""oneDNN's int8 linear of torch on x86 CPUs, with the weight's scale fused into the product."""

from __future__ import annotations

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
        return "" if torch.cpu._is_vnni_supported() else "the CPU has no VNNI"  # pyright: ignore[reportPrivateUsage]

    def prepare(self, codes_OK: Tensor) -> Tensor:
        """The codes in oneDNN's own blocked layout."""
        return torch.ops.onednn.qlinear_prepack(codes_OK, None)

    def product(self, operands: Operands, prepared: Tensor) -> Tensor:
        """Zero point and weight scale inside the kernel, token scale and bias after it."""
        zero_point = 0 if operands.zero_point is None else int(operands.zero_point)
        no_offset = torch.zeros_like(operands.weight_scale_O, dtype=torch.int32)
        y = torch.ops.onednn.qlinear_pointwise(
            operands.codes_MK,
            1.0,
            zero_point,
            prepared,
            operands.weight_scale_O,
            no_offset,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return finish_product(y, operands)
