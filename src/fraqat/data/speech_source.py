"""Spoken phrases by source: the ones that lie beside a model of the zoo, or a user's recordings."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fraqat.data.bad_samples import BadSampleError
from fraqat.data.loader import SampleStream
from fraqat.data.records import FOLDER, RecordsSpec, check_records, get_field
from fraqat.data.samples import Sample, SampleSet, open_samples
from fraqat.data.speech import Speech, load_speakers, load_speech, speech_from_recordings
from fraqat.data.speech_signal import LogMelSpec, read_wav
from fraqat.errors import ConfigError, config_error
from fraqat.nn import STRICT_KEYS

SPEECH_FOLDER, SPEAKERS_FILE = "speech", "speakers.safetensors"
"""Beside a model: its recordings, and its speaker embeddings."""


_MIN_SECONDS = 0.1


@dataclass(frozen=True)
class SpeechDataSpec:
    """What the student learns to say.

    Args:
        source: `bundled`, the recordings in the folder `speech` beside the model, or `records` for stored rows.
        records: Where stored rows are, for `source: records`.
        audio_column, text_column: Of stored rows: sound as 16-bit WAV (other formats with the package soundfile), and what is
            said.
        speaker_column: Of stored rows: a list of numbers, the speaker embedding; None takes `speaker`.
        speakers_file: safetensors file with named speaker embeddings; None looks beside the model.
        speaker: Name in that file for every sample; None takes the first.
        max_seconds: Longer recordings are left out.
        num_train: Phrases for training, the first that there are.
        num_validation: Held-out phrases at most.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    source: Literal["bundled", "records"] = "bundled"
    records: RecordsSpec | None = None
    audio_column: str = "audio"
    text_column: str = "text"
    speaker_column: str | None = None
    speakers_file: str | None = None
    speaker: str | None = None
    max_seconds: float = 20.0
    num_train: int = 192
    num_validation: int = 64

    def __post_init__(self) -> None:
        check_records("data", self.source, self.records)
        for name in ("num_train", "num_validation"):
            if getattr(self, name) < 1:
                raise config_error(f"data.{name}", getattr(self, name), allowed="1 or more", fix=f"correct data.{name}")
        if self.max_seconds <= 0:
            raise config_error("data.max_seconds", self.max_seconds, allowed="more than 0", fix="use 20")


def load_speech_data(spec: SpeechDataSpec, model_folder: Path | None, mel: LogMelSpec) -> tuple[Speech, Speech]:
    """Training and held-out utterances.

    Args:
        spec: Source and sizes.
        model_folder: Folder of the model, None for a hub id.
        mel: Kind of spectrogram.

    Raises:
        ConfigError: The data is missing, or has too few utterances.
    """
    if spec.records is None:
        return _bundled(spec, model_folder)
    speaker = None if spec.speaker_column else default_speaker(spec, model_folder)
    sets = open_samples(
        spec.records,
        _SpeechReader(spec),
        [spec.audio_column, spec.text_column, *([spec.speaker_column] if spec.speaker_column else [])],
        image_column=None,
        num_train=spec.num_train,
        num_validation=spec.num_validation,
    )
    train, validation = (_to_speech(samples, speaker, mel, spec.max_seconds) for samples in sets)
    return train, validation


def default_speaker(spec: SpeechDataSpec, model_folder: Path | None) -> Tensor:
    """The speaker embedding [S] for texts without one; S = 0 where there is no file, for models without speakers.

    Raises:
        ConfigError: The file is damaged, or has no such speaker.
    """
    beside = model_folder / SPEAKERS_FILE if model_folder is not None else None
    path = Path(spec.speakers_file) if spec.speakers_file else beside
    if path is None or (spec.speakers_file is None and not path.is_file()):
        return torch.zeros(0)
    speakers = load_speakers(path)
    name = spec.speaker or next(iter(speakers), None)
    if name is None or name not in speakers:
        names = ", ".join(speakers) or "none"
        raise config_error("data.speaker", spec.speaker, allowed=f"{names}, of {path}", fix="choose one of these")
    return speakers[name]


def _bundled(spec: SpeechDataSpec, model_folder: Path | None) -> tuple[Speech, Speech]:
    if model_folder is None or not (model_folder / SPEECH_FOLDER).is_dir():
        raise config_error(
            "data.source",
            spec.source,
            allowed=f"records, as there is no folder {SPEECH_FOLDER} beside the model",
            fix="set data.source: records and data.records.path",
        )
    parts: list[Speech] = []
    for name, field, num in (
        ("training", "num_train", spec.num_train),
        ("held_out", "num_validation", spec.num_validation),
    ):
        speech = load_speech(model_folder / SPEECH_FOLDER / f"{name}.safetensors")
        if num > len(speech):
            raise config_error(f"data.{field}", num, allowed=f"at most {len(speech)}", fix="use less")
        parts.append(speech.subset(range(num)))
    return parts[0], parts[1]


class _SpeechReader:
    """Waveform, rate, text and speaker of a stored row."""

    def __init__(self, spec: SpeechDataSpec):
        self._spec = spec

    def __call__(self, key: str, row: Mapping[str, Any]) -> Sample:
        text = get_field(row, self._spec.text_column)
        if not isinstance(text, str) or not text.strip():
            raise BadSampleError("text is missing" if text is None else "text is empty")
        waveform, rate = _decode(get_field(row, self._spec.audio_column), row.get(FOLDER))
        if len(waveform) < _MIN_SECONDS * rate:
            raise BadSampleError(f"sound is shorter than {_MIN_SECONDS:g} s")
        speaker = get_field(row, self._spec.speaker_column) if self._spec.speaker_column else None
        if self._spec.speaker_column and not isinstance(speaker, list | tuple):
            raise BadSampleError("speaker embedding is missing")
        return {"waveform": waveform, "rate": rate, "text": text.strip(), "speaker": speaker}


def _decode(value: Any, folder: Any) -> tuple[Tensor, int]:
    """Waveform [T] and samples per second of bytes, a path, or the mapping of both that `datasets` makes."""
    data = value.get("bytes") if isinstance(value, Mapping) else value if isinstance(value, bytes) else None
    path = value.get("path") if isinstance(value, Mapping) else value if isinstance(value, str) else None
    if data is None and path is not None:
        place = Path(folder or ".") / path
        data = place.read_bytes() if place.is_file() else None
    if not data:
        raise BadSampleError("sound is missing")
    if data[:4] == b"RIFF":
        try:
            return read_wav(io.BytesIO(data))
        except ConfigError:
            return _soundfile(data)
    return _soundfile(data)


def _soundfile(data: bytes) -> tuple[Tensor, int]:
    try:
        import soundfile
    except ImportError:
        raise ConfigError(
            "data.audio_column holds sound that is not 16-bit WAV: it needs a package that is not installed. Fix: "
            "pip install soundfile, or convert the sound to 16-bit WAV."
        ) from None
    read: Callable[..., tuple[Any, int]] = soundfile.read
    try:
        samples, rate = read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        raise BadSampleError("sound cannot be decoded") from None
    return torch.from_numpy(samples).mean(1), rate


def _to_speech(samples: SampleSet, speaker: Tensor | None, mel: LogMelSpec, max_seconds: float) -> Speech:
    recordings = (
        (
            sample["waveform"],
            sample["rate"],
            sample["text"],
            speaker if speaker is not None else torch.tensor(sample["speaker"], dtype=torch.float32),
        )
        for sample in SampleStream(samples, None, num_epochs=1)
    )
    return speech_from_recordings(recordings, mel, max_seconds=max_seconds)
