"""Laws of the text-to-speech teacher's training that are cheap enough to check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fraqat.data.speech import Speech
from fraqat.data.spoken_phrases import PHRASE_WORDS
from fraqat.errors import ConfigError
from fraqat.zoo import espeak, speech_training
from fraqat.zoo.recognizer_training import train_recognizer
from fraqat.zoo.speech_models import build_config, build_tokenizer, speaker_embeddings
from fraqat.zoo.speech_training import SpeechTrainingSettings, TrainingBatches, model_arguments, train_speech_model

SETTINGS = SpeechTrainingSettings(num_steps=4, batch_size=2, num_warmup_steps=1, checkpoint_every=2)
MIXED = "ignore:Mismatch dtype between input and weight:UserWarning"


def some_speech(num: int = 6) -> Speech:
    generator = torch.Generator().manual_seed(0)
    lengths = [6 + 2 * (i % 4) for i in range(num)]
    mels = tuple(torch.randn(length, 80, generator=generator) - 2 for length in lengths)
    voices = torch.stack(list(speaker_embeddings().values()))
    return Speech(PHRASE_WORDS[:num], mels, voices[torch.arange(num) % 2])


def tiny_model() -> Any:
    from transformers import SpeechT5ForTextToSpeech

    config = build_config(len(build_tokenizer()), 80)
    config.encoder_layers = config.decoder_layers = 1
    torch.manual_seed(0)
    return SpeechT5ForTextToSpeech(config)


@pytest.mark.filterwarnings(MIXED)
def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, whole, resumed = build_tokenizer(), tiny_model(), tiny_model()
    result = train_speech_model(whole, tokenizer, some_speech(), SETTINGS, tmp_path / "whole.pt")
    save = speech_training._Run.save

    def save_and_stop(run: speech_training._Run, path: Path) -> None:
        save(run, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(speech_training._Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_speech_model(resumed, tokenizer, some_speech(), SETTINGS, tmp_path / "run.pt")
    monkeypatch.setattr(speech_training._Run, "save", save)
    again = train_speech_model(tiny_model(), tokenizer, some_speech(), SETTINGS, tmp_path / "run.pt")
    assert again.loss == result.loss
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "run.pt"))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_batches_hold_utterances_of_about_equal_length_with_their_texts() -> None:
    speech, tokenizer = some_speech(26), build_tokenizer()
    batches = TrainingBatches(speech, tokenizer, 8, seed=0)
    for _ in range(4):
        batch = batches.draw()
        frames = (batch["labels"][..., 0] != -100).sum(1)
        assert len(frames) == 8 and frames.max() - frames.min() <= 4
        for ids, mel, length in zip(batch["input_ids"], batch["labels"], frames.tolist(), strict=True):
            word = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
            assert torch.equal(mel[:length], speech.log_mels[PHRASE_WORDS.index(word)])


@pytest.mark.parametrize("num_seen", [0, 1, 3, 4, 6])
def test_a_saved_position_goes_on_with_the_next_batch(num_seen: int) -> None:
    whole, first, second = (TrainingBatches(some_speech(26), build_tokenizer(), 3, seed) for seed in (0, 0, 1))
    labels = [whole.draw()["labels"] for _ in range(num_seen + 6)]
    for _ in range(num_seen):
        first.draw()
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.draw()["labels"], wanted) for wanted in labels[num_seen:])


def test_padding_is_ignored_by_the_loss() -> None:
    arguments = model_arguments(some_speech(4), build_tokenizer())
    lengths = (arguments["labels"][..., 0] != -100).sum(1).tolist()
    assert lengths == [6, 8, 10, 12]
    assert (arguments["labels"][0, 6:] == -100).all()
    assert arguments["attention_mask"].sum(1).tolist() == [5, 5, 5, 5]


def test_the_recognizer_learns_two_sounds() -> None:
    low, high = torch.full((24, 80), -4.0), torch.full((24, 80), -4.0)
    low[4:20, :40], high[4:20, 40:] = 0.0, 0.0
    speech = Speech(PHRASE_WORDS[:2] * 4, (low, high) * 4, torch.zeros(8, 0))
    recognizer = train_recognizer(speech, num_steps=60, batch_size=8, seed=0)
    assert [recognizer.recognize(mel) for mel in (low, high)] == list(PHRASE_WORDS[:2])


def test_a_missing_espeak_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(espeak.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="apt-get install espeak-ng"):
        espeak.speak("red", "en-us")


def test_recordings_are_cut_made_even_and_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    from fraqat.data.speech_signal import LogMelSpec

    said: list[tuple[str, str, int]] = []

    def tone(text: str, voice: str, speed: int) -> tuple[torch.Tensor, int]:
        said.append((text, voice, speed))
        return torch.zeros(22_050 // 2), 22_050

    monkeypatch.setattr(espeak, "speak", tone)
    speech = espeak.record(["red", "two"], ["a", "b"], torch.zeros(2, 4), LogMelSpec(), seed=0)
    assert said == [("red", "a", espeak.WORDS_PER_MINUTE), ("two", "b", espeak.WORDS_PER_MINUTE)]
    assert [len(mel) for mel in speech.log_mels] == [32, 32]
    assert all(mel.min() > -5.5 for mel in speech.log_mels)
