"""Low-rank training: a frozen weight plus a trained product of two thin matrices, quantized together.

W_q = quantize(W + U D), so that the finished layer is a plain quantized layer with nothing beside it. The teacher is the same W
without the product: one copy of the weights serves both.

Shape suffixes: O output channels, K input channels, R rank.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fraqat.errors import config_error
from fraqat.nn.spec import STRICT_KEYS


@dataclass(frozen=True)
class LowRankSpec:
    """What is trained instead of the weights.

    Args:
        rank: Columns of the thin matrices; a layer that is thinner gets its own width.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise config_error("low_rank.rank", self.rank, allowed="1 or more", fix="choose a rank such as 32")


class LowRankAdapter(nn.Module):
    """U D: `up` [O, R] starts at zero, `down` [R, K] at random, both float32.

    Args:
        weight: The frozen weight, [O, K] or [O, K, 1, 1].
        rank: R.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        num_outputs, num_inputs = weight.flatten(1).shape
        rank = min(rank, num_outputs, num_inputs)
        self.up = nn.Parameter(torch.zeros(num_outputs, rank, device=weight.device))
        self.down = nn.Parameter(torch.empty(rank, num_inputs, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """W + U D in float32, of the weight's shape."""
        return self.added(weight, self.up, self.down)

    @staticmethod
    def added(weight: Tensor, up_OR: Tensor, down_RK: Tensor) -> Tensor:
        """`forward` with thin matrices that are given."""
        device = weight.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            product = up_OR.float() @ down_RK.float()
        return weight.float() + product.view(weight.shape)
