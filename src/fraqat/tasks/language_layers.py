"""Where the parts of a causal language model lie, found by structure: decoder layers, feed-forward, attention, head.

No architecture is named here. A model whose matrices are no `nn.Linear` is refused, because quantizing it would do nothing.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from fraqat.distill.next_token import HEAD, HEAD_BIAS, HIDDEN, LOGIT_SCALE, SOFTCAP
from fraqat.errors import ModelError
from fraqat.nn import LayerFamilies, LayerRule, PackedLayer, QuantizedLayer
from fraqat.nn.families import TRANSFORMER

_ATTENTION = ("attn", "attention")
_FEED_FORWARD = ("mlp", "ffn", "feed_forward", "feedforward", "fc", "dense_h", "moe", "ff")
_MIN_LINEAR_SHARE = 0.5


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Qualified name and list of the decoder layers of a causal language model.

    Raises:
        ModelError: There is no such list, or most of its weights are in no `nn.Linear` and would not be quantized.
    """
    config: Any = cast(Any, model).config.get_text_config(decoder=True)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", None)
    ]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of num_hidden_layers decoder layers. Fix: use a decoder-only model of "
            "transformers."
        )
    name, layers = max(lists, key=lambda item: _num_parameters(item[1]))
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    # A teacher that is held in fewer bytes has its weights in buffers.
    num_held = sum(value.numel() for module in linears for value in module.buffers())
    if sum(map(_num_parameters, linears)) + num_held < _MIN_LINEAR_SHARE * (_num_parameters(layers) + num_held):
        others = sorted({type(m).__name__ for m in layers.modules() if _is_matrix(m)})
        raise ModelError(
            f"{type(model).__name__} keeps most weights of its layers outside nn.Linear, in {', '.join(others)}: they cannot "
            "be quantized. Fix: use a model with nn.Linear layers, such as Gemma, Llama, Qwen, GPT-NeoX or OPT."
        )
    return name, layers


def language_families(model: nn.Module) -> LayerFamilies:
    """Layer families of a decoder-only language model: FF, Attn and TF.

    Raises:
        ModelError: See `decoder_layers`.
    """
    name, layers = decoder_layers(model)
    children = dict.fromkeys(child for layer in layers for child, part in layer.named_children() if _has_linear(part))
    patterns: dict[str, tuple[str, ...]] = {
        "FF": _patterns(name, [child for child in children if _is_feed_forward(child)]),
        "Attn": _patterns(name, [child for child in children if _is_attention(child)]),
        TRANSFORMER: (f"{name}.*",),
    }
    return LayerFamilies(MappingProxyType({family: found for family, found in patterns.items() if found}))


def head_rules(model: nn.Module) -> tuple[LayerRule, ...]:
    """Rules that keep the head in floating point, to be put before a user's own. Embeddings are never quantized.

    Raises:
        ModelError: The model has no head.
    """
    return (LayerRule(pattern=head_name(model), skip=True),)


def head_name(model: nn.Module) -> str:
    """Qualified name of the layer that makes logits of hidden states.

    Raises:
        ModelError: There is none.
    """
    head = cast(Any, model).get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return name
    raise ModelError(
        f"{type(model).__name__} has no linear head over its vocabulary. Fix: use a causal language model."
    )


def head_parts(model: nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """The part of a prediction that the head makes: its input, weight, bias, and what happens to its output.

    Args:
        model: A causal language model, quantized or not; a quantized head gives its operands on their grids.
        hidden: Final hidden states [N, L, D].
    """
    head: Any = model.get_submodule(head_name(model))
    if isinstance(head, QuantizedLayer):
        hidden, weight = head.quantized_operands(hidden)
    elif isinstance(head, PackedLayer):
        hidden, weight = head.operands(hidden)
    else:
        weight = head.weight
    parts = {HIDDEN: hidden, HEAD: weight}
    if head.bias is not None:
        parts[HEAD_BIAS] = head.bias
    config: Any = cast(Any, model).config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        parts[SOFTCAP] = torch.tensor(float(softcap), dtype=torch.float64)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    if scale != 1:
        parts[LOGIT_SCALE] = torch.tensor(float(scale), dtype=torch.float64)
    return parts


def _patterns(layers: str, children: list[str]) -> tuple[str, ...]:
    return tuple(pattern for child in children for pattern in (f"{layers}.*.{child}", f"{layers}.*.{child}.*"))


def _is_attention(name: str) -> bool:
    return any(part in name for part in _ATTENTION)


def _is_feed_forward(name: str) -> bool:
    return not _is_attention(name) and any(part in name for part in _FEED_FORWARD)


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in module.modules())


def _is_matrix(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return not isinstance(module, nn.Linear) and any(value.ndim >= 2 for value in own)


def _num_parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())
