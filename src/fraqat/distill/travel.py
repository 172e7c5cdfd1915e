"""Integer all-gather: a weight's rows are quantized where they lie, and codes with their scales travel in place of floats.

Uses the extension of FSDP2 for that (`fsdp_pre_all_gather`, `fsdp_post_all_gather` of a sharded parameter's local tensor).
Codes are made of the rows at the moment they leave, so that there are none of an older weight; floats are whole nowhere.

Shape suffixes: K input channels (of all positions), P rows that a process holds, padded.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from fraqat.nn import IntegerLayers, QuantizedLayer
from fraqat.nn.integer import IntegerWeight
from fraqat.nn.shards import is_sharded, own, own_rows

_SCALE_BYTES = 4
_aten = torch.ops.aten
_ALIASES = (_aten.detach.default, _aten.alias.default, _aten.as_strided.default)


class WeightInCodes(Tensor):
    """Stands for a whole weight that is there as codes alone: it takes gradients, and has shape, dtype and no values.

    It can be taken apart (`__tensor_flatten__`): a tensor of another class that cannot is to torch.compile no tensor but an
    object, so that a compiled layer would have no gradient for its weight, without a word.

    Args:
        shape: Of the weight.
        inner: Empty, of the weight's dtype and device.
    """

    _inner: Tensor

    @staticmethod
    def __new__(cls: type[WeightInCodes], shape: torch.Size, inner: Tensor) -> WeightInCodes:
        return cast(Any, Tensor)._make_wrapper_subclass(cls, shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, shape: torch.Size, inner: Tensor):
        self._inner = inner

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"  # asked for where torch.compile is traced

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_inner"], None

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: None, size: torch.Size, stride: tuple[int, ...]
    ) -> WeightInCodes:
        return cls(size, inner["_inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALIASES:
            return cls(args[0].shape, args[0]._inner.detach())
        if func in (_aten.zeros_like.default, _aten.empty_like.default):
            plain = tree_map_only(cls, lambda t: t._inner.new_empty(t.shape), args)
            return func(*plain, **(kwargs or {}))
        raise RuntimeError(
            f"{func} needs the values of a weight that travels as codes: its layer computes by integers. Use "
            "train.parallel.gather: weights for what needs them."
        )


class _CodesInTransit:
    """What FSDP2 calls around the all-gather of one weight.

    Args:
        layer: Of the weight, whose rows this process holds.
        integer: Takes the codes of the whole weight in.
    """

    def __init__(self, layer: QuantizedLayer, integer: IntegerWeight):
        self._layer, self._integer = layer, integer
        self._rows = own_rows(layer.weight)

    @torch.no_grad()
    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor], None]:
        """The rows as they are now, int8 [P, K + 4]: their codes, and the four bytes of each one's float32 scale."""
        weight = own(self._layer.weight.detach())
        num_rows, num_padded = len(weight), -(-self._layer.weight.shape[0] // mesh.size())
        num_codes = math.prod(self._layer.weight.shape[1:])
        packed = torch.zeros(num_padded, num_codes + _SCALE_BYTES, dtype=torch.int8, device=weight.device)
        if num_rows:
            codes, scale = self._layer.weight_quantizer.unchecked_codes(weight, self._rows)
            scale_P = scale.flatten().float().expand(num_rows).contiguous()
            packed[:num_rows, :num_codes] = codes.flatten(1)
            packed[:num_rows, num_codes:] = scale_P.view(torch.int8).view(num_rows, _SCALE_BYTES)
        return (packed,), None

    @torch.no_grad()
    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Gives the codes of all rows to the layer."""
        packed = outputs[0][: self._integer.codes.shape[0]]
        codes, scale_bytes = packed.split([packed.shape[1] - _SCALE_BYTES, _SCALE_BYTES], 1)
        self._integer.set_(codes, scale_bytes.contiguous().view(torch.float32))
        if out is not None:
            return None
        return WeightInCodes(self._layer.weight.shape, torch.empty(0, dtype=dtype, device=packed.device)), ()


def travel_as_codes_(integers: IntegerLayers) -> int:
    """Lets the weights of all integer layers travel as codes.

    Args:
        integers: Of a student that `fully_shard` has been applied to, before its first forward pass.

    Returns:
        How many there are.
    """
    count = 0
    for layer, integer in integers.layers:
        if not is_sharded(layer.weight):
            continue
        transit, local = _CodesInTransit(layer, integer), cast(Any, layer.weight)._local_tensor
        local.fsdp_pre_all_gather = transit.fsdp_pre_all_gather
        local.fsdp_post_all_gather = transit.fsdp_post_all_gather
        count += 1
    return count
