"""Laws of the small recognizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fraqat.evaluation.phrase_recognizer import PhraseRecognizer, load_recognizer, save_recognizer

WORDS = ("red", "two", "on")


def test_scores_are_log_probabilities_at_a_quarter_of_the_frames() -> None:
    recognizer = PhraseRecognizer(WORDS).eval()
    scores = recognizer(torch.randn(2, 41, 80))
    assert scores.shape == (2, 11, 4)
    assert torch.allclose(scores.exp().sum(-1), torch.ones(2, 11))


def test_repeated_classes_and_blanks_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    recognizer = PhraseRecognizer(WORDS).eval()
    classes = torch.tensor([0, 1, 1, 0, 1, 2, 0, 3, 3])
    monkeypatch.setattr(PhraseRecognizer, "forward", lambda self, mels: torch.eye(4)[classes][None])
    assert recognizer.recognize(torch.zeros(12, 80)) == "red red two on"


def test_a_recognizer_survives_its_folder(tmp_path: Path) -> None:
    recognizer = PhraseRecognizer(WORDS).half().float().eval()
    save_recognizer(recognizer, tmp_path)
    loaded = load_recognizer(tmp_path)
    mels = torch.randn(1, 20, 80)
    assert loaded.words == WORDS
    assert torch.equal(loaded(mels), recognizer(mels))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is not in it; allowed is a folder"):
        load_recognizer(tmp_path)
