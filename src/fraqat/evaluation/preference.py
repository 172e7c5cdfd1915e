"""Scores of images by models that people's preferences or questions made: ImageReward and VQAScore.

The only home of ImageReward and t2v_metrics, which are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fraqat.errors import ConfigError
from fraqat.evaluation.inception import as_bytes

IMAGE_REWARD_SOURCE = "ImageReward-v1.0"
VQA_SCORE_SOURCE = "clip-flant5-xxl"


class ImageRewardScore:
    """ImageReward (Xu et al. 2023, arXiv 2304.05977): a reward that was fitted to people's rankings; higher is better.

    Args:
        source: Name or path that `ImageReward.load` takes.
        device: Where it computes.

    Raises:
        ConfigError: image-reward is not installed.
    """

    def __init__(self, source: str | None = None, device: torch.device | str = "cpu"):
        library = _library("ImageReward", "image_reward", "pip install 'fraqat[image-reward]'")
        self._model: Any = library.load(source or IMAGE_REWARD_SOURCE, device=str(device))

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [N], about standard normal over the images that it was fitted to, of images [N, 3, H, W] in [-1, 1]."""
        pictures = _pictures(images)
        return torch.tensor([float(self._model.score(p, x)) for p, x in zip(prompts, pictures, strict=True)])


class VqaScore:
    """VQAScore (Lin et al. 2024, arXiv 2404.01291): probability of "yes" to "Does this figure show PROMPT?".

    Args:
        source: Name of a model of t2v_metrics.
        device: Where it computes.

    Raises:
        ConfigError: t2v-metrics is not installed.
    """

    def __init__(self, source: str | None = None, device: torch.device | str = "cpu"):
        fix = "pip install --no-deps t2v-metrics (there is no extra: it asks for a torch and a transformers of its own)"
        library = _library("t2v_metrics", "vqa_score", fix)
        self._model: Any = library.VQAScore(model=source or VQA_SCORE_SOURCE, device=str(device))

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probabilities [N] of images [N, 3, H, W] in [-1, 1]."""
        found: list[float] = []
        with TemporaryDirectory() as folder:
            for prompt, picture in zip(prompts, _pictures(images), strict=True):
                path = Path(folder) / "image.png"
                picture.save(path)
                found.append(float(self._model(images=[str(path)], texts=[prompt])))
        return torch.tensor(found)


def _library(module: str, kind: str, fix: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"evaluation.scores: {kind} needs {module}, which cannot be imported ({error}). Fix: {fix}."
        ) from error


def _pictures(images: Tensor) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(x) for x in as_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()]
