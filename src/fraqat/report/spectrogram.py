"""Recordings as pictures: time to the right, pitch upwards, opacity is loudness."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fraqat.data.speech_signal import LogMelSpec, log_mel
from fraqat.report.samples import Sound

Levels = NDArray[np.float64]

_NUM_MELS = 64
_MIN_HZ, _MAX_HZ = 80.0, 7600.0
_WINDOW_S, _HOP_S = 0.064, 0.008
_MAX_FRAMES = 400
_RANGE_DB = 60.0
_FLOOR_DB = -60.0  # about what the rounding to 16 bits makes audible
_NUM_SHADES = 16


def spectrogram_pngs(sounds: Sequence[Sound]) -> list[bytes]:
    """Draws recordings on one scale of loudness.

    Args:
        sounds: Recordings of the same prompt.

    Returns:
        PNG files, black of different opacity; each as wide as its recording has frames.
    """
    levels_db = [_mel_levels_db(sound) for sound in sounds]
    top_db = max(_FLOOR_DB, *(float(levels.max()) for levels in levels_db))
    return [_to_png(np.clip(1 + (levels - top_db) / _RANGE_DB, 0, 1)) for levels in levels_db]


def _mel_levels_db(sound: Sound) -> Levels:
    """Loudness [mel band, highest first; frame] in dB."""
    rate, num_values = sound.sample_rate, len(sound.values)
    window_length = 2 ** round(math.log2(rate * _WINDOW_S))
    spec = LogMelSpec(
        sample_rate=rate,
        num_mels=_NUM_MELS,
        hop_length=max(round(rate * _HOP_S), math.ceil(num_values / _MAX_FRAMES)),
        window_length=window_length,
        min_hz=_MIN_HZ,
        max_hz=min(_MAX_HZ, rate / 2),
    )
    waveform = torch.zeros(max(num_values, window_length))
    waveform[:num_values] = torch.tensor(sound.values, dtype=torch.float32) / 32768
    return 20 * np.flipud(log_mel(waveform, spec).double().numpy().T)


def _to_png(levels: Levels) -> bytes:
    """A picture of few shades of one colour, which is a fraction of the size of one with a colour per pixel."""
    shades = np.round(levels * (_NUM_SHADES - 1)).astype(np.uint8)
    height, width = shades.shape
    image = Image.frombytes("P", (width, height), shades.tobytes())
    image.putpalette(bytes(3 * _NUM_SHADES))
    opacity = bytes(255 * shade // (_NUM_SHADES - 1) for shade in range(_NUM_SHADES))
    stream = io.BytesIO()
    image.save(stream, format="PNG", bits=4, transparency=opacity, optimize=True)
    return stream.getvalue()
