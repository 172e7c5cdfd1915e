"""Modules that hold the state of quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn


class KeepsBufferDtype(nn.Module):
    """Buffers follow `.to(device)` but keep their dtype: a bf16 model must not round its levels or scales."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(device=moved.device)
        return self


class OtherWidths(KeepsBufferDtype):
    """What a weight quantizer has learned or searched for the widths that it serves and does not have now.

    A learned scale is a parameter here, `mse` clipping a buffer; both are saved, as `w8` or `w5_5`.

    Args:
        widths: All that are served, the present one among them.
    """

    def __init__(self, widths: Iterable[float]):
        super().__init__()
        self.widths = frozenset(widths)

    def scales(self) -> dict[float, nn.Parameter]:
        """The learned scales that are here, by width, ascending."""
        found = ((bits, getattr(self, _name(bits), None)) for bits in sorted(self.widths))
        return {bits: state for bits, state in found if isinstance(state, nn.Parameter)}

    def put_(self, bits: float, state: Tensor) -> None:
        """Keeps the state of a width."""
        if isinstance(state, nn.Parameter):
            self.register_parameter(_name(bits), state)
        else:
            self.register_buffer(_name(bits), state)

    def take_(self, bits: float) -> Tensor:
        """Gives the state of a width back, which is then no longer here."""
        state = getattr(self, _name(bits))
        assert isinstance(state, torch.Tensor)
        delattr(self, _name(bits))
        return state


def _name(bits: float) -> str:
    return f"w{bits:g}".replace(".", "_")
