"""Settings of language-model distillation. Light to import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from fraqat.errors import config_error
from fraqat.nn import STRICT_KEYS


@dataclass(frozen=True)
class LanguageSpec:
    """How a language model's outputs are distilled.

    Args:
        temperature: Of both next-token distributions in the `kl` term, which is multiplied by its square.
        chunk_tokens: Tokens whose logits exist at a time; null takes 2^26 logits, a quarter of a gigabyte for each of the few
            buffers.
        hidden_layers: Decoder layers, from 0, whose outputs the `hidden_mse` term compares.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    temperature: float = 1.0
    chunk_tokens: int | None = None
    hidden_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise config_error("language.temperature", self.temperature, allowed="a positive number", fix="use 1")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise config_error("language.chunk_tokens", self.chunk_tokens, allowed="1 or more, or null", fix="use null")
        if any(layer < 0 for layer in self.hidden_layers) or len(set(self.hidden_layers)) != len(self.hidden_layers):
            raise config_error(
                "language.hidden_layers",
                list(self.hidden_layers),
                allowed="different numbers of 0 or more",
                fix="count the decoder layers from 0",
            )
