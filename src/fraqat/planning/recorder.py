"""Records what a step allocates and computes, operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fraqat import kernels


def _integer_product_flops(codes: Any, token_scale: Any, weight_codes: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * codes.shape[0] * weight_codes.shape[0] * weight_codes.shape[1]


assert kernels.scaled_product is not None  # imported for its operator
_INTEGER_PRODUCT: Any = torch.ops.fraqat.scaled_product
_NO_WORK = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_ROW_READS = frozenset({"embedding", "index_select", "gather", "index"})


@cache
def _flop_formulas() -> dict[Any, Callable[..., int]]:
    """Operations of an operator's call, from its arguments."""
    from torch.utils.flop_counter import flop_registry  # imports Triton

    aten = torch.ops.aten
    return {
        **flop_registry,
        _INTEGER_PRODUCT: _integer_product_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
    }


class Category(StrEnum):
    """What memory is used for. The first five and the inputs stay the same during a step; `host` is not the device's."""

    WEIGHTS = "weights"
    TEACHER = "teacher"
    OPTIMIZER = "optimizer"
    AVERAGE = "average"
    HOST = "host"
    INPUTS = "inputs"
    GRADIENTS = "gradients"
    CODES = "codes"
    ACTIVATIONS = "activations"
    TEMPORARY = "temporary"


STEP_CATEGORIES = (Category.GRADIENTS, Category.CODES, Category.ACTIVATIONS, Category.TEMPORARY)
"""What comes and goes during a step."""


class Phase(StrEnum):
    """Part of a training step."""

    SETUP = "setup"
    RECORDING = "recording the teacher's outputs"
    TEACHER = "teacher forward"
    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    VALIDATION = "validation"


_CREATED_IN: dict[Phase, Category] = dict.fromkeys(
    (Phase.FORWARD, Phase.TEACHER, Phase.RECORDING), Category.ACTIVATIONS
)


@dataclass(frozen=True)
class Moment:
    """Bytes alive after one operation, for `STEP_CATEGORIES`."""

    phase: Phase
    gradients: int
    codes: int
    activations: int
    temporary: int


@dataclass(frozen=True)
class Work:
    """One kind of operation: what it computes and moves, and how often it comes.

    Args:
        phase: Where.
        name: Operation of ATen.
        dtype: Precision of the result.
        num_flops: Of matrix products, convolutions and attention; a multiplication and an addition count as two.
        num_bytes: Read and written.
        count: Operations of this kind.
    """

    phase: Phase
    name: str
    dtype: torch.dtype
    num_flops: int
    num_bytes: int
    count: int


class StepRecorder(TorchDispatchMode):
    """A dispatch mode that follows the life of every storage and the work of every operation.

    Set `phase` before each part. What an operation of `Phase.FORWARD` leaves counts as activations, of a later one as
    temporary; `label` says it better for weights, gradients and the like. Inside `codes()`, and in casts of what was made
    there, quantized weights count as codes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = Phase.SETUP
        self.in_quantizer = False
        self.totals: Counter[Category] = Counter()
        self.moments: list[Moment] = []
        self._alive: dict[int, _Allocation] = {}
        self._work: Counter[tuple[Phase, str, torch.dtype, int, int]] = Counter()

    def label(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Says what the memory of `tensors` is used for."""
        for tensor in tensors:
            self._label(tensor.untyped_storage(), category)

    def num_bytes(self) -> int:
        """Bytes that come and go during a step and are alive now."""
        return sum(self.totals[category] for category in STEP_CATEGORIES)

    def work(self) -> tuple[Work, ...]:
        """All operations since the start, equal ones together; those of the setup are left out."""
        return tuple(Work(*key, count) for key, count in self._work.items() if key[0] is not Phase.SETUP)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # an 8-bit state: its own operations on plain tensors come here one by one
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # two of three calls
            return output
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not outputs and not func._schema.is_mutable:
            return output
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        category = self._category(func, inputs)
        made = [self._label(tensor.untyped_storage(), category, only_new=True) for tensor in outputs]
        if self.phase is not Phase.SETUP:
            self._count_work(func, args, kwargs or {}, inputs, outputs, output)
            if any(made):
                self.moments.append(Moment(self.phase, *(self.totals[part] for part in STEP_CATEGORIES)))
        return output

    def _category(self, func: Any, inputs: list[Tensor]) -> Category:
        if self.in_quantizer:
            return Category.CODES
        if func is torch.ops.aten._to_copy.default and inputs:
            known = self._alive.get(_key(inputs[0].untyped_storage()))
            if known is not None and known.category is Category.CODES:
                return Category.CODES
        return _CREATED_IN.get(self.phase, Category.TEMPORARY)

    def _label(self, storage: torch.UntypedStorage, category: Category, only_new: bool = False) -> bool:
        """Whether the storage is a new one with memory."""
        key = _key(storage)
        known = self._alive.get(key)
        if known is not None:
            if not only_new:
                self.totals[known.category] -= known.num_bytes
                self.totals[category] += known.num_bytes
                known.category = category
            return False
        num_bytes = storage.nbytes()
        if not num_bytes:
            return False
        allocation = _Allocation(num_bytes, category)

        def forget(_: object) -> None:
            self._alive.pop(key, None)
            self.totals[allocation.category] -= num_bytes

        allocation.reference = weakref.ref(storage, forget)
        self._alive[key] = allocation
        self.totals[category] += num_bytes
        return True

    def _count_work(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
        output: Any,
    ) -> None:
        name = func.overloadpacket.__name__
        num_bytes = _bytes_moved(func, name, args, kwargs, inputs, outputs)
        formula: Callable[..., int] | None = _flop_formulas().get(func.overloadpacket)
        num_flops = formula(*args, **kwargs, out_val=output) if formula is not None else 0
        if num_bytes or num_flops:
            dtype = outputs[0].dtype if outputs else inputs[0].dtype
            if func.overloadpacket is _INTEGER_PRODUCT:
                dtype = torch.bfloat16  # integer units are at least as fast; devices state no rate for them
            self._work[self.phase, name, dtype, num_flops, num_bytes] += 1


@dataclass
class _Allocation:
    num_bytes: int
    category: Category
    reference: weakref.ref[torch.UntypedStorage] | None = None


def _key(storage: torch.UntypedStorage) -> int:
    """What tells storages apart; fake ones have no address."""
    return storage._cdata  # pyright: ignore[reportPrivateUsage]


def _bytes_moved(
    func: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    inputs: list[Tensor],
    outputs: list[Tensor],
) -> int:
    """What an operation reads and writes; nothing for views and for memory that is only set aside."""
    if name in _NO_WORK:
        return 0
    if func._schema.is_mutable:
        return sum(map(_extent, inputs)) + sum(map(_extent, _written(func, args, kwargs)))
    sources = {_key(tensor.untyped_storage()) for tensor in inputs}
    fresh = [tensor for tensor in outputs if _key(tensor.untyped_storage()) not in sources]
    if not fresh:
        return 0
    written = sum(map(_extent, fresh))
    return 2 * written if name in _ROW_READS else written + sum(map(_extent, inputs))


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Arguments that the operation changes in place."""
    arguments = func._schema.arguments
    values = [args[i] if i < len(args) else kwargs.get(argument.name) for i, argument in enumerate(arguments)]
    changed = [
        value
        for argument, value in zip(arguments, values, strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _extent(tensor: Tensor) -> int:
    """Bytes of memory that a tensor's elements lie in: an expanded one is read once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
