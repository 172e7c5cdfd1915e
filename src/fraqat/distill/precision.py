"""In which precision training computes matrix products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch

Autocast = Literal["auto", "bfloat16", "none"]


def autocast_dtype(choice: Autocast, device_type: str) -> torch.dtype | None:
    """The dtype of matrix products in training; None leaves each model its own.

    `auto` is bfloat16 where the hardware multiplies in it, and None elsewhere: a CPU without AVX512 takes many times as long
    for a product in bfloat16 as for the same in float32 (`benchmarks/autocast.py`), and NVIDIA GPUs have it from compute
    capability 8.0 on.

    Args:
        choice: Of `train.autocast`.
        device_type: `cpu`, `cuda` or another of torch's. Without a GPU in this machine, `cuda` is taken for a recent one.
    """
    if choice == "none" or (choice == "auto" and not _has_bfloat16(device_type)):
        return None
    return torch.bfloat16


def autocast(choice: Autocast, device_type: str) -> AbstractContextManager[Any]:
    """The context in which teacher and student are called."""
    dtype = autocast_dtype(choice, device_type)
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)


def precision_name(choice: Autocast, device_type: str) -> str:
    """`autocast_dtype` in words."""
    dtype = autocast_dtype(choice, device_type)
    return "the model's own dtype" if dtype is None else str(dtype).removeprefix("torch.")


def precision_warning(before: str, now: str) -> str | None:
    """What is said where a checkpoint was trained in another precision than the one that training goes on in."""
    if before == now:
        return None
    return (
        f"the checkpoint was trained with matrix products in {before}, this machine goes on in {now}. Set train.autocast to "
        "keep one precision on all machines."
    )


def _has_bfloat16(device_type: str) -> bool:
    if device_type == "cpu":
        return bool(cast(Any, torch.ops.mkldnn)._is_mkldnn_bf16_supported())
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
