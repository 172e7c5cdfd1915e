"""The untrained text side of the colour-digits pipelines: a word-level tokenizer and three kinds of text encoder."""

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from fraqat.data.color_digits import COLOR_NAMES, DIGIT_NAMES

CAPTION_TOKENS = 8  # the longest caption has seven: "<bos> a red seven on white <eos>"
WIDTH = 64

_UNKNOWN = "<unk>"
_WORDS = ("a", "on", *DIGIT_NAMES, *COLOR_NAMES)


def build_tokenizer(specials: tuple[str, ...], template: str, model_max_length: int) -> PreTrainedTokenizerFast:
    """Builds a word-level tokenizer: one token per word of a caption, padded on the right.

    Args:
        specials: tokens besides the words, first in the vocabulary; "<pad>" and "<unk>" must be among them, "<bos>"
            and "<eos>" may.
        template: where they stand around the caption, which is `$A`, such as "<bos> $A".
        model_max_length: longest caption in tokens that a pipeline asks for by itself.

    Returns:
        The tokenizer, with 20 words and the special tokens.
    """
    vocabulary = {word: index for index, word in enumerate((*specials, *_WORDS))}
    tokenizer: Any = Tokenizer(WordLevel(vocabulary, _UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    used = [(token, vocabulary[token]) for token in specials if token in template]
    tokenizer.post_processor = TemplateProcessing(single=template, pair=f"{template} $B", special_tokens=used)
    named = {f"{token.strip('<>')}_token": token for token in specials}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", model_max_length=model_max_length, **named
    )


def build_gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the Gemma-2 encoder: `<bos>` first.

    Returns:
        The tokenizer, with 23 tokens.
    """
    return build_tokenizer(("<pad>", "<bos>", "<unk>"), "<bos> $A", model_max_length=300)


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the CLIP encoders: `<bos>` first, `<eos>` last, 8 tokens at most.

    Returns:
        The tokenizer, with 24 tokens; `<eos>` is not token 2, which CLIP's code treats in a way of its own.
    """
    return build_tokenizer(("<pad>", "<bos>", "<unk>", "<eos>"), "<bos> $A <eos>", CAPTION_TOKENS)


def build_t5_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the T5 encoders: `<eos>` last.

    Returns:
        The tokenizer, with 23 tokens.
    """
    return build_tokenizer(("<pad>", "<eos>", "<unk>"), "$A <eos>", CAPTION_TOKENS)


def build_gemma(tokenizer: PreTrainedTokenizerFast) -> Gemma2Model:
    """Builds an untrained Gemma-2 of two layers of width 64.

    Args:
        tokenizer: its tokenizer.

    Returns:
        The encoder, randomly initialised from the global generator.
    """
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=512,
        sliding_window=512,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        use_cache=False,
    )
    return Gemma2Model(config)


def build_clip(
    tokenizer: PreTrainedTokenizerFast, width: int, *, projection: bool
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Builds an untrained CLIP text encoder of two layers.

    Args:
        tokenizer: its tokenizer.
        width: width of the layers, and of the projection.
        projection: whether to build the class that projects the pooled state, as SD3 uses it, or the one that does not.

    Returns:
        The encoder, randomly initialised from the global generator.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=CAPTION_TOKENS,
        pad_token_id=_index(tokenizer, "<pad>"),
        bos_token_id=_index(tokenizer, "<bos>"),
        eos_token_id=_index(tokenizer, "<eos>"),
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def build_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Builds an untrained T5 encoder (version 1.1, gated GELU) of two layers of width 64.

    Args:
        tokenizer: its tokenizer.

    Returns:
        The encoder, randomly initialised from the global generator.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        use_cache=False,
        pad_token_id=_index(tokenizer, "<pad>"),
        eos_token_id=_index(tokenizer, "<eos>"),
    )
    return T5EncoderModel(config)


def _index(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    return tokenizer.get_vocab()[token]
