"""Which model a checkpoint belongs to, and which inputs an output."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fraqat.distill.task import Batch

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
        total += int(_bits(parameter).sum(dtype=torch.int64)) * (1 + sum(name.encode()))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__} of {num_parameters} parameters, {total % 2**64:016x}"


def keep_identity(model: nn.Module) -> None:
    """Lets a model keep its identity before it is changed for good: it stays the same teacher in fewer bytes."""
    if model not in _KEPT and all(not parameter.is_meta for parameter in model.parameters()):
        _KEPT[model] = identity(model)


@torch.no_grad()
def inputs_identity(inputs: Batch) -> str:
    """A number that other inputs, or the same rows in another order, are most unlikely to have; the same on every device."""
    total = 0
    for name, value in sorted(inputs.items()):
        factor = 1 + sum(name.encode())
        if not isinstance(value, Tensor):
            total += int(hashlib.sha256(repr(value).encode()).hexdigest()[:16], 16) * factor
            continue
        rows = _bits(value).reshape(value.shape[0] if value.ndim else 1, -1).sum(1, dtype=torch.int64)
        places = torch.arange(1, len(rows) + 1, device=rows.device)
        total += (int((rows * (2 * places + 1)).sum()) + sum(value.shape)) * factor
    return f"{total % 2**64:016x}"


def _bits(tensor: Tensor) -> Tensor:
    """The bits of every element as a whole number."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.itemsize])
