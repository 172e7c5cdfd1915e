"""Tokenizers of transformers as the file that the `tokenizers` library reads in any language."""

from __future__ import annotations

import json
from typing import Any

from fraqat.errors import ModelError


def tokenizer_json(tokenizer: Any) -> str:
    """Contents of `tokenizer.json`, without padding and cutting, which calls of the tokenizer leave behind.

    Args:
        tokenizer: Of transformers.

    Raises:
        ModelError: It has no such form.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} cannot be written as tokenizer.json. Fix: convert it to a fast tokenizer of "
            "transformers, or export with --format packed."
        )
    values = json.loads(backend.to_str())
    return json.dumps({**values, "truncation": None, "padding": None}, ensure_ascii=False, indent=1) + "\n"
