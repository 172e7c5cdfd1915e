"""Tiny random causal language models, made of transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "Gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.3},
    "Phi": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}
TIED = ("Gemma2", "Cohere", "OPT")


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random model of one architecture, in evaluation mode."""
    torch.manual_seed(seed)
    values = {**_SIZES, "tie_word_embeddings": name in TIED, **_OWN.get(name, {})}
    if name == "GPT2":
        values = {key: value for key, value in values.items() if key not in ("head_dim", "num_key_value_heads")}
    config = getattr(transformers, f"{name}Config")(**values)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tiny_tokenizer() -> Any:
    """One token per word: `w3` to `w63`."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
