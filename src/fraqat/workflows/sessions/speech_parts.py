"""The parts of a text-to-speech model that are exported as graphs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fraqat.data.speech_source import default_speaker
from fraqat.export import Inputs, Part

if TYPE_CHECKING:
    from fraqat.workflows.sessions.speech import SpeechSession

_GRAPH_BATCH = 2
_NUM_SAMPLES = 8
_TOKENIZER_FILE = "tokenizer.json"


def speech_parts(session: SpeechSession, student: nn.Module) -> tuple[Part, ...]:
    """`decoder`, `encoder` and `postnet`, and `vocoder` where the recipe names one.

    Args:
        session: Gives tokenizer, data and vocoder.
        student: The whole model.

    Raises:
        ModelError: It does not speak step by step.
    """
    from fraqat.tasks.speech_parts import (
        IDS,
        MASK,
        SPECTROGRAM,
        SpeechDecoder,
        SpeechEncoder,
        SpeechPostnet,
        check_has_steps,
        decoder_inputs,
        speech_constants,
    )
    from fraqat.tasks.tokenizer_files import tokenizer_json

    check_has_steps(student)
    encoder, decoder = SpeechEncoder(student), SpeechDecoder(student)

    def batches() -> list[dict[str, Tensor]]:
        return session.task.calibration_batches(_NUM_SAMPLES, _GRAPH_BATCH)

    def texts() -> list[Inputs]:
        return [{name: batch[name] for name in (IDS, MASK)} for batch in batches()]

    def steps() -> list[Inputs]:
        return [decoder_inputs(encoder, decoder, batch) for batch in batches()]

    def spectrograms() -> list[Inputs]:
        return [{SPECTROGRAM: batch["log_mel"]} for batch in batches()]

    tokenizer = session.tokenizer
    constants = {**speech_constants(student), "speaker": default_speaker(session.recipe.data, session.folder).tolist()}
    files = {_TOKENIZER_FILE: tokenizer_json(tokenizer).encode()}
    frames, sound = {SPECTROGRAM: {0: "batch", 1: "frames"}}, _sound_constants(session)
    return (
        Part("decoder", decoder, decoder.outputs, steps, decoder.axes, constants),
        Part("encoder", encoder, encoder.outputs, texts, encoder.axes, {"tokenizer": _TOKENIZER_FILE}, files),
        Part("postnet", SpeechPostnet(student), ("refined",), spectrograms, frames, sound),
        *_vocoder(session),
    )


def _sound_constants(session: SpeechSession) -> dict[str, Any]:
    mel = session.architecture.mel
    return {"sample_rate": session.architecture.sample_rate, "mel": None if mel is None else dataclasses.asdict(mel)}


def _vocoder(session: SpeechSession) -> tuple[Part, ...]:
    """The recipe's vocoder, which takes one spectrogram [L, M]."""
    vocoder = session.vocoder
    if vocoder is None:
        return ()

    def spectrograms() -> list[Inputs]:
        batches = session.task.calibration_batches(_NUM_SAMPLES, 1)
        return [{"spectrogram": batch["log_mel"][0]} for batch in batches]

    axes = {"spectrogram": {0: "frames"}}
    return (Part("vocoder", vocoder, ("waveform",), spectrograms, axes),)
