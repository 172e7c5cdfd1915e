"""Parameters that several processes hold in parts: rows of the first axis, as FSDP's DTensors; others are their own part."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold a part alone."""
    return hasattr(tensor, "to_local")


def own(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory; the tensor itself if it is no DTensor."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows; all processes must ask together. The tensor itself if it is no DTensor."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def own_rows(tensor: Tensor) -> slice:
    """The rows of the first axis that this process holds."""
    if not is_sharded(tensor):
        return slice(None)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    first = min(offset[0], sharded.shape[0])
    return slice(first, first + shape[0])
