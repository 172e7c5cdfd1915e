"""Laws of the colour-digits classifier."""

from pathlib import Path

import pytest
import torch

from fraqat.data.color_digits import COLOR_NAMES, compose, held_out_combinations
from fraqat.evaluation.classifier import (
    NUM_FEATURES,
    ColorDigitClassifier,
    load_classifier,
    save_classifier,
)
from fraqat.zoo.locate import zoo_path

COMBINATIONS = held_out_combinations() * 20


@pytest.fixture(scope="module")
def classifier() -> ColorDigitClassifier:
    return load_classifier(zoo_path("color-digits-classifier"))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return compose(COMBINATIONS, seed=5, split="test")


@torch.no_grad()
def test_shipped_classifier_reads_unseen_scans(classifier: ColorDigitClassifier, images: torch.Tensor) -> None:
    logits = classifier(images)
    digit = torch.tensor([item.digit for item in COMBINATIONS])
    color = torch.tensor([COLOR_NAMES.index(item.color) for item in COMBINATIONS])
    ground = torch.tensor([COLOR_NAMES.index(item.ground) for item in COMBINATIONS])
    assert (logits.digit.argmax(1) == digit).float().mean() >= 0.98
    assert (logits.color.argmax(1) == color).float().mean() >= 0.999
    assert (logits.ground.argmax(1) == ground).float().mean() >= 0.999


@torch.no_grad()
def test_features_feed_the_heads(classifier: ColorDigitClassifier, images: torch.Tensor) -> None:
    features = classifier.features(images[:8])
    assert features.shape == (8, NUM_FEATURES)
    assert torch.equal(classifier.digit_head(features), classifier(images[:8]).digit)
    assert features.std(0).min() > 0


def test_classifier_is_in_evaluation_mode_in_float32_and_small(classifier: ColorDigitClassifier) -> None:
    assert not classifier.training
    assert all(value.dtype == torch.float32 for value in classifier.parameters())
    assert (zoo_path("color-digits-classifier") / "model.safetensors").stat().st_size < 300_000
    assert classifier.color_names == COLOR_NAMES


@torch.no_grad()
def test_saved_classifier_loads_to_half_precision(tmp_path: Path, images: torch.Tensor) -> None:
    torch.manual_seed(0)
    made = ColorDigitClassifier(("red", "blue")).eval()
    save_classifier(made, tmp_path / "new")
    loaded = load_classifier(str(tmp_path / "new"))
    assert loaded.color_names == ("red", "blue")
    assert loaded(images[:4]).color.shape == (4, 2)
    assert torch.allclose(loaded(images[:4]).digit, made(images[:4]).digit, atol=2e-3)


def test_missing_folder_or_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder is .*absent' but config.json is not in it; allowed is a folder with"):
        load_classifier(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors is not in it"):
        load_classifier(tmp_path)
