"""The parts of a text-to-speech model that are exported as graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from fraqat.distill import Batch, DistillTask
from fraqat.export import Inputs, Part
from fraqat.tasks.speech_architectures import SpeechArchitecture

_GRAPH_BATCH = 2
_NUM_SAMPLES = 8
_TOKENIZER_FILE = "tokenizer.json"


def speech_parts(
    student: nn.Module,
    task: DistillTask,
    architecture: SpeechArchitecture,
    *,
    tokenizer: Any,
    speaker: Tensor,
    vocoder: nn.Module | None,
) -> tuple[Part, ...]:
    """`decoder`, `encoder` and `postnet`, and `vocoder` where there is one.

    Args:
        student: The whole model.
        task: Gives inputs.
        architecture: The table's entry for the model.
        tokenizer: The model's.
        speaker: Embedding [S] for texts without one.
        vocoder: Takes one spectrogram [L, M].

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

    def batches() -> list[Batch]:
        return task.calibration_batches(_NUM_SAMPLES, _GRAPH_BATCH)

    def texts() -> list[Inputs]:
        return [{name: batch[name] for name in (IDS, MASK)} for batch in batches()]

    def steps() -> list[Inputs]:
        return [decoder_inputs(encoder, decoder, batch) for batch in batches()]

    def spectrograms() -> list[Inputs]:
        return [{SPECTROGRAM: batch["log_mel"]} for batch in batches()]

    constants = {**speech_constants(student), "speaker": speaker.tolist()}
    files = {_TOKENIZER_FILE: tokenizer_json(tokenizer).encode()}
    frames, sound = {SPECTROGRAM: {0: "batch", 1: "frames"}}, _sound_constants(architecture)
    return (
        Part("decoder", decoder, decoder.outputs, steps, decoder.axes, constants),
        Part("encoder", encoder, encoder.outputs, texts, encoder.axes, {"tokenizer": _TOKENIZER_FILE}, files),
        Part("postnet", SpeechPostnet(student), ("refined",), spectrograms, frames, sound),
        *_vocoder(vocoder, task),
    )


def _sound_constants(architecture: SpeechArchitecture) -> dict[str, Any]:
    mel = architecture.mel
    return {"sample_rate": architecture.sample_rate, "mel": None if mel is None else dataclasses.asdict(mel)}


def _vocoder(vocoder: nn.Module | None, task: DistillTask) -> tuple[Part, ...]:
    if vocoder is None:
        return ()

    def spectrograms() -> list[Inputs]:
        batches = task.calibration_batches(_NUM_SAMPLES, 1)
        return [{"spectrogram": batch["log_mel"][0]} for batch in batches]

    axes = {"spectrogram": {0: "frames"}}
    return (Part("vocoder", vocoder, ("waveform",), spectrograms, axes),)
