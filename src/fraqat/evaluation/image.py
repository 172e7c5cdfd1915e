"""How close a student's images are to the teacher's, and how well they follow their prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fraqat.data.prompts import PromptSpec
from fraqat.errors import check_seed, config_error
from fraqat.evaluation.bootstrap import BootstrapSpec
from fraqat.evaluation.frechet import frechet_distance
from fraqat.evaluation.metric_specs import ExtractorSpec, ScoreSpec, check_labels
from fraqat.nn import STRICT_KEYS

_MAX_PSNR_DB = 99.0


@dataclass(frozen=True)
class EvaluationSpec:
    """What is sampled for the evaluation.

    Args:
        num_images: Images per model, one per held-out prompt (prompts repeat with other seeds).
        seed: Seed of the first image; image i of every model starts from the same noise.
        batch_size: Images computed at a time.
        prompts: A published list or a file of prompts; None takes captions of held-out data.
        extractors: Networks in whose features the images are compared with the original's; none by default.
        scores: Scores of single images, by models that are not the one that is measured; none by default.
        bootstrap: Of the 95 % intervals.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    num_images: int = 256
    seed: int = 100_000
    batch_size: int = 64
    prompts: PromptSpec | None = None
    extractors: tuple[ExtractorSpec, ...] = ()
    scores: tuple[ScoreSpec, ...] = ()
    bootstrap: BootstrapSpec = field(default_factory=BootstrapSpec)

    def __post_init__(self) -> None:
        for name, least in (("num_images", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise config_error(
                    f"evaluation.{name}", getattr(self, name), allowed=f"{least} or more", fix="use more"
                )
        check_seed("evaluation.seed", self.seed)
        check_labels("evaluation.extractors", self.extractors)
        check_labels("evaluation.scores", self.scores)


class Extractor(Protocol):
    """Turns images into features for the Frechet distance."""

    def features(self, images: Tensor) -> Tensor:
        """Features [N, D] of images [N, 3, H, W] in [-1, 1]."""
        ...


class Adherence(NamedTuple):
    """Shares, in [0, 1], of images that show the prompt's digit, both its colours, and all of them."""

    digit: float
    colors: float
    all: float


class AdherenceHits(NamedTuple):
    """Which of N images show the prompt's digit, both its colours, and all of them; bool [N] each."""

    digit: Tensor
    colors: Tensor
    all: Tensor


class AdherenceJudge(Protocol):
    """Says how many images show what their prompts ask for."""

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Adherence:
        """Adherence of images [N, 3, H, W] in [-1, 1] to N prompts."""
        ...


@dataclass(frozen=True)
class ImageQuality:
    """Quality of one model's images.

    `frechet` is the distance to the teacher's images in the extractor's features, `psnr_db` the median over pairs of the
    same prompt and seed (capped at 99 dB), the others shares in [0, 1].
    """

    num_images: int
    frechet: float
    psnr_db: float
    digit: float
    colors: float
    all: float


def paired_psnr_db(images: Tensor, reference: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each pair, images [N, 3, H, W] in [0, 1]; 99 dB for equal images."""
    mse = (images.double() - reference.double()).square().flatten(1).mean(1)
    return (-10 * torch.log10(mse)).clamp(max=_MAX_PSNR_DB).tolist()


def median_psnr_db(images: Tensor, reference: Tensor) -> float:
    """Median of `paired_psnr_db`."""
    return statistics.median(paired_psnr_db(images, reference))


@torch.no_grad()
def image_quality(
    images: Tensor, reference: Tensor, prompts: Sequence[str], extractor: Extractor, judge: AdherenceJudge
) -> ImageQuality:
    """Compares a model's images with the teacher's of the same prompts and seeds.

    Args:
        images, reference: [N, 3, H, W] in [0, 1].
        prompts: N prompts.
        extractor: Features for the Frechet distance.
        judge: Prompt adherence.
    """
    signed, signed_reference = images * 2 - 1, reference * 2 - 1
    adherence = judge.adherence(signed, prompts)
    return ImageQuality(
        num_images=len(images),
        frechet=frechet_distance(extractor.features(signed), extractor.features(signed_reference)),
        psnr_db=median_psnr_db(images, reference),
        digit=adherence.digit,
        colors=adherence.colors,
        all=adherence.all,
    )
