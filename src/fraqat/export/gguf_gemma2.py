"""Gemma-2 in GGUF: tensor names, settings and vocabulary as llama.cpp reads them.

Reference: conversion/gemma.py and src/models/gemma2.cpp of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fraqat.errors import FraqatError, ModelError, config_error
from fraqat.export.gguf_names import FileTensor, check_complete

CLASS_NAME = "Gemma2ForCausalLM"
ARCHITECTURE = "gemma2"
HEAD = "lm_head"
_HEAD_WEIGHT = f"{HEAD}.weight"
_LAYERS_OF_27B = 46
_FILE_TYPE_Q4_0 = 2
_UINT32_MAX = 2**32 - 1
_FLOAT32_MAX = 3.4e38
_CONFIG_FIX = "use the configuration that the model was published with"
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError)
"""What SentencePiece, JSON and the gguf package raise on damaged files."""


def gemma2_tensors(names: Sequence[str], num_layers: int) -> list[FileTensor]:
    """What a Gemma-2 file holds; the head is the embeddings.

    Raises:
        ConfigError: A tensor has no place, such as the bias of a projection.
    """
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, num_layers)
    found: list[FileTensor] = []
    kept = [name for name in names if name != _HEAD_WEIGHT]
    for name in kept:
        target = table.get_name(name, try_suffixes=(".weight",))
        if target is not None:
            found.append(FileTensor(target, (name,), shift=1.0 if name.endswith("norm.weight") else 0.0))
    check_complete(found, kept)
    return found


def add_gemma2_settings(writer: Any, config: Mapping[str, Any]) -> None:
    """Writes the model's settings.

    Args:
        writer: `gguf.GGUFWriter`.
        config: The model's configuration, as transformers writes it.

    Raises:
        ConfigError: llama.cpp computes a setting in another way.
        ModelError: A setting is missing.
    """
    try:
        _check_settings(config)
        writer.add_context_length(_count(config, "max_position_embeddings"))
        writer.add_embedding_length(_count(config, "hidden_size"))
        writer.add_block_count(_count(config, "num_hidden_layers"))
        writer.add_feed_forward_length(_count(config, "intermediate_size"))
        writer.add_head_count(_count(config, "num_attention_heads"))
        writer.add_head_count_kv(_count(config, "num_key_value_heads"))
        writer.add_layer_norm_rms_eps(_number(config, "rms_norm_eps"))
        writer.add_key_length(_count(config, "head_dim"))
        writer.add_value_length(_count(config, "head_dim"))
        writer.add_rope_freq_base(_rope_theta(config))
        writer.add_attn_logit_softcapping(_number(config, "attn_logit_softcapping"))
        writer.add_final_logit_softcapping(_number(config, "final_logit_softcapping"))
        writer.add_sliding_window(_count(config, "sliding_window"))
        writer.add_file_type(_FILE_TYPE_Q4_0)
    except KeyError as error:
        raise ModelError(
            f"the model's configuration has no {error}: llama.cpp needs it. Fix: use a Gemma-2 model of transformers."
        ) from error


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _UINT32_MAX:
        raise config_error(f"config.{name}", value, allowed="whole numbers from 1 to 2^32 - 1", fix=_CONFIG_FIX)
    return value


def _number(config: Mapping[str, Any], name: str) -> float:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:
        raise config_error(f"config.{name}", value, allowed="numbers that float32 holds", fix=_CONFIG_FIX)
    return float(value)


def _check_settings(config: Mapping[str, Any]) -> None:
    is_27b = config["num_hidden_layers"] == _LAYERS_OF_27B
    heads = _count(config, "num_attention_heads")
    scalar = _count(config, "hidden_size") // heads if is_27b else _count(config, "head_dim")
    layer_types = config.get("layer_types") or []
    pattern = ["full_attention" if i % 2 else "sliding_attention" for i in range(_count(config, "num_hidden_layers"))]
    checks: tuple[tuple[str, Any, Any], ...] = (
        ("query_pre_attn_scalar", _number(config, "query_pre_attn_scalar"), float(scalar)),
        ("hidden_activation", config["hidden_activation"], "gelu_pytorch_tanh"),
        ("attention_bias", bool(config.get("attention_bias")), False),
        ("tie_word_embeddings", bool(config.get("tie_word_embeddings", True)), True),
        ("layer_types", layer_types or pattern, pattern),
    )
    for name, found, wanted in checks:
        if found != wanted:
            raise config_error(f"config.{name}", found, allowed=f"{wanted!r} in llama.cpp", fix="use another target")


def _rope_theta(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise config_error("config.rope_parameters", rope, allowed="a mapping", fix=_CONFIG_FIX)
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise config_error("config.rope_parameters.rope_type", kind, allowed="default", fix="use another target")
    return _number(rope or config, "rope_theta")


def add_vocabulary(writer: Any, origin: Path, config: Mapping[str, Any]) -> None:
    """Writes the tokenizer: SentencePiece from `tokenizer.model`, else a byte-level BPE from `tokenizer.json`.

    Args:
        writer: `gguf.GGUFWriter`.
        origin: Folder of the original.
        config: Of the model.

    Raises:
        ConfigError: The tokenizer is of a kind that llama.cpp does not know.
        ModelError: There is none, or it cannot be read.
    """
    try:
        _add_vocabulary(writer, origin, config)
    except _UNREADABLE as error:
        if isinstance(error, FraqatError):
            raise
        raise ModelError(
            f"the tokenizer in {origin} cannot be read ({error!r}): llama.cpp needs the vocabulary. "
            "Fix: use the original's whole folder."
        ) from error


def _add_vocabulary(writer: Any, origin: Path, config: Mapping[str, Any]) -> None:
    import gguf

    vocab_size = _count(config, "vocab_size")
    if (origin / "tokenizer.model").is_file():
        _add_sentencepiece(writer, origin, vocab_size)
        special = gguf.SpecialVocab(origin, n_vocab=vocab_size)
    else:
        _add_byte_level(writer, origin, vocab_size)
        special = gguf.SpecialVocab(origin, load_merges=True, n_vocab=vocab_size)
    ids = {name: config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, value in ids.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            special.special_token_ids.setdefault(name, first)
    special.add_special_token.setdefault("bos", True)
    special.add_to_gguf(writer, quiet=True)


def _add_sentencepiece(writer: Any, origin: Path, vocab_size: int) -> None:
    import gguf
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor()
    tokenizer.LoadFromFile(str(origin / "tokenizer.model"))
    kinds = (
        (tokenizer.IsUnknown, gguf.TokenType.UNKNOWN),
        (tokenizer.IsControl, gguf.TokenType.CONTROL),
        (tokenizer.IsUnused, gguf.TokenType.UNUSED),
        (tokenizer.IsByte, gguf.TokenType.BYTE),
    )
    num_pieces = min(tokenizer.vocab_size(), vocab_size)
    texts: list[bytes] = [tokenizer.IdToPiece(i).encode() for i in range(num_pieces)]
    types = [next((kind for test, kind in kinds if test(i)), gguf.TokenType.NORMAL) for i in range(num_pieces)]
    scores = [float(tokenizer.GetScore(i)) for i in range(num_pieces)]
    for i in range(num_pieces, vocab_size):
        texts.append(f"[PAD{i}]".encode())
        types.append(gguf.TokenType.UNUSED)
        scores.append(-10000.0)
    for token in _added_tokens(origin):
        if token["id"] < vocab_size and types[token["id"]] is not gguf.TokenType.UNKNOWN:
            texts[token["id"]] = str(token["content"]).replace("\u2581", " ").encode()
            types[token["id"]] = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)


def _add_byte_level(writer: Any, origin: Path, vocab_size: int) -> None:
    import gguf

    path = origin / "tokenizer.json"
    tokenizer = _read_json(path)
    model, before = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    is_known = (
        before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space")
    )
    if model.get("type") != "BPE" or not is_known or tokenizer.get("normalizer"):
        raise config_error(
            "tokenizer",
            f"{model.get('type')} after {before.get('type')}",
            allowed="SentencePiece (tokenizer.model), or a BPE after ByteLevel as GPT-2's",
            fix="put the original's tokenizer.model beside the model",
        )
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for text, i in model["vocab"].items():
        texts[i], types[i] = text, gguf.TokenType.NORMAL
    for token in tokenizer.get("added_tokens") or []:
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)


def _added_tokens(origin: Path) -> list[dict[str, Any]]:
    path = origin / "tokenizer.json"
    return list(_read_json(path).get("added_tokens") or []) if path.is_file() else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}): llama.cpp needs the vocabulary. Fix: use the original's whole folder."
        ) from error
    return value
