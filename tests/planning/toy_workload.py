"""A small transformer-like network on the meta device, for plans in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fraqat.nn import quantize_
from fraqat.planning import Workload

WIDTH, HIDDEN, NUM_BLOCKS, LENGTH = 32, 64, 2, 8


class Block(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class GatedBlock(Block):
    """More between its products, as in a transformer of today."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x) * x.sigmoid() + 1)
        return x + self.down(nn.functional.silu(h) * h.tanh())


class ToyNetwork(nn.Module):
    """Blocks on [N, T, width]."""

    def __init__(
        self, width: int = WIDTH, hidden: int = HIDDEN, num_blocks: int = NUM_BLOCKS, block: type[Block] = Block
    ):
        super().__init__()
        self.blocks = nn.ModuleList([block(width, hidden) for _ in range(num_blocks)])
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def predict(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    return {"output": model(inputs["x"].to(next(model.parameters()).dtype))}


def make_inputs(num_samples: int) -> dict[str, Tensor]:
    return {"x": torch.empty(num_samples, LENGTH, WIDTH, device="meta")}


def make_student(**sizes: int) -> nn.Module:
    with torch.device("meta"):
        model = ToyNetwork(**sizes)
    quantize_(model)
    return model


def make_workload(student: nn.Module | None = None, **changes: Any) -> Workload:
    return Workload(student if student is not None else make_student(), predict, make_inputs, **changes)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
