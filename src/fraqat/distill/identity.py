"""Which model a checkpoint belongs to."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_KEPT: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@torch.no_grad()
def identity(model: nn.Module) -> str:
    """A number that another model, or the same with other weights, is most unlikely to have: class, shapes and a sum of the
    weights' bits, the same on every device. That of `keep_identity` where a model has one."""
    if model in _KEPT:
        return _KEPT[model]
    total = 0
    for name, parameter in sorted(model.named_parameters()):
        bits = parameter.detach().contiguous().view(_INTEGERS[parameter.itemsize])
        total += int(bits.sum(dtype=torch.int64)) * (1 + sum(name.encode()))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__} of {num_parameters} parameters, {total % 2**64:016x}"


def keep_identity(model: nn.Module) -> None:
    """Lets a model keep its identity before it is changed for good: it stays the same teacher in fewer bytes."""
    if model not in _KEPT and all(not parameter.is_meta for parameter in model.parameters()):
        _KEPT[model] = identity(model)
