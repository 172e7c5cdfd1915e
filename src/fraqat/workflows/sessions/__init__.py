"""Recipes in memory, one session type for each model family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fraqat.config import Recipe
from fraqat.nn import LayerFamilies
from fraqat.tasks import architecture_named
from fraqat.tasks.known import KnownModel
from fraqat.tasks.speech_architectures import SPEECH_ARCHITECTURES
from fraqat.workflows.progress import Progress, SilentProgress
from fraqat.workflows.sessions.base import (
    Evaluator,
    Measurement,
    QualityColumn,
    Session,
    check_served,
    resolve_source,
)
from fraqat.workflows.sessions.image import ImageSession
from fraqat.workflows.sessions.language import LanguageSession
from fraqat.workflows.sessions.speech import SpeechSession

_TYPES: Mapping[str, type[Session[Any]]] = MappingProxyType(
    {"text-to-image": ImageSession, "language": LanguageSession, "text-to-speech": SpeechSession}
)


def open_session(recipe: Recipe, progress: Progress | None = None) -> Session[Any]:
    """The session of a recipe; loads nothing yet.

    Args:
        recipe: Decides model and data.
        progress: Told while data are encoded; None tells nobody.
    """
    return _TYPES[recipe.task](recipe, progress or SilentProgress())


def families_of(known: KnownModel) -> LayerFamilies:
    """Layer families of a model, from its class.

    Raises:
        ModelError: A transformer class of diffusers without an entry in the table of architectures.
    """
    if known.library == "diffusers":
        return architecture_named(known.class_name).families
    if known.class_name in SPEECH_ARCHITECTURES:
        return SPEECH_ARCHITECTURES[known.class_name].families
    from fraqat.tasks.language_layers import language_families

    return language_families(known.build())


__all__ = [
    "Evaluator",
    "Measurement",
    "QualityColumn",
    "Session",
    "check_served",
    "families_of",
    "open_session",
    "resolve_source",
]
