"""A causal language model with its key-value cache as plain inputs and outputs, for graphs.

Shape suffixes: N samples, L new tokens, P tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from fraqat.tasks.language import INPUTS, MASK

LOGITS, PAST, PRESENT = "logits", "past_key_values", "present"
_KINDS = ("key", "value")


def cache_names(prefix: str, num_layers: int) -> tuple[str, ...]:
    """`PREFIX.0.key`, `PREFIX.0.value`, `PREFIX.1.key`, ... in the order of `given_cache` and `cache_tensors`."""
    return tuple(f"{prefix}.{layer}.{kind}" for layer in range(num_layers) for kind in _KINDS)


def given_cache(tensors: Sequence[Tensor]) -> DynamicCache:
    """A cache of keys and values [N, heads, P, width], which grows as layers write into it."""
    cache = DynamicCache()
    cast(Any, cache).layers = [_layer(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
    return cache


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    layer.dtype, layer.device = keys.dtype, keys.device
    return layer


def cache_tensors(cache: Any) -> tuple[Tensor, ...]:
    """Keys and values of every layer."""
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


class LanguageStep(nn.Module):
    """Reads L new tokens after P that are in the cache.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        config: Any = cast(Any, model).config.get_text_config(decoder=True)
        num_layers = int(config.num_hidden_layers)
        self.past_names = cache_names(PAST, num_layers)
        self.outputs = (LOGITS, *cache_names(PRESENT, num_layers))

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits of the last token [N, V], and the cache with the new tokens.

        `input_ids` [N, L]; `attention_mask` [N, P + L], 0 for padding, which stands on the left; `past_key_values.I.key`
        and `.value` [N, heads, P, width].
        """
        past = [inputs[name] for name in self.past_names]
        num_past, num_new = past[0].shape[2], inputs[INPUTS].shape[1]
        places = torch.arange(num_past + num_new, device=past[0].device)
        mask = inputs[MASK].index_select(1, places)  # a size that the tracer takes to be the sum of the other two
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, num_past:]
        cache = given_cache(past)
        output = cast(Any, self.model)(
            input_ids=inputs[INPUTS],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return (output.logits[:, -1], *cache_tensors(cache))

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Axes of the inputs whose sizes may change."""
        axes = {INPUTS: {0: "batch", 1: "length"}, MASK: {0: "batch", 1: "total"}}
        return axes | {name: {0: "batch", 2: "past"} for name in self.past_names}

    def empty_past(self, num: int) -> dict[str, Tensor]:
        """A cache without tokens."""
        config: Any = cast(Any, self.model).config.get_text_config(decoder=True)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num, getattr(config, "num_key_value_heads", config.num_attention_heads), 0, width)
        return {name: torch.zeros(shape) for name in self.past_names}

    @torch.no_grad()
    def inputs_after(self, rows_NL: Tensor, num_past: int) -> dict[str, Tensor]:
        """Inputs for the tokens of rows from `num_past` on, the ones before in the cache."""
        given = self._inputs(rows_NL, num_past) | self.empty_past(len(rows_NL))
        if num_past:
            start = self._inputs(rows_NL[:, :num_past], 0) | self.empty_past(len(rows_NL))
            given |= dict(zip(self.past_names, self(**start)[1:], strict=True))
        return given

    def _inputs(self, rows: Tensor, num_past: int) -> dict[str, Tensor]:
        return {INPUTS: rows[:, num_past:], MASK: torch.ones_like(rows)}


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the model's, or the tokenizer's where it names none."""
    configured: Any = cast(Any, model).generation_config.eos_token_id
    own = tokenizer.eos_token_id if configured is None else configured
    found: Iterable[Any] = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in found if token is not None})
