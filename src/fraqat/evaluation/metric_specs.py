"""Which further metrics the evaluation of a text-to-image model computes, and with which networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from fraqat.errors import config_error
from fraqat.nn import STRICT_KEYS

_EXTRACTORS = "evaluation.extractors"
_SCORES = "evaluation.scores"
FEATURE_METRICS = ("frechet", "kid", "cmmd", "lpips_like")
SCORE_KINDS = ("clip_score", "clip_iqa", "image_reward", "vqa_score")
DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"inception": ("frechet", "kid"), "clip": ("frechet", "cmmd"), "classifier": ("frechet", "kid", "lpips_like")}
)
"""Kind of extractor -> what is computed with it when `metrics` is empty."""


@dataclass(frozen=True)
class ExtractorSpec:
    """A network whose features images are compared in.

    Args:
        kind: `inception` (FID, KID), `clip` (CLIP-FID, CMMD), or `classifier` (one that `save_classifier` wrote).
        source: inception: file of the weights; None takes torchmetrics' own (extra `metrics`). clip: folder or hub id.
            classifier: folder; None takes the one of the colour digits.
        revision: clip from the hub: branch, tag or commit.
        metrics: Of `frechet`, `kid`, `cmmd`, `lpips_like`; empty takes those of the kind.
        name: In the table and in evaluation.json; None takes the kind. Two extractors need two names.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    kind: str
    source: str | None = None
    revision: str | None = None
    metrics: tuple[str, ...] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in DEFAULT_METRICS:
            raise config_error(
                f"{_EXTRACTORS}.kind", self.kind, allowed=", ".join(DEFAULT_METRICS), fix="choose one of these"
            )
        if self.kind == "clip" and self.source is None:
            raise config_error(
                f"{_EXTRACTORS}.source", None, allowed="a folder or a hub id of a CLIP model", fix="name the model"
            )
        if self.revision is not None and self.kind != "clip":
            raise config_error(
                f"{_EXTRACTORS}.revision", self.revision, allowed="null but for kind clip", fix="remove it"
            )
        for metric in self.metrics:
            if metric not in FEATURE_METRICS:
                raise config_error(
                    f"{_EXTRACTORS}.metrics", metric, allowed=", ".join(FEATURE_METRICS), fix="choose of these"
                )
        if len(set(self.metrics)) != len(self.metrics):
            raise config_error(f"{_EXTRACTORS}.metrics", self.metrics, allowed="each once", fix="remove the second")
        if "lpips_like" in self.metrics and self.kind == "inception" and self.source is None:
            raise config_error(
                f"{_EXTRACTORS}.metrics",
                "lpips_like",
                allowed="with inception only from a file of the weights, whose layers can be seen",
                fix="set source, or take lpips_like from another extractor",
            )

    @property
    def label(self) -> str:
        """Name in keys and titles."""
        return self.name or self.kind

    @property
    def computed(self) -> tuple[str, ...]:
        """The metrics, by default those of the kind."""
        return self.metrics or DEFAULT_METRICS[self.kind]


@dataclass(frozen=True)
class ScoreSpec:
    """A score of single images.

    Args:
        kind: `clip_score`, `clip_iqa`, `image_reward` or `vqa_score`.
        source: clip_score, clip_iqa: folder or hub id of a CLIP model. image_reward, vqa_score: as their libraries name their
            models; None takes the published one.
        revision: clip_score, clip_iqa from the hub: branch, tag or commit.
        antonyms: clip_iqa: what is good, what is bad; empty takes "Good photo." and "Bad photo.".
        name: As `ExtractorSpec.name`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    kind: str
    source: str | None = None
    revision: str | None = None
    antonyms: tuple[str, ...] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCORE_KINDS:
            raise config_error(f"{_SCORES}.kind", self.kind, allowed=", ".join(SCORE_KINDS), fix="choose one of these")
        if self.is_clip and self.source is None:
            raise config_error(
                f"{_SCORES}.source", None, allowed="a folder or a hub id of a CLIP model", fix="name the model"
            )
        if self.revision is not None and not self.is_clip:
            raise config_error(f"{_SCORES}.revision", self.revision, allowed=f"null for {self.kind}", fix="remove it")
        if self.antonyms and (self.kind != "clip_iqa" or len(self.antonyms) != 2):
            raise config_error(
                f"{_SCORES}.antonyms", self.antonyms, allowed="two prompts, for clip_iqa only", fix="correct antonyms"
            )

    @property
    def is_clip(self) -> bool:
        """Whether the score is a CLIP model's."""
        return self.kind.startswith("clip_")

    @property
    def label(self) -> str:
        """Name in keys and titles."""
        return self.name or self.kind

    @property
    def antonym_pair(self) -> tuple[str, str]:
        """The good and the bad prompt of CLIP-IQA."""
        return (self.antonyms[0], self.antonyms[1]) if self.antonyms else ("Good photo.", "Bad photo.")


def check_labels(field: str, specs: Sequence[ExtractorSpec] | Sequence[ScoreSpec]) -> None:
    """Refuses two specs that would write into the same columns.

    Raises:
        ConfigError: They share a label.
    """
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise config_error(f"{field}.name", label, allowed="another name for each", fix="give one of them a name")
