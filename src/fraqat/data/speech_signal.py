"""Waveforms and log-mel spectrograms in plain torch: features as SpeechT5 computes them, Griffin-Lim, resampling, WAV files.

Shape suffixes: T samples, L frames, F frequencies, M mel bands.
"""

from __future__ import annotations

import math
import sys
import wave
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fraqat.errors import config_error
from fraqat.nn import STRICT_KEYS

_SINC_ZEROS = 16  # zero crossings of the resampling filter to each side
_ROLLOFF = 0.95  # share of the lower Nyquist frequency that resampling keeps
_MOMENTUM = 0.99  # of fast Griffin-Lim


@dataclass(frozen=True)
class LogMelSpec:
    """A log-mel spectrogram. The defaults are those of transformers' `SpeechT5FeatureExtractor`.

    Args:
        sample_rate: Samples per second.
        num_mels: Mel bands.
        hop_length: Samples between frames (256 at 16 kHz are 16 ms).
        window_length: Samples of the Hann window and of the Fourier transform.
        min_hz, max_hz: Lowest and highest frequency of the bands.
        floor: Smallest magnitude before the logarithm.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    sample_rate: int = 16_000
    num_mels: int = 80
    hop_length: int = 256
    window_length: int = 1024
    min_hz: float = 80.0
    max_hz: float = 7600.0
    floor: float = 1e-10

    def __post_init__(self) -> None:
        for name in ("sample_rate", "num_mels", "hop_length", "window_length", "floor"):
            if not getattr(self, name) > 0:
                raise config_error(f"mel.{name}", getattr(self, name), allowed="more than 0", fix="use the default")
        if not 0 <= self.min_hz < self.max_hz <= self.sample_rate / 2:
            raise config_error(
                "mel.max_hz",
                self.max_hz,
                allowed=f"more than min_hz = {self.min_hz:g} and at most half of the sample rate {self.sample_rate}",
                fix="lower it",
            )


def log_mel(waveform: Tensor, spec: LogMelSpec | None = None) -> Tensor:
    """log10 of the mel-weighted magnitudes, as `SpeechT5FeatureExtractor` computes spectrogram targets.

    Args:
        waveform: [T] or [N, T] in [-1, 1]; T more than half a window.
        spec: Rates and bands.

    Returns:
        [L, M] or [N, L, M] float32, L = 1 + T // hop_length.

    Raises:
        ConfigError: The waveform is too short for one window.
    """
    spec = spec or LogMelSpec()
    if waveform.shape[-1] <= spec.window_length // 2:
        raise config_error(
            "samples of a waveform",
            waveform.shape[-1],
            allowed=f"more than {spec.window_length // 2}, half a window",
            fix="leave the recording out, or pad it with silence",
        )
    spectrum = _stft(waveform.float(), spec)  # [..., F, L]
    mel = spectrum.abs().transpose(-1, -2) @ mel_filters(spec).to(spectrum.device)
    return mel.clamp_min(spec.floor).log10()


@lru_cache(maxsize=8)
def mel_filters(spec: LogMelSpec) -> Tensor:
    """Triangular bands, equally spaced on Slaney's mel scale and of equal area.

    Returns:
        [F, M] float32, F = window_length // 2 + 1.
    """
    edges = _mel_to_hz(torch.linspace(_hz_to_mel(spec.min_hz), _hz_to_mel(spec.max_hz), spec.num_mels + 2).double())
    frequencies = torch.linspace(0, spec.sample_rate / 2, spec.window_length // 2 + 1).double()
    distance = edges[None] - frequencies[:, None]  # [F, M + 2]
    width = edges.diff()
    rising, falling = -distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]
    triangles = torch.minimum(rising, falling).clamp_min(0)
    return (triangles * (2 / (edges[2:] - edges[:-2]))).float()


def _hz_to_mel(hz: float) -> float:
    """Slaney's scale: linear up to 1000 Hz, logarithmic above."""
    return 15 + math.log(hz / 1000) * 27 / math.log(6.4) if hz >= 1000 else 3 * hz / 200


def _mel_to_hz(mel: Tensor) -> Tensor:
    return torch.where(mel >= 15, 1000 * torch.exp(math.log(6.4) / 27 * (mel - 15)), 200 * mel / 3)


def _stft(waveform: Tensor, spec: LogMelSpec) -> Tensor:
    window = torch.hann_window(spec.window_length, device=waveform.device)
    return torch.stft(
        waveform,
        spec.window_length,
        spec.hop_length,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )


def griffin_lim(log_mels: Tensor, spec: LogMelSpec | None = None, *, num_iterations: int = 48, seed: int = 0) -> Tensor:
    """A waveform with about the given log-mel spectrogram, without a trained vocoder.

    Magnitudes come from the pseudo-inverse of the mel bands, phases from the fast Griffin-Lim algorithm
    (Perraudin, Balazs, Sondergaard, 2013).

    Args:
        log_mels: [L, M], as `log_mel` gives it; at least 5 frames.
        spec: Rates and bands that it was computed with.
        num_iterations: Of Griffin-Lim.
        seed: Of the first phases.

    Returns:
        [(L - 1) * hop_length] float32, its peak at most 1.

    Raises:
        ConfigError: Too few frames, or another number of bands.
    """
    spec = spec or LogMelSpec()
    if log_mels.ndim != 2 or len(log_mels) < 5 or log_mels.shape[1] != spec.num_mels:
        raise config_error(
            "shape of a log-mel spectrogram",
            tuple(log_mels.shape),
            allowed=f"[5 or more frames, {spec.num_mels} bands]",
            fix="pass one spectrogram, and the LogMelSpec that it was made with",
        )
    inverse_MF = torch.linalg.pinv(mel_filters(spec)).to(log_mels.device)
    magnitude = (10 ** log_mels.float() @ inverse_MF).clamp_min(0).T  # [F, L]
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(magnitude.shape, generator=generator).to(log_mels.device)
    phase, previous = torch.polar(torch.ones_like(angle), angle), torch.zeros((), device=log_mels.device)
    for _ in range(num_iterations):
        rebuilt = _stft(_istft(magnitude * phase, spec), spec)
        accelerated = rebuilt + _MOMENTUM / (1 + _MOMENTUM) * (rebuilt - previous)
        phase, previous = accelerated / accelerated.abs().clamp_min(1e-12), rebuilt
    waveform = _istft(magnitude * phase, spec)
    return waveform / waveform.abs().max().clamp_min(1)


def _istft(spectrum: Tensor, spec: LogMelSpec) -> Tensor:
    window = torch.hann_window(spec.window_length, device=spectrum.device)
    return torch.istft(spectrum, spec.window_length, spec.hop_length, window=window, center=True)


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Changes the sample rate with a windowed-sinc filter; what lies above the lower Nyquist frequency is removed.

    Args:
        waveform: [T].
        from_rate, to_rate: Samples per second.

    Returns:
        [ceil(T * to_rate / from_rate)] float32.

    Raises:
        ConfigError: A rate is not positive.
    """
    for name, rate in (("from_rate", from_rate), ("to_rate", to_rate)):
        if rate < 1:
            raise config_error(name, rate, allowed="1 or more samples per second", fix="correct it")
    if from_rate == to_rate:
        return waveform.float()
    divisor = math.gcd(from_rate, to_rate)
    old, new = from_rate // divisor, to_rate // divisor
    kernel, width = _sinc_kernel(old, new)
    padded = F.pad(waveform.float()[None, None], (width, width + old))
    phases = F.conv1d(padded, kernel.to(waveform.device), stride=old)  # [1, new, steps]: one output phase per channel
    return phases.transpose(1, 2).reshape(-1)[: -(-len(waveform) * new // old)]


@lru_cache(maxsize=8)
def _sinc_kernel(old: int, new: int) -> tuple[Tensor, int]:
    """Filters [new, 1, 2 width + old] for every output phase, and how far they reach back in input samples."""
    cutoff = _ROLLOFF * min(old, new)
    width = math.ceil(_SINC_ZEROS * old / cutoff)
    time = torch.arange(-width, width + old, dtype=torch.float64) / old - torch.arange(new).double()[:, None] / new
    scaled = (time * cutoff).clamp(-_SINC_ZEROS, _SINC_ZEROS)
    window = torch.cos(scaled * math.pi / (2 * _SINC_ZEROS)).square()
    return (torch.sinc(scaled) * window * (cutoff / old)).float()[:, None], width


def write_wav(path: Path | BinaryIO, waveform: Tensor, sample_rate: int) -> None:
    """Writes a mono 16-bit WAV file.

    Args:
        path: Where to, a file in a folder that exists or an open stream.
        waveform: [T]; values outside [-1, 1] are clipped.
        sample_rate: Samples per second.
    """
    samples = array("h", (waveform.detach().float().cpu().clamp(-1, 1) * 32767).round().short().tolist())
    if sys.byteorder == "big":
        samples.byteswap()
    with wave.open(str(path) if isinstance(path, Path) else path, "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(sample_rate)
        stream.writeframes(samples.tobytes())


def read_wav(path: Path | BinaryIO) -> tuple[Tensor, int]:
    """Reads a 16-bit WAV file; several channels are averaged.

    Args:
        path: File, or an open stream of its bytes.

    Returns:
        Waveform [T] float32 in [-1, 1], and samples per second.

    Raises:
        ConfigError: The file is missing, or no 16-bit WAV file.
    """
    try:
        with wave.open(str(path) if isinstance(path, Path) else path, "rb") as stream:
            width, channels, rate = stream.getsampwidth(), stream.getnchannels(), stream.getframerate()
            data = stream.readframes(stream.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise config_error(
            "path", str(path), allowed=f"a WAV file ({error})", fix="convert it to 16-bit WAV"
        ) from error
    if width != 2:
        raise config_error("path", str(path), allowed=f"16 bits per sample, not {8 * width}", fix="convert it")
    samples = array("h", data)
    if sys.byteorder == "big":
        samples.byteswap()
    return torch.tensor(samples, dtype=torch.float32).view(-1, channels).mean(1) / 32768, rate
