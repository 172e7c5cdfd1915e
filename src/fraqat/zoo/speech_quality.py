"""Measures the espeak SpeechT5: how close is what it says to espeak-ng, and can it be understood?

    python -m fraqat.zoo.speech_quality --model DIR

prints the figures and writes them to `quality.json` in the model's folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fraqat.data.speech import Speech, load_speech
from fraqat.data.speech_signal import griffin_lim, log_mel
from fraqat.evaluation.phrase_recognizer import load_recognizer
from fraqat.evaluation.speech import (
    Recognizer,
    character_error_rate,
    speech_quality,
    word_error_rate,
)
from fraqat.tasks.spec import ModelSpec
from fraqat.tasks.speech_loading import load_speech_model, synthesize

QUALITY_NAME = "quality.json"
SPEECH_FOLDER, RECOGNIZER_FOLDER = "speech", "recognizer"
SEED = 0


@dataclass(frozen=True)
class SpeechFigures:
    """How one kind of speech compares with espeak-ng's own on the same phrases.

    Args:
        num_phrases: phrases compared.
        mel_cepstral_distortion_db: aligned in time, 13 cepstra.
        log_spectral_distance_db: aligned in time.
        length_difference: difference in frames as a share of espeak-ng's.
        word_error_rate: of the recognizer.
        character_error_rate: of the recognizer.
    """

    num_phrases: int
    mel_cepstral_distortion_db: float
    log_spectral_distance_db: float
    length_difference: float
    word_error_rate: float
    character_error_rate: float


def compare(log_mels: Sequence[Tensor], speech: Speech, recognizer: Recognizer) -> SpeechFigures:
    """Compares spoken phrases with espeak-ng's.

    Args:
        log_mels: what was said for each phrase, [L, M].
        speech: phrases, said by espeak-ng.
        recognizer: the judge.

    Returns:
        The figures.
    """
    quality = speech_quality(log_mels, speech.log_mels)
    heard = [recognizer(mel) for mel in log_mels]
    figures = (quality.mel_cepstral_distortion_db, quality.log_spectral_distance_db, quality.length_difference)
    errors = word_error_rate(heard, speech.texts), character_error_rate(heard, speech.texts)
    return SpeechFigures(len(speech), *(round(value, 4) for value in (*figures, *errors)))


def measure_folder(folder: Path) -> dict[str, SpeechFigures]:
    """Measures a model folder as the card reports it, on its held-out phrases, and writes `quality.json` into it.

    Args:
        folder: what the training script writes.

    Returns:
        "model" (spoken freely), "model_griffin_lim" (the same, through a waveform), "espeak" (its own speech: how good the
        judge is), and "other_phrase" (espeak-ng saying something else: how large distances get).
    """
    loaded = load_speech_model(ModelSpec(str(folder), device="cpu"))
    speech = load_speech(folder / SPEECH_FOLDER / "held_out.safetensors")
    recognize = load_recognizer(folder / RECOGNIZER_FOLDER).recognize
    spoken = synthesize(loaded.model, loaded.tokenize, speech.texts, speech.speakers, seed=SEED)
    others = speech.subset([*range(2, len(speech)), 0, 1])
    figures = {
        "model": compare(spoken, speech, recognize),
        "model_griffin_lim": compare([log_mel(griffin_lim(mel)) for mel in spoken], speech, recognize),
        "espeak": compare(speech.log_mels, speech, recognize),
        "other_phrase": compare(others.log_mels, speech, recognize),
    }
    text = json.dumps({name: asdict(value) for name, value in figures.items()}, indent=2)
    (folder / QUALITY_NAME).write_text(text + "\n")
    return figures


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure the espeak SpeechT5.")
    parser.add_argument("--model", type=Path, required=True, help="model folder; quality.json is written into it")
    for name, figures in measure_folder(parser.parse_args().model).items():
        print(name, figures)


if __name__ == "__main__":
    main()
