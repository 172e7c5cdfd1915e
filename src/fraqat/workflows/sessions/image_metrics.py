"""The metrics that a recipe adds to the evaluation of images: loads the networks, and measures with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fraqat.evaluation import (
    ColorDigitsJudge,
    EvaluationSpec,
    ExtractorSpec,
    Interval,
    ScoreSpec,
    cmmd,
    frechet_distance,
    kernel_distance,
    lpips_like,
)
from fraqat.evaluation.bootstrap import BootstrapSpec, frechet_interval, mean_interval, mmd_interval
from fraqat.evaluation.clip_scores import clip_iqa_scores, clip_scores
from fraqat.evaluation.mmd import CMMD_SCALE, cmmd_kernel, polynomial_kernel, unit_rows
from fraqat.workflows.sessions.base import QualityColumn
from fraqat.zoo import zoo_path

_PLAIN_TITLES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("inception", "frechet"): "FID",
        ("inception", "kid"): "KID",
        ("clip", "frechet"): "CLIP-FID",
        ("clip", "cmmd"): "CMMD",
    }
)
_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "frechet": "Frechet",
        "kid": "KID",
        "cmmd": "CMMD",
        "lpips_like": "LPIPS-like",
        "clip_score": "CLIP score",
        "clip_iqa": "CLIP-IQA",
        "image_reward": "ImageReward",
        "vqa_score": "VQA score",
    }
)
_ZOO_PREFIX = "zoo:"


@dataclass
class Figures:
    """Values and 95 % intervals by column key; a value of None says nothing, as the original's distance to itself."""

    quality: dict[str, float | None] = field(default_factory=dict[str, float | None])
    intervals: dict[str, Interval] = field(default_factory=dict[str, Interval])

    def add(self, key: str, value: float | None, interval: Interval | None = None) -> None:
        """Adds one figure; without an interval where there is none."""
        self.quality[key] = value
        if interval is not None:
            self.intervals[key] = interval


class ImageMetrics:
    """Metrics in the features of the recipe's extractors, and its scores of single images.

    Args:
        spec: The recipe's evaluation; its networks are loaded here.
        prompts: N prompts.
        device: Where the networks compute.

    Raises:
        ConfigError: A library is missing.
        ModelError: A network cannot be loaded.
    """

    def __init__(self, spec: EvaluationSpec, prompts: tuple[str, ...], device: torch.device):
        self._spec, self._prompts = spec, prompts
        self._clips: dict[tuple[str | None, str | None], Any] = {}
        self._extractors = [_open_extractor(item, device) for item in spec.extractors]
        self._scorers = [self._open_scorer(item, device) for item in spec.scores]
        self._reference: list[Tensor] = []
        self.columns = tuple(_columns(spec))
        self.notes = tuple(_notes(spec, len(prompts)))

    def measure(self, images: Tensor, reference: Tensor, *, is_original: bool) -> Figures:
        """Figures of a model's images [N, 3, H, W] in [0, 1] against the original's, which are measured first."""
        signed, signed_reference = images * 2 - 1, reference * 2 - 1
        if is_original:
            self._reference = [self._features(item, signed) for item in self._extractors]
        figures = Figures()
        for i, (item, extractor) in enumerate(zip(self._spec.extractors, self._extractors, strict=True)):
            if is_original:
                for metric in item.computed:
                    figures.add(_key(item, metric), None)
                continue
            features = self._features(extractor, signed)
            for metric in item.computed:
                if metric == "lpips_like":
                    values = lpips_like(signed, signed_reference, extractor, batch_size=self._spec.batch_size)
                    figures.add(_key(item, metric), float(values.mean()), mean_interval(values, self._spec.bootstrap))
                else:
                    figures.add(
                        _key(item, metric), *_distance(metric, features, self._reference[i], self._spec.bootstrap)
                    )
        for item, scorer in zip(self._spec.scores, self._scorers, strict=True):
            values = self._scores(item, scorer, signed)
            figures.add(_score_key(item), float(values.mean()), mean_interval(values, self._spec.bootstrap))
        return figures

    def _features(self, extractor: Any, signed: Tensor) -> Tensor:
        return torch.cat([extractor.features(batch).flatten(1) for batch in signed.split(self._spec.batch_size)])

    def _scores(self, item: ScoreSpec, scorer: Any, signed: Tensor) -> Tensor:
        found: list[Tensor] = []
        for start in range(0, len(signed), self._spec.batch_size):
            part = slice(start, start + self._spec.batch_size)
            batch, prompts = signed[part], self._prompts[part]
            if item.kind == "clip_score":
                found.append(clip_scores(batch, prompts, scorer))
            elif item.kind == "clip_iqa":
                found.append(clip_iqa_scores(batch, item.antonym_pair, scorer))
            else:
                found.append(scorer.scores(batch, prompts))
        return torch.cat([values.double() for values in found])

    def _open_scorer(self, item: ScoreSpec, device: torch.device) -> Any:
        if item.source is not None and item.is_clip:
            from fraqat.tasks.clip import load_clip

            place = (item.source, item.revision)
            if place not in self._clips:
                self._clips[place] = load_clip(item.source, revision=item.revision, device=device)
            return self._clips[place]
        from fraqat.evaluation.preference import ImageRewardScore, VqaScore

        return (ImageRewardScore if item.kind == "image_reward" else VqaScore)(item.source, device)


def _open_extractor(item: ExtractorSpec, device: torch.device) -> Any:
    if item.kind == "clip" and item.source is not None:
        from fraqat.tasks.clip import load_clip_images

        return load_clip_images(item.source, revision=item.revision, device=device)
    if item.kind == "inception":
        from fraqat.evaluation.inception import InceptionExtractor, TorchmetricsExtractor, load_inception

        return (
            TorchmetricsExtractor(device)
            if item.source is None
            else InceptionExtractor(load_inception(item.source), device)
        )
    source = item.source or f"{_ZOO_PREFIX}color-digits-classifier"
    is_zoo = source.startswith(_ZOO_PREFIX)
    return ColorDigitsJudge(zoo_path(source.removeprefix(_ZOO_PREFIX)) if is_zoo else Path(source))


def _distance(metric: str, features: Tensor, reference: Tensor, spec: BootstrapSpec) -> tuple[float, Interval | None]:
    """A distance of distributions with its interval; images of equal index share prompt and seed."""
    if metric == "frechet":
        return frechet_distance(features, reference), frechet_interval(features, reference, spec, paired=True)
    if metric == "kid":
        interval = mmd_interval(features, reference, polynomial_kernel, spec, paired=True)
        return kernel_distance(features, reference, paired=True), interval
    interval = mmd_interval(unit_rows(features), unit_rows(reference), cmmd_kernel, spec, paired=True)
    scaled = None if interval is None else Interval(CMMD_SCALE * interval.low, CMMD_SCALE * interval.high)
    return cmmd(features, reference, paired=True), scaled


def _key(item: ExtractorSpec, metric: str) -> str:
    return f"{metric}_{item.label}"


def _score_key(item: ScoreSpec) -> str:
    return item.kind if item.name is None else f"{item.kind}_{item.name}"


def _title(item: ExtractorSpec, metric: str) -> str:
    plain = _PLAIN_TITLES.get((item.kind, metric)) if item.name is None else None
    return plain or f"{_TITLES[metric]} ({item.label})"


def _score_title(item: ScoreSpec) -> str:
    return _TITLES[item.kind] if item.name is None else f"{_TITLES[item.kind]} ({item.name})"


def _columns(spec: EvaluationSpec) -> list[QualityColumn]:
    columns = [
        QualityColumn(_key(item, metric), f"1000 {_title(item, metric)}", 1000)
        if metric == "kid"
        else QualityColumn(_key(item, metric), _title(item, metric))
        for item in spec.extractors
        for metric in item.computed
    ]
    return columns + [QualityColumn(_score_key(item), _score_title(item)) for item in spec.scores]


def _notes(spec: EvaluationSpec, num_images: int) -> list[str]:
    notes: list[str] = []
    for item in spec.extractors:
        titles = ", ".join(_title(item, metric) for metric in item.computed)
        source = item.source or ("torchmetrics" if item.kind == "inception" else "the colour-digits classifier")
        notes.append(f"{titles}: to the original's images, in the features of {item.label} ({source}).")
    if any("frechet" in item.computed for item in spec.extractors):
        notes.append(
            f"FID and other Frechet distances are biased upwards for few images: these of {num_images} compare only with "
            f"others of {num_images}."
        )
    notes += [
        f"{_score_title(item)}: mean over images, by {item.source or 'the published model'}." for item in spec.scores
    ]
    return notes
