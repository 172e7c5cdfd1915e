"""The colour-digits classifier as extractor and as judge of prompt adherence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fraqat.data.color_digits import COLOR_NAMES, ColorDigit
from fraqat.evaluation.classifier import load_classifier
from fraqat.evaluation.image import Adherence, AdherenceHits


class ColorDigitsJudge:
    """Reads digit and colours off images, and gives the classifier's features.

    Args:
        folder: The trained classifier.
    """

    def __init__(self, folder: Path):
        self.classifier = load_classifier(folder)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [N, 64] of images [N, 3, 32, 32] in [-1, 1]."""
        return self.classifier.features(images)

    @torch.no_grad()
    def layers(self, images: Tensor) -> list[Tensor]:
        """Outputs [N, C, H, W] of the four convolution stages for images [N, 3, 32, 32] in [-1, 1]."""
        return self.classifier.layers(images)

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Adherence:
        """Shares of images that show their prompt's digit, colours, and both."""
        return Adherence(*(float(hits.float().mean()) for hits in self.hits(images, prompts)))

    @torch.no_grad()
    def hits(self, images: Tensor, prompts: Sequence[str]) -> AdherenceHits:
        """Which of the images [N, 3, 32, 32] in [-1, 1] show their prompt's digit, colours, and both."""
        wanted = [ColorDigit.from_prompt(prompt) for prompt in prompts]
        logits = self.classifier(images)
        digit = logits.digit.argmax(1) == torch.tensor([item.digit for item in wanted])
        color = logits.color.argmax(1) == torch.tensor([COLOR_NAMES.index(item.color) for item in wanted])
        ground = logits.ground.argmax(1) == torch.tensor([COLOR_NAMES.index(item.ground) for item in wanted])
        colors = color & ground
        return AdherenceHits(digit, colors, digit & colors)
