"""Activation checkpointing that keeps what is dear: results of matrix products stay, everything else is computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn.attention import (
    SDPBackend,
    _cur_sdpa_kernel_backends,  # pyright: ignore[reportPrivateUsage]
    sdpa_kernel,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fraqat.errors import config_error
from fraqat.nn import quantized_layers
from fraqat.nn.input_codes import SharedInput

_SAVED_NAMES = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::linear",
    "aten::_int_mm",
    "aten::_scaled_mm",
    "aten::convolution",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "fraqat::scaled_product",
)
"""Operators whose results are kept: what computing them again would cost most of another forward pass."""

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network is made of: children of its outermost lists of two or more modules of one class."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        children = list(module.children())
        is_list = isinstance(module, nn.ModuleList) and len({type(child) for child in children}) == 1
        if is_list and len(children) > 1 and any(True for _ in children[0].parameters()):
            found.extend(children)
            return
        for child in children:
            search(child)

    search(model)
    return found


def checkpoint_blocks_(
    model: nn.Module, contexts: Contexts | None = None, *, keeps_random_state: bool = True
) -> Callable[[], None]:
    """Lets every repeated block keep its inputs and the results of its matrix products alone, wherever gradients are wanted.

    The backward pass computes a block's other values again, with the same random numbers, so gradients are the same bits.

    Args:
        model: Changed in place, but for its parameters and names.
        contexts: Around the forward pass of a block and around its second run; None is `keep_products`.
        keeps_random_state: Whether dropout must draw the same numbers again.

    Returns:
        A call that undoes it.

    Raises:
        ConfigError: The model has no repeated blocks.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise config_error(
            "train.activation_checkpointing",
            "blocks",
            allowed=f"none for {type(model).__name__}, which has no list of two or more equal blocks",
            fix="set train.activation_checkpointing: none",
        )
    return replace_forwards_(blocks, lambda block: _checkpointed(block, contexts or keep_products, keeps_random_state))


def replace_forwards_(
    blocks: Sequence[nn.Module], replacement: Callable[[nn.Module], Callable[..., Any]]
) -> Callable[[], None]:
    """Gives every block another `forward`.

    Args:
        blocks: Changed in place.
        replacement: Of a block that still has its own.

    Returns:
        A call that undoes it.
    """
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = replacement(block)

    def undo() -> None:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward

    return undo


def keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """torch's selective checkpointing with our choice of operators."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_saved = isinstance(operator, OpOverload) and operator.name().split(".")[0] in _SAVED_NAMES
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(block: nn.Module, contexts: Contexts, keeps_random_state: bool) -> Callable[..., Any]:
    forward = block.forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": keeps_random_state, "context_fn": contexts}

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        again = forward
        if not torch.compiler.is_compiling():
            again = partial(_run_alike, forward, _shared_inputs(block), _cur_sdpa_kernel_backends())
        return checkpoint(again, *args, **options, **kwargs)

    return run


def _run_alike(
    forward: Callable[..., Any],
    shared: list[SharedInput],
    kernels: list[SDPBackend],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Both runs of a block do the same operations, although the second is outside of what surrounded the first.

    Args:
        forward: Of the block.
        shared: Would give a run what was quantized before it.
        kernels: The caller's choice for attention.
        args, kwargs: Of the block.
    """
    for inputs in shared:
        inputs._forget()  # pyright: ignore[reportPrivateUsage]
    with sdpa_kernel(kernels):
        return forward(*args, **kwargs)


def _shared_inputs(block: nn.Module) -> list[SharedInput]:
    found = {id(layer.integer.inputs): layer.integer.inputs for _, layer in quantized_layers(block) if layer.integer}
    return list(found.values())
