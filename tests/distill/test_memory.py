"""Laws of memory: what a training step keeps, in bytes per element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.nn import EngineSpec, IntegerLayers, quantize_

WIDTH, NUM_LAYERS, NUM_TOKENS = 256, 4, 64
BUDGET = 1.1
"""Bytes that the linear layers keep for one element of their inputs: a code, and a share of the token's float32 scale."""


class KeptBytes:
    """Bytes of the storages that autograd keeps while this context is open; each storage counts once.

    Args:
        apart: Tensors that are there anyway, such as weights: their storages do not count.
    """

    def __init__(self, apart: list[Tensor]):
        self.apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self.sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an address is only unique as long as its storage lives
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._hooks.__exit__(*arguments)

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.apart:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor


def linear_stack() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=True) for _ in range(NUM_LAYERS)))


def kept_per_input_element(model: nn.Module, x: Tensor, autocast: bool) -> float:
    there = [*model.parameters(), *model.buffers()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), KeptBytes(there) as kept:
        y = model(x)
    loss = y.float().square().sum()
    loss.backward()
    return kept.num_bytes / (NUM_LAYERS * x.numel())


@pytest.mark.parametrize("autocast", [False, True])
def test_integer_layers_keep_a_byte_for_an_input_element(autocast: bool) -> None:
    model, x = linear_stack(), torch.randn(4, NUM_TOKENS // 4, WIDTH, requires_grad=True)
    quantize_(model)
    layers = IntegerLayers(model, EngineSpec())
    assert layers.num_layers == NUM_LAYERS
    kept = kept_per_input_element(model, x, autocast)
    assert 1.0 <= kept <= BUDGET
    layers.release_()
    assert (
        kept_per_input_element(model, x, autocast) > 2 * BUDGET
    )  # fake quantization keeps the input in floating point


def test_layers_with_the_same_input_keep_it_once() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Any:
            return self.query(x) + self.key(x) + self.value(x)

    model, x = Three(), torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    quantize_(model)
    layers = IntegerLayers(model, EngineSpec())
    there = [*model.parameters(), *model.buffers()]
    with KeptBytes(there) as kept:
        model(x).sum()
    assert layers.num_layers == 3
    assert kept.num_bytes <= BUDGET * x.numel()
