"""The teacher in less memory: weights in bfloat16 or int8, and one copy of what the student leaves as it is.

Shape suffixes: O output channels; an ellipsis is every other axis of a weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fraqat.distill.identity import keep_identity
from fraqat.distill.spec import TeacherDtype
from fraqat.errors import config_error
from fraqat.nn.quantizers import KeepsBufferDtype
from fraqat.nn.shards import is_sharded, own
from fraqat.numerics import BlockLayout, Granularity, Grid, RangeMethod, choose_qparams, quantize

_CODES, _SCALE = "stored_weight", "stored_scale"
_LET_GO: WeakSet[nn.Module] = WeakSet()


class StoredWeight(KeepsBufferDtype):
    """What the layers with a weight in fewer bytes share.

    Buffers: `stored_weight`, bfloat16 values or int8 codes of the weight's shape; `stored_scale`, float32 [O], with codes.
    `weight` is made of them at every call, in the dtype that it had.
    """

    stored_weight: Tensor
    stored_scale: Tensor | None
    weight_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The weight in its own dtype, a new tensor; under autocast in autocast's, which it would be rounded to anyway."""
        stored, scale_O = self.stored_weight, self.stored_scale
        device = stored.device.type
        is_autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else self.weight_dtype
        if scale_O is None:
            return stored.to(dtype)
        return (stored * scale_O.view(-1, *[1] * (stored.ndim - 1))).to(dtype)


class StoredLinear(StoredWeight, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`nn.Linear` with its weight in fewer bytes."""


class StoredConv1d(StoredWeight, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`nn.Conv1d` with its weight in fewer bytes."""


class StoredConv2d(StoredWeight, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`nn.Conv2d` with its weight in fewer bytes."""


_STORED: dict[type[nn.Module], type[StoredWeight]] = {
    nn.Linear: StoredLinear,
    nn.Conv1d: StoredConv1d,
    nn.Conv2d: StoredConv2d,
}


@dataclass(frozen=True)
class TeacherMemory:
    """How a teacher is held: bytes of its parameters and buffers, bytes of these that the student uses too, layers changed."""

    num_bytes: int
    shared_bytes: int
    num_stored: int


def hold_teacher_(teacher: nn.Module, student: nn.Module, dtype: TeacherDtype) -> TeacherMemory:
    """Shares what the student leaves as it is, then stores the other weights in fewer bytes.

    Args:
        teacher: Frozen; changed in place, see `store_weights_`.
        student: Its frozen parameters may use the teacher's memory from now on, see `share_frozen_`.
        dtype: Of the weights that are not shared.

    Raises:
        ConfigError: The teacher has left memory, or see `store_weights_`.
    """
    if teacher in _LET_GO:
        raise config_error(
            "teacher",
            "without weights",
            allowed="a teacher that has not left memory (train.teacher.outputs: recorded) in a run before",
            fix="load it again",
        )
    if dtype != "model":
        keep_identity(teacher)
    shared = share_frozen_(teacher, student)
    num_stored = store_weights_(teacher, dtype, keep=shared)
    sizes = {name: p.numel() * p.itemsize for name, p in teacher.named_parameters()}
    buffer_bytes = sum(buffer.numel() * buffer.itemsize for buffer in teacher.buffers())
    return TeacherMemory(sum(sizes.values()) + buffer_bytes, sum(sizes[name] for name in shared), num_stored)


@torch.no_grad()
def let_go_(teacher: nn.Module) -> None:
    """Lets the weights of a teacher leave memory, but for those that others use, and rows of a sharded one.

    It stays as a model with dtypes, shapes and device, all values NaN: whoever needs it again loads it anew.
    """
    keep_identity(teacher)
    _LET_GO.add(teacher)
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        if is_sharded(tensor):
            own(tensor).untyped_storage().resize_(0)
        else:
            tensor.data = tensor.new_full((), math.nan if tensor.is_floating_point() else 0).expand(tensor.shape)


@torch.no_grad()
def store_weights_(teacher: nn.Module, dtype: TeacherDtype, *, keep: Collection[str] = ()) -> int:
    """Keeps the weights of a frozen model's linear layers and convolutions in fewer bytes.

    Biases, norms and embeddings stay, and so does a weight that has another user (a head tied to the embeddings) or already
    has no more bytes than wanted. Layers that are stored already are left alone.

    Args:
        teacher: Changed in place; there is no way back.
        dtype: `model` changes nothing; `bfloat16` rounds; `int8` rounds to 8-bit codes with a scale for each output channel
            (Eq. 1, largest magnitude).
        keep: Names of parameters that stay as they are.

    Returns:
        How many weights were changed.

    Raises:
        ConfigError: A weight is NaN or infinite, or a parameter wants a gradient.
    """
    if dtype == "model":
        return 0
    if any(parameter.requires_grad for parameter in teacher.parameters()):
        raise config_error("train.teacher.dtype", dtype, allowed="model for a teacher that is trained", fix="freeze it")
    num_users = Counter(id(parameter) for _, parameter in teacher.named_parameters(remove_duplicate=False))
    kept = {id(teacher.get_parameter(name)) for name in keep}
    num_bytes = 1 if dtype == "int8" else 2
    chosen = [
        module
        for module in teacher.modules()
        if type(module) in _STORED
        and _weight(module).itemsize > num_bytes
        and num_users[id(module.weight)] == 1
        and id(module.weight) not in kept
    ]
    for module in chosen:
        _store_(module, dtype)
    return len(chosen)


@torch.no_grad()
def share_frozen_(teacher: nn.Module, student: nn.Module, *, compares: bool = True) -> tuple[str, ...]:
    """Lets frozen parameters of the student use the teacher's memory where name, dtype and every value are the same.

    Selective training (`quantize_(train="Attn")`) leaves most of the student as the teacher is. Loading a checkpoint copies
    equal values in place, and neither optimizer nor average touches a frozen parameter. Whoever changes such a parameter in
    place afterwards changes both models.

    Args:
        teacher: Frozen; keeps its tensors.
        student: Its parameters stay the same objects, with their ties.
        compares: False promises that parameters of one name, shape and dtype have equal values.

    Returns:
        Names of the parameters that are held once.
    """
    theirs = dict(teacher.named_parameters())
    shared: list[str] = []
    for name, mine in student.named_parameters():
        other = theirs.get(name)
        if other is None or mine.requires_grad or other.requires_grad or not _is_same(mine, other, compares):
            continue
        mine.data = other.data
        shared.append(name)
    return tuple(shared)


def _store_(module: nn.Module, dtype: TeacherDtype) -> None:
    weight = _weight(module).detach()
    if bool(~torch.isfinite(weight).all()):
        raise config_error(
            "train.teacher.dtype", dtype, allowed="model for weights with NaN or infinity", fix="mend them"
        )
    stored, scale = weight.to(torch.bfloat16), None
    if dtype == "int8":
        stored, scale = _int8_codes(weight)
    del module.weight
    module.__class__ = _STORED[type(module)]
    layer = cast(StoredWeight, module)
    layer.weight_dtype = weight.dtype
    layer.register_buffer(_CODES, stored)
    layer.register_buffer(_SCALE, scale)


def _int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    layout = BlockLayout(Granularity.CHANNEL)
    grid = Grid(8)
    qparams = choose_qparams(weight, grid, layout, RangeMethod.MAX_ABS)
    return quantize(weight, qparams, grid, layout), qparams.scale.flatten().float()


def _is_same(mine: Tensor, other: Tensor, compares: bool) -> bool:
    is_alike = mine.dtype == other.dtype and mine.shape == other.shape and mine.device == other.device
    return is_alike and mine.stride() == other.stride() and (not compares or torch.equal(mine, other))


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight
