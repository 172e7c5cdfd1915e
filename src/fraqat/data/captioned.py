"""Pictures with captions, split in training and held-out data, by source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fraqat.data.color_digits import IMAGE_SIZE, compose, held_out_combinations, sample_training_set
from fraqat.errors import check_seed, config_error
from fraqat.nn import STRICT_KEYS

_PROMPT_STRIDE = 17
"""Prime, so that the first few prompts differ in digit, colour and ground, and all are used before one repeats."""


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures [N, 3, H, W] in [-1, 1] and their N captions."""

    images: Tensor
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class DataSpec:
    """What the student learns from.

    Args:
        source: A name in `IMAGE_SOURCES`.
        num_train: Pictures for training.
        num_validation: Held-out pictures, with prompts that training never sees.
        seed: Decides which pictures.
        caption_dropout: Share of captions replaced by the empty one, so that the unconditional output, which
            classifier-free guidance uses, is distilled too.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    source: str = "color-digits"
    num_train: int = 4096
    num_validation: int = 256
    seed: int = 1
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.source not in IMAGE_SOURCES:
            names = ", ".join(IMAGE_SOURCES)
            raise config_error("data.source", self.source, allowed=names, fix=f"choose one of {names}")
        for name in ("num_train", "num_validation"):
            if getattr(self, name) < 1:
                raise config_error(f"data.{name}", getattr(self, name), allowed="1 or more", fix="ask for more data")
        check_seed("data.seed", self.seed)
        if not 0 <= self.caption_dropout < 1:
            raise config_error("data.caption_dropout", self.caption_dropout, allowed="[0, 1)", fix="use 0.1")


def load_training_images(spec: DataSpec) -> CaptionedImages:
    """The training pictures of a source."""
    return IMAGE_SOURCES[spec.source][0](spec)


def load_validation_images(spec: DataSpec) -> CaptionedImages:
    """The held-out pictures of a source."""
    return IMAGE_SOURCES[spec.source][1](spec)


def load_prompts(spec: DataSpec, num_prompts: int) -> tuple[str, ...]:
    """Held-out prompts for sampling, repeated in order when more are asked for than there are."""
    return IMAGE_SOURCES[spec.source][2](num_prompts)


def _digits_training(spec: DataSpec) -> CaptionedImages:
    images, combinations = sample_training_set(spec.num_train, spec.seed)
    return CaptionedImages(images, tuple(item.prompt for item in combinations))


def _digits_validation(spec: DataSpec) -> CaptionedImages:
    held_out = held_out_combinations()
    chosen = [held_out[i % len(held_out)] for i in range(spec.num_validation)]
    return CaptionedImages(compose(chosen, seed=spec.seed, split="test"), tuple(item.prompt for item in chosen))


def _digits_prompts(num_prompts: int) -> tuple[str, ...]:
    held_out = held_out_combinations()
    assert len(held_out) % _PROMPT_STRIDE
    return tuple(held_out[i * _PROMPT_STRIDE % len(held_out)].prompt for i in range(num_prompts))


_Source = tuple[
    Callable[[DataSpec], CaptionedImages], Callable[[DataSpec], CaptionedImages], Callable[[int], tuple[str, ...]]
]

IMAGE_SIZES: dict[str, tuple[int, int]] = {"color-digits": (IMAGE_SIZE, IMAGE_SIZE)}
"""Source -> height and width of its pictures, where they are fixed."""

IMAGE_SOURCES: dict[str, _Source] = {"color-digits": (_digits_training, _digits_validation, _digits_prompts)}
"""Source -> training pictures, held-out pictures, held-out prompts."""
