"""Scores of images by a CLIP model's embeddings: CLIP score and CLIP-IQA. The model itself is `fraqat.tasks.clip`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fraqat.errors import config_error
from fraqat.evaluation.mmd import unit_rows


class ImageTextModel(Protocol):
    """Embeds images and texts in one space."""

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before a softmax; 100 in OpenAI's models."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Embeddings [N, D] of images [N, 3, H, W] in [-1, 1]."""
        ...

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] of texts."""
        ...


def clip_scores(images: Tensor, prompts: Sequence[str], model: ImageTextModel) -> Tensor:
    """100 max(cos(image, its prompt), 0) (Hessel et al. 2021, arXiv 2104.08718, whose factor is 2.5 instead of 100).

    Args:
        images: [N, 3, H, W] in [-1, 1].
        prompts: N prompts.
        model: CLIP.

    Returns:
        Scores [N] in [0, 100].

    Raises:
        ConfigError: Not one prompt per image.
    """
    if len(prompts) != len(images):
        raise config_error("prompts", len(prompts), allowed=f"{len(images)}, one per image", fix="pass one per image")
    cosines = (unit_rows(model.features(images)) * unit_rows(model.text_features(prompts))).sum(1)
    return 100 * cosines.clamp(min=0)


def clip_iqa_scores(images: Tensor, antonyms: tuple[str, str], model: ImageTextModel) -> Tensor:
    """CLIP-IQA: the probability that CLIP gives the first of two antonym prompts (Wang et al. 2022, arXiv 2207.12396).

    The paper leaves out the positional embedding of a ResNet-50 so as to take images of any size; here images are resized, and
    the model is used as it is.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        antonyms: What is good and what is bad, such as `("Good photo.", "Bad photo.")`.
        model: CLIP.

    Returns:
        Scores [N] in [0, 1].
    """
    cosines = unit_rows(model.features(images)) @ unit_rows(model.text_features(antonyms)).T
    return torch.softmax(model.logit_scale * cosines, dim=1)[:, 0]
