"""What the evaluations of language and speech models measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fraqat.errors import check_seed, config_error
from fraqat.evaluation.bootstrap import BootstrapSpec
from fraqat.evaluation.language import LmEvalSpec
from fraqat.nn import STRICT_KEYS


@dataclass(frozen=True)
class LanguageEvaluationSpec:
    """How a language model is measured against the original.

    Args:
        num_sequences: Held-out rows of tokens for perplexity, KL and top-1 agreement.
        batch_size: Rows computed at a time.
        prompts: Texts that every model continues, to be read in the report; empty takes beginnings of held-out rows.
        max_new_tokens: Length of the continuations.
        lm_eval: Tasks of lm-eval that every model does; None does none.
        bootstrap: Of the 95 % intervals, over rows; lm-eval's scores have none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    num_sequences: int = 256
    batch_size: int = 8
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 48
    lm_eval: LmEvalSpec | None = None
    bootstrap: BootstrapSpec = field(default_factory=BootstrapSpec)

    def __post_init__(self) -> None:
        for name in ("num_sequences", "batch_size", "max_new_tokens"):
            _check_positive(f"evaluation.{name}", getattr(self, name))


@dataclass(frozen=True)
class SpeechEvaluationSpec:
    """How a text-to-speech model is measured against the original.

    Args:
        num_phrases: Held-out texts that both models speak freely.
        batch_size: Texts spoken at a time.
        seed: Of whatever is random in speaking.
        recognizer: Speech recognition model of transformers (folder or hub id) that judges intelligibility; None takes the
            one beside a model of the zoo, and elsewhere leaves intelligibility out.
        vocoder: Vocoder of transformers (folder or hub id) for the sounds in the report; None takes Griffin-Lim.
        bootstrap: Of the 95 % intervals, over phrases.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    num_phrases: int = 64
    batch_size: int = 16
    seed: int = 0
    recognizer: str | None = None
    vocoder: str | None = None
    bootstrap: BootstrapSpec = field(default_factory=BootstrapSpec)

    def __post_init__(self) -> None:
        for name in ("num_phrases", "batch_size"):
            _check_positive(f"evaluation.{name}", getattr(self, name))
        check_seed("evaluation.seed", self.seed)


def _check_positive(field: str, value: int) -> None:
    if value < 1:
        raise config_error(field, value, allowed="1 or more", fix=f"correct {field}")
