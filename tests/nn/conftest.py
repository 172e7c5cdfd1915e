"""A small transformer with the names of diffusers' Sana, references in plain numpy, and a photograph of a module."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

WIDTH = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))
        return self.to_out[1](self.to_out[0](y))


class FeedForward(nn.Module):
    """Sana's: 1x1, depthwise 3x3, 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_inverted = nn.Conv2d(WIDTH, 2 * WIDTH, 1)
        self.conv_depth = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1, groups=2 * WIDTH)
        self.conv_point = nn.Conv2d(2 * WIDTH, WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_point(nn.functional.silu(self.conv_depth(self.conv_inverted(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn1 = Attention()
        self.ff = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attn1(self.norm(tokens))
        x = tokens.transpose(1, 2).reshape(x.shape)
        return x + self.ff(x)


class TinyTransformer(nn.Module):
    """[N, 4, 4, 4] -> [N, 4, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(4, WIDTH, 2, stride=2)
        self.transformer_blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.transformer_blocks:
            x = block(x)
        return self.proj_out(x.flatten(2).transpose(1, 2))


@pytest.fixture
def tiny() -> TinyTransformer:
    return TinyTransformer()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 4, 4, 4)


@pytest.fixture(scope="session")
def twin_names() -> tuple[str, ...]:
    """The layers of the tiny transformer that can be quantized, in order."""
    inner = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.conv_inverted", "ff.conv_point")
    return (*(f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in inner), "proj_out")


@pytest.fixture(scope="session")
def fake_rows() -> Callable[..., Tensor]:
    """Eq. 1 in float32 numpy on a matrix, one scale per row; bitwise what IEEE arithmetic gives."""

    def fake(rows: Tensor, bits: float) -> Tensor:
        x = rows.detach().numpy()
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(2.0 ** (bits - 1) - 1)
        half = math.floor(2.0 ** (bits - 1))
        return torch.from_numpy(np.clip(np.rint(x / scale), np.float32(-half), np.float32(half - 1)) * scale)

    return fake


@pytest.fixture(scope="session")
def photograph() -> Callable[[nn.Module], dict[str, Any]]:
    """Everything about a module that `quantize_` might change: compare two of them with ==."""

    def take(model: nn.Module) -> dict[str, Any]:
        return {
            "modules": {
                name: (id(m), type(m), m.training, sorted(m.__dict__), sorted(m._modules), sorted(m._buffers))
                for name, m in model.named_modules(remove_duplicate=False)
            },
            "hooks": {
                name: [list(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
                for name, m in model.named_modules()
            },
            "parameters": {
                name: (id(p), p.data_ptr(), p.dtype, p.device, p.requires_grad)
                for name, p in model.named_parameters(remove_duplicate=False)
            },
            "values": {name: t.detach().double().nan_to_num(7e77).tolist() for name, t in model.state_dict().items()},
            "class": type(model),
        }

    return take
