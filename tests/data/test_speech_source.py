"""Laws of spoken data: what lies beside a model, and recordings of a user's own."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch

from fraqat.data.records import RecordsSpec
from fraqat.data.speech import Speech, save_speakers, save_speech
from fraqat.data.speech_signal import LogMelSpec, write_wav
from fraqat.data.speech_source import SpeechDataSpec, default_speaker, load_speech_data
from fraqat.errors import ConfigError

pytestmark = [
    # datasets leaves the metadata file of a folder to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def tone(seconds: float = 0.3, rate: int = 16_000) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * 440 * torch.arange(int(seconds * rate)) / rate)


@pytest.fixture
def bundled(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "speech").mkdir(parents=True)
    for name, num in (("training", 6), ("held_out", 3)):
        mels = tuple(torch.full((10 + i, 80), -2.0) for i in range(num))
        speech = Speech(tuple(f"{name} {i}" for i in range(num)), mels, torch.ones(num, 4))
        save_speech(folder / "speech" / f"{name}.safetensors", speech)
    save_speakers(folder / "speakers.safetensors", {"anna": torch.ones(4), "bert": torch.zeros(4)})
    return folder


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "recordings"
    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(12):
        write_wav(folder / f"{i:02d}.wav", tone(0.2 + 0.02 * i), 16_000)
        lines.append(f"{i:02d}.wav,phrase {i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_bundled_recordings_are_split_as_they_lie(bundled: Path) -> None:
    train, validation = load_speech_data(SpeechDataSpec(num_train=4, num_validation=2), bundled, LogMelSpec())
    assert train.texts == tuple(f"training {i}" for i in range(4))
    assert validation.texts == ("held_out 0", "held_out 1")


def test_more_phrases_than_there_are_is_an_error_that_says_how_many(bundled: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.num_train = 7 is not possible: allowed is at most 6"):
        load_speech_data(SpeechDataSpec(num_train=7, num_validation=1), bundled, LogMelSpec())


def test_a_model_without_recordings_asks_for_records(tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        with pytest.raises(ConfigError, match=r"data\.source = 'bundled' is not possible: allowed is records"):
            load_speech_data(SpeechDataSpec(), folder, LogMelSpec())


def test_speakers_are_chosen_by_name(bundled: Path) -> None:
    assert torch.equal(default_speaker(SpeechDataSpec(), bundled), torch.ones(4))
    assert torch.equal(default_speaker(SpeechDataSpec(speaker="bert"), bundled), torch.zeros(4))
    assert default_speaker(SpeechDataSpec(), None).numel() == 0
    with pytest.raises(ConfigError, match=r"data\.speaker = 'carl' is not possible: allowed is anna, bert"):
        default_speaker(SpeechDataSpec(speaker="carl"), bundled)


def test_recordings_of_a_folder_become_spectrograms(recordings: Path, bundled: Path) -> None:
    records = RecordsSpec(str(recordings), files="metadata.csv", validation_share=0.3)
    spec = SpeechDataSpec(source="records", records=records, audio_column="file_name", num_train=5, num_validation=2)
    train, validation = load_speech_data(spec, bundled, LogMelSpec())
    assert len(train) == 5
    assert len(validation) >= 1
    assert not set(train.texts) & set(validation.texts)
    for text, mel in zip(train.texts, train.log_mels, strict=True):
        frames = 16_000 * (0.2 + 0.02 * int(text.split()[1])) / LogMelSpec().hop_length
        assert abs(len(mel) - frames) < 6
    assert torch.equal(train.speakers, torch.ones(5, 4))


def test_long_recordings_are_left_out(recordings: Path, bundled: Path) -> None:
    records = RecordsSpec(str(recordings), files="metadata.csv", validation_share=0.3)
    spec = SpeechDataSpec(
        source="records", records=records, audio_column="file_name", num_train=5, num_validation=2, max_seconds=0.27
    )
    train, _ = load_speech_data(spec, bundled, LogMelSpec())
    assert all(int(text.split()[1]) <= 3 for text in train.texts)


@pytest.mark.parametrize("kind", ["FLAC", "OGG"])
def test_other_formats_are_read_by_soundfile(tmp_path: Path, bundled: Path, kind: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    import pandas

    rows: list[dict[str, object]] = []
    for i in range(8):
        stream = io.BytesIO()
        soundfile.write(stream, tone().numpy(), 16_000, format=kind)
        rows.append({"audio": {"bytes": stream.getvalue(), "path": None}, "text": f"phrase {i}"})
    pandas.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    records = RecordsSpec(str(tmp_path / "data.parquet"), validation_share=0.4)
    spec = SpeechDataSpec(source="records", records=records, num_train=2, num_validation=2)
    train, _ = load_speech_data(spec, bundled, LogMelSpec())
    assert len(train) == 2
    assert float(train.log_mels[0].max()) > -2
