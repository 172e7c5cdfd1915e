"""Where an attention is linear between two layers, so that a rotation can be merged into them; see `fraqat.nn.rotation`.

Elsewhere there is no such place: between the layers of a feed-forward network lies a function of single channels, and before
queries and keys lie norms with a factor per channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fraqat.errors import config_error
from fraqat.nn import ValuePath

LINEAR_PROCESSORS = frozenset(
    {
        "AttnProcessor2_0",
        "FluxAttnProcessor",
        "JointAttnProcessor2_0",
        "SanaAttnProcessor2_0",
        "SanaLinearAttnProcessor2_0",
    }
)
"""Processors of diffusers that add up values head by head and do nothing else to them; each has a test."""

_OUTPUTS: Mapping[str, str] = {"Gemma2Attention": "o_proj", "SpeechT5Attention": "out_proj"}
"""Attention classes of transformers of which the same is true -> their layer after the heads; each has a test."""


@dataclass(frozen=True)
class FoundPaths:
    """The attentions of a model.

    Args:
        paths: That can be rotated.
        refused: Name -> why not.
    """

    paths: tuple[ValuePath, ...]
    refused: Mapping[str, str]


def find_value_paths(model: nn.Module) -> FoundPaths:
    """Every attention of a diffusion transformer, a language or a speech model.

    Args:
        model: Not quantized yet.

    Raises:
        ConfigError: There is none that can be rotated; the message has the reasons.
    """
    paths: list[ValuePath] = []
    refused: dict[str, str] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not (hasattr(module, "to_v") or hasattr(module, "v_proj")):
            continue
        found = _diffusers_path(modules, name) if hasattr(module, "to_v") else _transformers_path(name, module)
        if isinstance(found, str):
            refused[name] = found
        else:
            paths.append(found)
    if not paths:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3]) or "no attention was found"
        raise config_error(
            "quantization.rotation",
            type(model).__name__,
            allowed=f"a model with attentions that are linear in their values ({reasons})",
            fix="set quantization.rotation: null",
        )
    return FoundPaths(tuple(paths), refused)


def _diffusers_path(modules: Mapping[str, nn.Module], name: str) -> ValuePath | str:
    attention: Any = modules[name]
    processor = type(attention.processor).__name__
    if processor not in LINEAR_PROCESSORS:
        return f"{processor} is not known to leave values as they are but for adding them up"
    values = [part for part in ("to_v", "add_v_proj") if _has(attention, part)]
    readers = [(f"{name}.to_out.0", 0)] if _has(attention, "to_out") else _reader_of_block(modules, name)
    if _has(attention, "to_add_out"):
        readers.append((f"{name}.to_add_out", 0))
    if not readers:
        return "no layer was found that reads its result"
    head_size = attention.to_v.out_features // attention.heads
    return ValuePath(name, tuple(f"{name}.{part}" for part in values), tuple(readers), head_size, attention.heads)


def _reader_of_block(modules: Mapping[str, nn.Module], name: str) -> list[tuple[str, int]]:
    """FLUX's single blocks join the heads and the feed-forward channels before one layer; the heads come first."""
    block = name.rpartition(".")[0]
    is_known = type(modules[block]).__name__ == "FluxSingleTransformerBlock"
    return [(f"{block}.proj_out", 0)] if is_known else []


def _transformers_path(name: str, attention: Any) -> ValuePath | str:
    kind = type(attention).__name__
    if kind not in _OUTPUTS:
        return f"{kind} is not known to leave values as they are but for adding them up"
    reader = f"{name}.{_OUTPUTS[kind]}"
    head_size = int(attention.head_dim)
    num_heads = attention.get_submodule(_OUTPUTS[kind]).in_features // head_size
    return ValuePath(name, (f"{name}.v_proj",), ((reader, 0),), head_size, num_heads)


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None
