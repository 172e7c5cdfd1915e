"""SpeechT5 in pieces that a program can call in turn: encoder, decoder with its cache as inputs and outputs, postnet.

Shape suffixes: N samples, T text tokens, D decoder steps, P steps in the cache, L frames, M mel bands, U prenet units.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from fraqat.distill import Batch
from fraqat.errors import ModelError
from fraqat.tasks.language_parts import PAST, PRESENT, cache_names, cache_tensors, given_cache
from fraqat.tasks.speech_speecht5 import given_dropout

IDS, MASK, FRAMES, SPEAKER, KEPT, CROSS = "input_ids", "attention_mask", "frames", "speaker", "prenet_kept", "cross"
SPECTROGRAM, STOP = "spectrogram", "stop"
STOP_THRESHOLD, FRAMES_PER_TOKEN = 0.5, 20
"""Of `transformers`: speech ends where the stop probabilities of a step add up to this; at the latest after so many frames."""


class SpeechEncoder(nn.Module):
    """Text to the keys and values that every decoder layer looks at.

    Args:
        model: A `SpeechT5ForTextToSpeech`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.outputs = cache_names(CROSS, cast(Any, model).config.decoder_layers)
        self.axes = {IDS: {0: "batch", 1: "text"}, MASK: {0: "batch", 1: "text"}}

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """`cross.I.key` and `.value` [N, heads, T, width] of `input_ids` and `attention_mask` [N, T]."""
        parts = cast(Any, self.model).speecht5
        with _positions(parts.encoder.prenet.encode_positions, 0):
            states = parts.encoder(input_values=inputs[IDS], attention_mask=inputs[MASK]).last_hidden_state
        found: list[Tensor] = []
        for layer in parts.decoder.wrapped_decoder.layers:
            attention = layer.encoder_attn
            shape = (states.shape[0], states.shape[1], attention.num_heads, attention.head_dim)
            found += [
                projection(states).view(shape).transpose(1, 2) for projection in (attention.k_proj, attention.v_proj)
            ]
        return tuple(found)


class SpeechDecoder(nn.Module):
    """D more steps after P that are in the cache; one at a time to speak.

    Args:
        model: A `SpeechT5ForTextToSpeech`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        num_layers = cast(Any, model).config.decoder_layers
        self.past_names, self.cross_names = cache_names(PAST, num_layers), cache_names(CROSS, num_layers)
        self.outputs = (SPECTROGRAM, STOP, *cache_names(PRESENT, num_layers))
        self.axes = {
            FRAMES: {0: "batch", 1: "steps"},
            KEPT: {0: "batch", 2: "steps"},
            SPEAKER: {0: "batch"},
            MASK: {0: "batch", 1: "text"},
            **{name: {0: "batch", 2: "past"} for name in self.past_names},
            **{name: {0: "batch", 2: "text"} for name in self.cross_names},
        }

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """`spectrogram` [N, D r, M], `stop` [N, D r] as logits, and the cache with the new steps.

        `frames` [N, D, M], the last frame of each step before (zeros at the start); `prenet_kept` [N, layers, D, U] bool;
        `speaker` [N, S]; `attention_mask` [N, T] of the text; `cross.I.key`, `.value` of the encoder;
        `past_key_values.I.key`, `.value` [N, heads, P, width].
        """
        model = cast(Any, self.model)
        decoder, mask = model.speecht5.decoder, inputs[MASK]
        past = [inputs[name] for name in self.past_names]
        cache = EncoderDecoderCache(given_cache(past), given_cache([inputs[name] for name in self.cross_names]))
        with given_dropout(decoder.prenet, inputs[KEPT]), _positions(decoder.prenet.encode_positions, past[0].shape[2]):
            hidden = decoder.prenet(inputs[FRAMES], inputs[SPEAKER])
        length_only = mask[..., None].to(hidden.dtype)  # the keys and values of the text are in the cache
        states = decoder.wrapped_decoder(
            hidden_states=hidden,
            encoder_hidden_states=length_only,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        postnet, num = model.speech_decoder_postnet, states.shape[0]
        spectrogram = postnet.feat_out(states).view(num, -1, model.config.num_mel_bins)
        stop = postnet.prob_out(states).view(num, -1)
        return (spectrogram, stop, *cache_tensors(cache.self_attention_cache))

    def empty_past(self, num: int) -> dict[str, Tensor]:
        """A cache without steps."""
        config = cast(Any, self.model).config
        heads = config.decoder_attention_heads
        return {name: torch.zeros(num, heads, 0, config.hidden_size // heads) for name in self.past_names}


class SpeechPostnet(nn.Module):
    """Refines a whole spectrogram.

    Args:
        model: A `SpeechT5ForTextToSpeech`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[N, L, M] to [N, L, M]."""
        return cast(Any, self.model).speech_decoder_postnet.postnet(spectrogram)


def check_has_steps(model: nn.Module) -> None:
    """Checks that a model speaks step by step, as the pieces here do.

    Raises:
        ModelError: It is another class.
    """
    if type(model).__name__ != "SpeechT5ForTextToSpeech":
        raise ModelError(
            f"{type(model).__name__} cannot be exported as graphs: the length of its speech depends on values, which graphs "
            "cannot follow. Fix: export with --format packed, or a SpeechT5ForTextToSpeech."
        )


@torch.no_grad()
def decoder_inputs(encoder: SpeechEncoder, decoder: SpeechDecoder, batch: Batch) -> dict[str, Tensor]:
    """Inputs of the decoder on recorded speech: the second half of a batch of `SpeechTask`, the first half in the cache."""
    config = cast(Any, encoder.model).config
    factor = config.reduction_factor
    frames = F.pad(batch["log_mel"][:, factor - 1 :: factor], (0, 0, 1, -1))
    num_past = frames.shape[1] // 2
    fixed = {SPEAKER: batch["speaker"], MASK: batch[MASK]}
    fixed |= dict(zip(encoder.outputs, encoder(**{IDS: batch[IDS], MASK: batch[MASK]}), strict=True))
    first = {FRAMES: frames[:, :num_past], KEPT: batch["prenet_kept"][:, :, :num_past]}
    past = decoder(**first, **fixed, **decoder.empty_past(len(frames)))[2:]
    rest = {FRAMES: frames[:, num_past:], KEPT: batch["prenet_kept"][:, :, num_past:]}
    return {**rest, **fixed, **dict(zip(decoder.past_names, past, strict=True))}


def speech_constants(model: nn.Module) -> dict[str, Any]:
    """What a program needs to know to call the decoder, as plain JSON values."""
    config = cast(Any, model).config
    return {
        "num_mels": config.num_mel_bins,
        "reduction_factor": config.reduction_factor,
        "heads": config.decoder_attention_heads,
        "head_width": config.hidden_size // config.decoder_attention_heads,
        "prenet_layers": config.speech_decoder_prenet_layers,
        "prenet_units": config.speech_decoder_prenet_units,
        "prenet_kept_share": config.speech_decoder_prenet_dropout,
        "stop_threshold": STOP_THRESHOLD,
        "frames_per_token": FRAMES_PER_TOKEN,
    }


@contextmanager
def _positions(encode_positions: Any, num_past: int) -> Generator[None]:
    """Lets positions begin at `num_past`, and be as many as a graph is given."""

    def forward(hidden: Tensor) -> Tensor:
        places = torch.arange(hidden.shape[1], device=hidden.device) + num_past
        return hidden + encode_positions.alpha * encode_positions.pe.index_select(1, places)

    encode_positions.__dict__["forward"] = forward
    try:
        yield
    finally:
        del encode_positions.__dict__["forward"]
