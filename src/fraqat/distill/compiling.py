"""torch.compile around a whole model, or around each of its repeated blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fraqat.distill.checkpointing import repeated_blocks, replace_forwards_
from fraqat.distill.spec import CompileMode
from fraqat.errors import config_error

BACKEND: Any = "inductor"
"""Of torch.compile."""
_numbers = itertools.count()


def compiled(model: nn.Module, mode: CompileMode) -> nn.Module:
    """The model as training calls it: itself, or compiled as a whole."""
    if mode in ("none", "blocks"):
        return model
    options: Any = torch.compile(model, backend=BACKEND, mode="reduce-overhead" if mode == "cuda_graphs" else "default")
    return options


def check_has_blocks(model: nn.Module) -> None:
    """Refuses to compile the blocks of a model that has none.

    Raises:
        ConfigError: There is no list of two or more equal blocks.
    """
    if not repeated_blocks(model):
        raise config_error(
            "train.compile",
            "blocks",
            allowed=f"none or default for {type(model).__name__}, which has no list of two or more equal blocks",
            fix="set train.compile: default, or none with sharded models",
        )


def compile_blocks_(model: nn.Module) -> Callable[[], None]:
    """Compiles the forward pass of every repeated block; what surrounds it, such as FSDP2's hooks, stays outside of the graph.

    Blocks that are built alike share their graphs. Graphs are made at the first call.

    Args:
        model: Changed in place, but for its parameters and names.

    Returns:
        A call that undoes it.
    """
    runs: dict[str, Callable[..., Any]] = {}

    def run_of(block: nn.Module) -> Callable[..., Any]:
        kind = str(block)
        if kind not in runs:
            runs[kind] = torch.compile(_call_of_its_own(), backend=BACKEND)
        return partial(runs[kind], block.forward)

    return replace_forwards_(repeated_blocks(model), run_of)


def _call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _call_of_its_own() -> Callable[..., Any]:
    """`_call` with code and name of its own: by these torch keeps graphs, eight at most, and what it knows of shapes."""
    return FunctionType(_call.__code__.replace(co_name=f"block_{next(_numbers)}"), globals())
