"""The untrained parts of the espeak SpeechT5: sizes live here, training elsewhere."""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, SpeechT5Config, SpeechT5FeatureExtractor, SpeechT5ForTextToSpeech

from fraqat.data.speech_signal import LogMelSpec

SPEAKERS = ("en-us", "en-us+f3")
"""Voices of espeak-ng, in the order of their speaker embeddings."""

SPEAKER_DIM = 32
HIDDEN_SIZE = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the character tokenizer: one token per letter or space, `</s>` last, as SpeechT5's own.

    Returns:
        The tokenizer, with 31 tokens.
    """
    tokens = ("<s>", "<pad>", "</s>", "<unk>", " ", *string.ascii_lowercase)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=tokens[3]))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[0],
        pad_token=tokens[1],
        eos_token=tokens[2],
        unk_token=tokens[3],
        padding_side="right",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_feature_extractor(spec: LogMelSpec) -> SpeechT5FeatureExtractor:
    """Builds the feature extractor that computes the model's spectrograms from 16 kHz speech.

    Args:
        spec: rates and bands.

    Returns:
        The feature extractor.
    """
    return SpeechT5FeatureExtractor(
        sampling_rate=spec.sample_rate,
        num_mel_bins=spec.num_mels,
        hop_length=1000 * spec.hop_length // spec.sample_rate,
        win_length=1000 * spec.window_length // spec.sample_rate,
        fmin=spec.min_hz,
        fmax=spec.max_hz,
        mel_floor=spec.floor,
    )


def build_config(vocabulary_size: int, num_mels: int) -> SpeechT5Config:
    """Sizes of the model. Every inner width is a multiple of 32. Dropout is left to the decoder's prenet, which always has it.

    Args:
        vocabulary_size: number of tokens of the tokenizer.
        num_mels: bands of the spectrogram.

    Returns:
        The configuration.
    """
    return SpeechT5Config(
        vocab_size=vocabulary_size,
        hidden_size=HIDDEN_SIZE,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=4 * HIDDEN_SIZE,
        encoder_layerdrop=0.0,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_dim=4 * HIDDEN_SIZE,
        decoder_layerdrop=0.0,
        positional_dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        num_mel_bins=num_mels,
        speech_decoder_prenet_units=HIDDEN_SIZE,
        speech_decoder_prenet_dropout=0.5,
        speaker_embedding_dim=SPEAKER_DIM,
        speech_decoder_postnet_layers=4,
        speech_decoder_postnet_units=HIDDEN_SIZE,
        speech_decoder_postnet_dropout=0.0,
        reduction_factor=2,
        max_speech_positions=1000,
        max_text_positions=128,
        encoder_max_relative_position=32,
        use_guided_attention_loss=True,
        guided_attention_loss_num_heads=2,
        guided_attention_loss_sigma=0.4,
        guided_attention_loss_scale=10.0,
    )


def build_model(vocabulary_size: int, num_mels: int, seed: int) -> SpeechT5ForTextToSpeech:
    """Builds the untrained model.

    Args:
        vocabulary_size: number of tokens of the tokenizer.
        num_mels: bands of the spectrogram.
        seed: seeds torch's global generator before the parts are initialised.

    Returns:
        The model, in float32 on the CPU.
    """
    torch.manual_seed(seed)
    return SpeechT5ForTextToSpeech(build_config(vocabulary_size, num_mels))


def speaker_embeddings() -> dict[str, torch.Tensor]:
    """Fixed embeddings of the voices: orthogonal unit vectors.

    Returns:
        Voice -> [SPEAKER_DIM] float32.
    """
    return {name: torch.eye(SPEAKER_DIM)[index] for index, name in enumerate(SPEAKERS)}
