"""The untrained Gemma-2 of the zoo and its tokenizer: sizes live here, training elsewhere."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
CONTEXT_TOKENS = 256
_WINDOW_TOKENS = 128


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE tokenizer: any text can be written in it and comes back as it was.

    Args:
        texts: what to learn the merges from.

    Returns:
        The tokenizer, with 1024 tokens, `<bos>` first in every text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106 - no passwords
        eos_token="<eos>",  # noqa: S106
        bos_token="<bos>",  # noqa: S106
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> Gemma2ForCausalLM:
    """Builds the untrained model: four Gemma-2 layers of width 192, every second one with a sliding window.

    Args:
        seed: seeds torch's global generator before the weights are drawn.

    Returns:
        The model, float32 on the CPU, with tied embeddings and Gemma-2's two softcaps.
    """
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        query_pre_attn_scalar=48,
        max_position_embeddings=CONTEXT_TOKENS,
        sliding_window=_WINDOW_TOKENS,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        initializer_range=0.04,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2ForCausalLM(config)
