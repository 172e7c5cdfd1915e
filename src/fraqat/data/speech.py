"""Spoken phrases with their texts: in memory, in a small file, and from a user's recordings.

Shape suffixes: N samples, L frames, M mel bands, S width of a speaker embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fraqat.data.speech_signal import LogMelSpec, log_mel, resample
from fraqat.errors import config_error

_LOW, _STEP = -5.0, 0.025  # log-mel value of code 0, and per code: codes 0 to 255 cover [-5, 1.375]


@dataclass(frozen=True)
class Speech:
    """N utterances.

    Args:
        texts: What is said.
        log_mels: Spectrogram of each, [L, M]; none at all for a model that is taught from texts alone.
        speakers: Speaker embedding of each, [N, S]; S may be 0 for a model without.
    """

    texts: tuple[str, ...]
    log_mels: tuple[Tensor, ...]
    speakers: Tensor

    def __post_init__(self) -> None:
        counts = (len(self.texts), len(self.log_mels) or len(self.texts), len(self.speakers))
        if len(set(counts)) != 1 or not self.texts:
            raise config_error(
                "numbers of texts, log_mels and speakers",
                counts,
                allowed="the same number, 1 or more",
                fix="pass one of each for every utterance",
            )

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, rows: Iterable[int]) -> Speech:
        """The utterances `rows`, in that order."""
        chosen = list(rows)
        log_mels = tuple(self.log_mels[i] for i in chosen) if self.log_mels else ()
        return Speech(tuple(self.texts[i] for i in chosen), log_mels, self.speakers[chosen])

    def columns(self) -> dict[str, Tensor]:
        """`log_mel` [N, L, M] float16, padded with zeros to the longest, and `num_frames` [N]."""
        halves = [mel.half() for mel in self.log_mels]
        lengths = torch.tensor([len(mel) for mel in self.log_mels])
        return {"log_mel": torch.nn.utils.rnn.pad_sequence(halves, batch_first=True), "num_frames": lengths}


def save_speech(path: Path, speech: Speech, metadata: Mapping[str, str] | None = None) -> None:
    """Writes utterances to one safetensors file, the spectrograms in 8 bits (steps of 0.025 in log10 magnitude).

    Args:
        path: File to write.
        speech: What to write; log-mel values outside [-5, 1.375] are clipped.
        metadata: Texts to keep in the file, such as a licence.
    """
    codes = torch.cat(speech.log_mels).sub(_LOW).div(_STEP).round().clamp(0, 255).to(torch.uint8)
    tensors = {
        "codes": codes,
        "num_frames": torch.tensor([len(mel) for mel in speech.log_mels], dtype=torch.int32),
        "speakers": speech.speakers.contiguous(),
    }
    save_file(tensors, path, {"texts": json.dumps(speech.texts), **(metadata or {})})


def load_speech(path: Path) -> Speech:
    """Reads what `save_speech` wrote.

    Raises:
        ConfigError: The file is missing, damaged or another kind.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            texts = json.loads(stream.metadata()["texts"])
            codes, lengths = stream.get_tensor("codes"), stream.get_tensor("num_frames")
            speakers = stream.get_tensor("speakers")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise config_error(
            "data.source",
            str(path),
            allowed=f"a file of save_speech ({error})",
            fix="correct the path or copy it again",
        ) from error
    return Speech(tuple(texts), (codes.float() * _STEP + _LOW).split(lengths.tolist()), speakers)


def save_speakers(path: Path, speakers: Mapping[str, Tensor]) -> None:
    """Writes named speaker embeddings [S] to a safetensors file."""
    save_file({name: embedding.contiguous() for name, embedding in speakers.items()}, path)


def load_speakers(path: Path) -> dict[str, Tensor]:
    """Reads named speaker embeddings.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise config_error(
            "speakers", str(path), allowed=f"a safetensors file of embeddings ({error})", fix="correct the path"
        ) from error


def speech_from_recordings(
    recordings: Iterable[tuple[Tensor, int, str, Tensor]],
    spec: LogMelSpec | None = None,
    *,
    max_seconds: float = 20.0,
) -> Speech:
    """Computes the spectrograms of a user's recordings; longer ones than `max_seconds` are left out.

    Args:
        recordings: (waveform [T] in [-1, 1], samples per second, text, speaker embedding [S]) of each.
        spec: Rates and bands; waveforms of another rate are resampled.
        max_seconds: Longest recording.

    Raises:
        ConfigError: None is left, or one is shorter than half a window.
    """
    spec = spec or LogMelSpec()
    texts: list[str] = []
    log_mels: list[Tensor] = []
    speakers: list[Tensor] = []
    for waveform, rate, text, speaker in recordings:
        if len(waveform) <= max_seconds * rate:
            texts.append(text)
            log_mels.append(log_mel(resample(waveform, rate, spec.sample_rate), spec))
            speakers.append(speaker.float())
    if not texts:
        raise config_error("recordings", 0, allowed="1 or more that are short enough", fix="raise max_seconds")
    return Speech(tuple(texts), tuple(log_mels), torch.stack(speakers))
