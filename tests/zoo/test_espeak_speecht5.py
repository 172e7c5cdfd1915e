"""Laws of the embedded text-to-speech teacher: it is small, plain, and says what it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fraqat.data.speech import load_speakers, load_speech
from fraqat.data.spoken_phrases import held_out_phrases, training_phrases
from fraqat.evaluation.phrase_recognizer import load_recognizer
from fraqat.evaluation.speech import speech_quality, word_error_rate
from fraqat.tasks.spec import ModelSpec
from fraqat.tasks.speech_loading import SpeechModel, load_speech_model, synthesize
from fraqat.zoo import zoo_path

FOLDER = zoo_path("espeak-speecht5")


@pytest.fixture(scope="module")
def loaded() -> SpeechModel:
    return load_speech_model(ModelSpec(str(FOLDER), device="cpu"))


def test_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_500_000
    assert sum(path.stat().st_size for path in files if path.parent == FOLDER) <= 4_500_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_it_is_a_speecht5_with_widths_that_groups_divide(loaded: SpeechModel) -> None:
    assert type(loaded.model).__name__ == "SpeechT5ForTextToSpeech"
    for name, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "prob_out" not in name:
            out_features, in_features = module.weight.shape
            assert in_features % 16 == 0 and out_features % 32 == 0, name
            assert in_features % 32 == 0 or name.endswith("prenet.layers.0"), name  # 80 mel bands


def test_recordings_are_the_first_phrases_of_each_split() -> None:
    training = load_speech(FOLDER / "speech" / "training.safetensors")
    held_out = load_speech(FOLDER / "speech" / "held_out.safetensors")
    assert training.texts == training_phrases()[: len(training)]
    assert held_out.texts == held_out_phrases()[: len(held_out)]
    assert len(training) >= 200 and len(held_out) >= 48
    voices = torch.stack(list(load_speakers(FOLDER / "speakers.safetensors").values()))
    for speech in (training, held_out):
        nearest = torch.cdist(speech.speakers, voices)
        assert torch.equal(nearest.min(1).values, torch.zeros(len(speech)))
        assert nearest.argmin(1).bincount().min() > 0.4 * len(speech)
        assert all(len(mel) % 2 == 0 and 30 < len(mel) < 140 for mel in speech.log_mels)


def test_held_out_phrases_are_said_close_to_espeak_and_can_be_understood(loaded: SpeechModel) -> None:
    speech = load_speech(FOLDER / "speech" / "held_out.safetensors").subset(range(16))
    spoken = synthesize(loaded.model, loaded.tokenize, speech.texts, speech.speakers, seed=3)
    recognizer = load_recognizer(FOLDER / "recognizer").recognize
    quality = speech_quality(spoken, speech.log_mels, speech.texts, recognizer)
    assert quality.mel_cepstral_distortion_db < 3.0
    assert quality.length_difference < 0.08
    assert quality.word_error_rate is not None and quality.word_error_rate <= 0.05
    assert quality.teacher_word_error_rate is not None and quality.teacher_word_error_rate <= 0.03


def test_the_recognizer_does_not_hear_what_is_not_said() -> None:
    speech = load_speech(FOLDER / "speech" / "held_out.safetensors").subset(range(8))
    recognizer = load_recognizer(FOLDER / "recognizer").recognize
    heard = [recognizer(mel) for mel in speech.log_mels]
    assert word_error_rate(heard, speech.texts[1:] + speech.texts[:1]) > 0.5
    assert recognizer(torch.full((60, 80), -3.9) + 0.1 * torch.randn(60, 80)) == ""


def test_both_voices_say_the_same_words_differently(loaded: SpeechModel) -> None:
    voices = torch.stack(list(load_speakers(FOLDER / "speakers.safetensors").values()))
    text = "draw red seven under blue"
    spoken = synthesize(loaded.model, loaded.tokenize, [text, text], voices)
    recognizer = load_recognizer(FOLDER / "recognizer").recognize
    assert [recognizer(mel) for mel in spoken] == [text, text]
    assert speech_quality(spoken[:1], spoken[1:]).mel_cepstral_distortion_db > 3


def test_unknown_letters_are_tokens(loaded: SpeechModel) -> None:
    tokens = loaded.tokenizer(["Ab", ""]).input_ids
    assert tokens[0] == [loaded.tokenizer.unk_token_id, 6, loaded.tokenizer.eos_token_id]
    assert tokens[1] == [loaded.tokenizer.eos_token_id]


def test_quality_file_meets_the_acceptance_and_is_on_the_card() -> None:
    figures = json.loads((FOLDER / "quality.json").read_text())
    model, other = figures["model"], figures["other_phrase"]
    assert model["num_phrases"] >= 48
    assert model["mel_cepstral_distortion_db"] < 0.3 * other["mel_cepstral_distortion_db"]
    assert model["word_error_rate"] <= 0.03 and figures["espeak"]["word_error_rate"] <= 0.02
    card = (FOLDER / "README.md").read_text()
    assert f"{model['mel_cepstral_distortion_db']:.2f} | {model['log_spectral_distance_db']:.2f}" in card
    assert "Apache-2.0" in card and "GPL-3.0-or-later" in card


def test_code_on_the_card_runs() -> None:
    card = (FOLDER / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"folder": FOLDER}
    exec(code, names)
    assert names["waveform"].ndim == 1
    assert 0.8 < len(names["waveform"]) / 16_000 < 2.5
