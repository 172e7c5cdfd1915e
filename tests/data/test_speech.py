"""Laws of spoken data sets and of the closed language."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fraqat.data.speech import (
    Speech,
    load_speakers,
    load_speech,
    save_speakers,
    save_speech,
    speech_from_recordings,
)
from fraqat.data.speech_signal import LogMelSpec, log_mel, resample
from fraqat.data.spoken_phrases import PHRASE_WORDS, held_out_phrases, training_phrases
from fraqat.errors import ConfigError


def utterances(*lengths: int) -> Speech:
    mels = tuple(4 * torch.rand(length, 80) - 4 for length in lengths)
    return Speech(tuple(f"text {length}" for length in lengths), mels, torch.eye(8)[: len(lengths)])


def test_speech_survives_its_file_up_to_half_a_step(tmp_path: Path) -> None:
    speech = utterances(5, 9, 2)
    save_speech(tmp_path / "speech.safetensors", speech, {"licence": "free"})
    loaded = load_speech(tmp_path / "speech.safetensors")
    assert loaded.texts == speech.texts
    assert torch.equal(loaded.speakers, speech.speakers)
    for mel, original in zip(loaded.log_mels, speech.log_mels, strict=True):
        assert mel.shape == original.shape
        assert (mel - original).abs().max() <= 0.0126


def test_saving_what_was_loaded_changes_nothing(tmp_path: Path) -> None:
    save_speech(tmp_path / "a.safetensors", utterances(5, 9))
    save_speech(tmp_path / "b.safetensors", load_speech(tmp_path / "a.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "speech.safetensors"
    save_speech(path, utterances(5))
    path.write_bytes(path.read_bytes()[:-20])
    for bad in (path, tmp_path / "missing.safetensors"):
        with pytest.raises(ConfigError, match=r"data\.source = .* a file of save_speech"):
            load_speech(bad)


def test_columns_are_padded_with_zeros_behind_each_utterance() -> None:
    speech = utterances(5, 9)
    columns = speech.columns()
    assert columns["num_frames"].tolist() == [5, 9]
    assert torch.equal(columns["log_mel"][0, :5], speech.log_mels[0].half())
    assert not columns["log_mel"][0, 5:].any()


def test_a_subset_keeps_text_sound_and_speaker_together() -> None:
    speech = utterances(5, 9, 2)
    chosen = speech.subset([2, 0])
    assert chosen.texts == ("text 2", "text 5")
    assert [len(mel) for mel in chosen.log_mels] == [2, 5]
    assert torch.equal(chosen.speakers, speech.speakers[[2, 0]])


def test_texts_alone_need_no_recordings() -> None:
    speech = Speech(("a", "b"), (), torch.zeros(2, 0))
    assert speech.subset([1]).texts == ("b",)


def test_missing_recordings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"numbers of texts, log_mels and speakers = \(2, 1, 2\)"):
        Speech(("a", "b"), (torch.zeros(3, 80),), torch.zeros(2, 4))


def test_recordings_become_spectrograms_at_the_models_rate() -> None:
    waveform = torch.randn(6000) * 0.1
    speaker = torch.ones(4)
    recordings = [(waveform, 8000, "short", speaker), (torch.zeros(80_000), 8000, "long", speaker)]
    speech = speech_from_recordings(recordings, max_seconds=5.0)
    assert speech.texts == ("short",)
    assert torch.equal(speech.log_mels[0], log_mel(resample(waveform, 8000, 16_000)))
    with pytest.raises(ConfigError, match="recordings = 0"):
        speech_from_recordings(recordings, LogMelSpec(), max_seconds=0.1)


def test_speakers_survive_their_file(tmp_path: Path) -> None:
    save_speakers(tmp_path / "speakers.safetensors", {"one": torch.ones(4), "two": torch.arange(4.0)})
    assert torch.equal(load_speakers(tmp_path / "speakers.safetensors")["two"], torch.arange(4.0))
    with pytest.raises(ConfigError, match="speakers = "):
        load_speakers(tmp_path / "none.safetensors")


def test_held_out_phrases_are_never_trained_on() -> None:
    held_out, training = held_out_phrases(), training_phrases()
    assert not set(held_out) & set(training)
    assert len(set(held_out)) == len(held_out) > 900
    assert len(set(training)) == len(training) > 8000


def test_the_first_phrases_hold_every_word_and_both_forms() -> None:
    for phrases in (held_out_phrases()[:64], training_phrases()[:200]):
        words = {word for phrase in phrases for word in phrase.split()}
        assert words == set(PHRASE_WORDS)
        assert {len(phrase.split()) for phrase in phrases} == {3, 5}
