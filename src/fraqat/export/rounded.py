"""Linear layers of a read file that round their inputs as a target's runtime does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

import torch
from torch import Tensor, nn

Rounding = Callable[[Tensor], Tensor]
"""An input [..., I] -> what the runtime multiplies, same shape and dtype."""


@final
class RoundedLinear(nn.Module):
    """A float linear layer behind a rounding.

    Args:
        linear: Its weight and bias are taken over.
        rounding: Of the input.
    """

    def __init__(self, linear: nn.Linear, rounding: Rounding):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.rounding = rounding

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return nn.functional.linear(self.rounding(input), self.weight, self.bias)


def round_inputs_(model: nn.Module, names: Iterable[str], rounding: Rounding) -> None:
    """Puts a `RoundedLinear` in the place of the named linear layers."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, RoundedLinear(layer, rounding))


def round_to_int8_per_token(x: Tensor) -> Tensor:
    """Scale per token = max|x| / 127, codes to even: Eq. 1 at 8 bits, and dynamic_scaled_int8_quant of vLLM."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    codes = torch.where(scale > 0, x / scale, 0).round()
    return (codes * scale).to(x.dtype)
