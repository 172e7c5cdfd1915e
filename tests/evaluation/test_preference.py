"""The adapters of ImageReward and VQAScore: the error without the library, and the call with a stand-in."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from fraqat.errors import ConfigError
from fraqat.evaluation.preference import ImageRewardScore, VqaScore

IMAGES = torch.stack([torch.full((3, 8, 6), value) for value in (-1.0, 0.0, 1.0)])
PROMPTS = ("black", "grey", "white")


def test_without_the_libraries_the_errors_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ImageReward", "t2v_metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"image_reward needs ImageReward.*pip install 'fraqat\[image-reward\]'"):
        ImageRewardScore()
    with pytest.raises(ConfigError, match=r"vqa_score needs t2v_metrics.*pip install --no-deps t2v-metrics"):
        VqaScore()


def test_image_reward_is_given_each_image_with_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Model:
        def score(self, prompt: str, image: Any) -> float:
            assert isinstance(image, Image.Image)
            seen.append((prompt, image.size, image.getpixel((5, 7))))
            return len(seen) / 2

    module: Any = ModuleType("ImageReward")
    module.load = lambda name, device: seen.append((name, device)) or Model()
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    scorer = ImageRewardScore()
    assert seen.pop() == ("ImageReward-v1.0", "cpu")
    assert scorer.scores(IMAGES, PROMPTS).tolist() == [0.5, 1.0, 1.5]
    assert seen == [(p, (6, 8), (v,) * 3) for p, v in zip(PROMPTS, (0, 128, 255), strict=True)]
    ImageRewardScore("/models/reward.pt", "cuda:0")
    assert seen[-1] == ("/models/reward.pt", "cuda:0")


def test_vqa_score_is_given_a_file_of_each_image_with_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Score:
        def __init__(self, model: str, device: str):
            seen.append((model, device))

        def __call__(self, images: list[str], texts: list[str]) -> torch.Tensor:
            with Image.open(images[0]) as picture:
                seen.append((texts, len(images), picture.getpixel((0, 0))))
            return torch.tensor([[0.25]])

    module: Any = ModuleType("t2v_metrics")
    module.VQAScore = Score
    monkeypatch.setitem(sys.modules, "t2v_metrics", module)
    found = VqaScore().scores(IMAGES, PROMPTS)
    assert found.tolist() == [0.25] * 3
    assert seen[0] == ("clip-flant5-xxl", "cpu")
    assert seen[1:] == [([p], 1, (v,) * 3) for p, v in zip(PROMPTS, (0, 128, 255), strict=True)]
