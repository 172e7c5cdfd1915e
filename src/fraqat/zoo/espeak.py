"""Makes speech with the program espeak-ng, for training the tiny text-to-speech teacher and its judge."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fraqat.data.speech import Speech
from fraqat.data.speech_signal import LogMelSpec, log_mel, read_wav, resample
from fraqat.errors import config_error

WORDS_PER_MINUTE = 190
_AUDIBLE = 0.004  # amplitude below which the edges of a recording are cut
_MARGIN_SECONDS = (0.02, 0.05)  # kept before the first and after the last audible sample
_NOISE = 1e-4  # so that silence has a finite logarithm


def speak(text: str, voice: str, words_per_minute: int = WORDS_PER_MINUTE) -> tuple[Tensor, int]:
    """Says a text.

    Args:
        text: English words.
        voice: voice of espeak-ng, such as "en-us+f3".
        words_per_minute: how fast.

    Returns:
        Waveform [T] in [-1, 1] with its silent edges cut, and samples per second.

    Raises:
        ConfigError: espeak-ng is not installed.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise config_error(
            "espeak-ng", None, allowed="an installed program", fix="install it, for example: apt-get install espeak-ng"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = [program, "-v", voice, "-s", str(words_per_minute), "-w", str(path), text]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603  # the texts are our own
        waveform, rate = read_wav(path)
    audible = (waveform.abs() > _AUDIBLE).nonzero().flatten()
    before, after = (round(seconds * rate) for seconds in _MARGIN_SECONDS)
    return waveform[max(0, int(audible[0]) - before) : int(audible[-1]) + after], rate


def record(
    texts: Sequence[str],
    voices: Sequence[str],
    speakers: Tensor,
    spec: LogMelSpec,
    *,
    seed: int,
    words_per_minute: Sequence[int] = (),
) -> Speech:
    """Says texts and computes their spectrograms; a faint noise (-80 dB) keeps silence finite.

    Args:
        texts: N texts.
        voices: voice of each.
        speakers: speaker embedding of each, [N, S].
        spec: rates and bands.
        seed: seed of the noise.
        words_per_minute: how fast each is said; empty is the usual rate for all.

    Returns:
        The utterances; each has an even number of frames.
    """
    generator = torch.Generator().manual_seed(seed)
    log_mels: list[Tensor] = []
    for text, voice, speed in zip(texts, voices, words_per_minute or [WORDS_PER_MINUTE] * len(texts), strict=True):
        waveform = resample(*speak(text, voice, speed), spec.sample_rate)
        waveform = waveform + _NOISE * torch.randn(waveform.shape, generator=generator)
        mel = log_mel(waveform, spec)
        log_mels.append(mel[: len(mel) // 2 * 2])
    return Speech(tuple(texts), tuple(log_mels), speakers)
