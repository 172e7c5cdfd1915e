"""Measures the language model of the zoo and the n-gram models that it has to beat, on the same held-out text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Gemma2ForCausalLM, PreTrainedTokenizerFast

from fraqat.data.topics import HELD_OUT_TOPICS, TopicTexts
from fraqat.zoo.ngram import NgramModel
from fraqat.zoo.topics_model import CONTEXT_TOKENS
from fraqat.zoo.topics_training import encode_documents, mean_nats, start_token

TOKEN_ORDERS = (2, 3, 4, 5, 6, 8)
BYTE_ORDERS = (4, 6, 8, 10, 12, 16, 20)
_BYTES = 256

_Documents = list[list[int]]


@dataclass(frozen=True)
class TextQuality:
    """How well a model predicts the held-out topics.

    Args:
        perplexity: exp of the mean -log p of a symbol: a token, or for the models of bytes a byte.
        bits_per_byte: the same as bits for a byte of text, which compares models of different symbols.
        topic_bits_per_byte: topic -> bits for a byte.
        order: longest run of symbols that an n-gram model counts; None for the language model.
    """

    perplexity: float
    bits_per_byte: float
    topic_bits_per_byte: dict[str, float]
    order: int | None = None


def measure_model(folder: Path, texts: TopicTexts) -> TextQuality:
    """Measures the stored model, computed in float32.

    Args:
        folder: model and tokenizer.
        texts: the split text.

    Returns:
        Quality on the held-out topics, in windows of 256 tokens that overlap by half.
    """
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = start_token(tokenizer)
    documents = encode_documents(tokenizer, texts.held_out)
    return _quality(
        lambda document: len(document) * mean_nats(model, [document], start=start, context=CONTEXT_TOKENS),
        documents,
        texts.held_out,
    )


def measure_token_ngrams(tokenizer: PreTrainedTokenizerFast, texts: TopicTexts) -> TextQuality:
    """Measures the n-gram model over the language model's own tokens, of the order that is best on validation.

    Args:
        tokenizer: gives the tokens.
        texts: the split text.

    Returns:
        Quality on the held-out topics.
    """
    parts = [encode_documents(tokenizer, part) for part in (texts.train, texts.validation, texts.held_out)]
    return _best_ngram(parts, texts, TOKEN_ORDERS, len(tokenizer), start_token(tokenizer))


def measure_byte_ngrams(texts: TopicTexts) -> TextQuality:
    """Measures the n-gram model over bytes, of the order that is best on validation.

    Args:
        texts: the split text.

    Returns:
        Quality on the held-out topics.
    """
    parts = [[list(text.encode()) for text in part] for part in (texts.train, texts.validation, texts.held_out)]
    return _best_ngram(parts, texts, BYTE_ORDERS, _BYTES + 1, start=_BYTES)


def quality_record(folder: Path, texts: TopicTexts) -> dict[str, Any]:
    """Measures everything that the card tells.

    Args:
        folder: model and tokenizer.
        texts: the split text.

    Returns:
        Plain values for `quality.json`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = encode_documents(tokenizer, texts.held_out)
    return {
        "text_sha256": texts.sha256,
        "num_tokens": sum(map(len, held_out)),
        "num_bytes": sum(len(text.encode()) for text in texts.held_out),
        "num_training_tokens": sum(map(len, encode_documents(tokenizer, texts.train))),
        "model": _rounded(measure_model(folder, texts)),
        "token_ngram": _rounded(measure_token_ngrams(tokenizer, texts)),
        "byte_ngram": _rounded(measure_byte_ngrams(texts)),
    }


def _best_ngram(
    parts: Sequence[_Documents], texts: TopicTexts, orders: Sequence[int], vocabulary_size: int, start: int
) -> TextQuality:
    train, validation, held_out = parts
    models = [NgramModel(train, order=order, vocabulary_size=vocabulary_size, start=start) for order in orders]
    best = min(models, key=lambda model: model.nats(validation))
    return _quality(lambda document: best.nats([document]), held_out, texts.held_out, best.order)


def _quality(
    nats_of: Callable[[list[int]], float], documents: _Documents, texts: Sequence[str], order: int | None = None
) -> TextQuality:
    nats = [nats_of(document) for document in documents]
    sizes = [len(text.encode()) for text in texts]
    return TextQuality(
        perplexity=math.exp(sum(nats) / sum(map(len, documents))),
        bits_per_byte=sum(nats) / sum(sizes) / math.log(2),
        topic_bits_per_byte={
            name: value / size / math.log(2) for name, value, size in zip(HELD_OUT_TOPICS, nats, sizes, strict=True)
        },
        order=order,
    )


def _rounded(quality: TextQuality) -> dict[str, Any]:
    values = asdict(quality)
    values["topic_bits_per_byte"] = {name: round(value, 4) for name, value in quality.topic_bits_per_byte.items()}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
