"""The text of Python's own help topics (`pydoc_data.topics`), split so that held-out text is new to the model.

The topics quote each other at length: every paragraph is kept once, and the held-out parts lose each paragraph that the
training text holds too, in other words or line breaks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VALIDATION_TOPICS = ("binary", "booleans", "del", "global", "import", "objects")
"""Topics that decide when training stops and which baseline is the best."""

HELD_OUT_TOPICS = ("calls", "comparisons", "exprlists", "raise", "typesmapping")
"""Topics that only the final figures see."""

_SHINGLE_WORDS = 5
_MAX_SHARED = 0.3


@dataclass(frozen=True)
class TopicTexts:
    """Documents, one per topic, in the order of the topics' names.

    Args:
        train: Text to learn from.
        validation: Text to choose by.
        held_out: Text to measure on.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Identifies the text: other versions of Python explain themselves in other words."""
        parts = ("\0".join(documents) for documents in (self.train, self.validation, self.held_out))
        return hashlib.sha256("\1".join(parts).encode()).hexdigest()


def topic_texts() -> TopicTexts:
    """The topics of the running Python, split.

    A paragraph of a held-out topic stays only if at most 30 % of its runs of five words are in the training text, and, where
    it is shorter than that, if the training text does not hold it as a paragraph. The validation text is cleaned in the same
    way, and the held-out text also of what is in the validation text.
    """
    from pydoc_data.topics import topics

    rest = [name for name in sorted(topics) if name not in VALIDATION_TOPICS + HELD_OUT_TOPICS]
    seen = _Seen()
    train = [seen.keep_new(topics[name], max_shared=1.0) for name in rest]
    validation = [seen.keep_new(topics[name], max_shared=_MAX_SHARED) for name in VALIDATION_TOPICS if name in topics]
    held_out = [seen.keep_new(topics[name], max_shared=_MAX_SHARED) for name in HELD_OUT_TOPICS if name in topics]
    return TopicTexts(*(tuple(text for text in texts if text) for texts in (train, validation, held_out)))


def shared_share(text: str, others: Iterable[str]) -> float:
    """Share of the runs of five words of `text` that the other texts hold, 0 where there are none."""
    known = {run for other in others for run in _runs(_words(other))}
    runs = _runs(_words(text))
    return sum(run in known for run in runs) / max(1, len(runs))


class _Seen:
    """Paragraphs and runs of words met so far."""

    def __init__(self) -> None:
        self._paragraphs: set[str] = set()
        self._runs: set[tuple[str, ...]] = set()

    def keep_new(self, text: str, *, max_shared: float) -> str:
        """Drops the paragraphs that are known or come twice, then learns the rest."""
        kept: list[str] = []
        runs: list[tuple[str, ...]] = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            words = _words(paragraph)
            own = _runs(words)
            is_known = not words or " ".join(words) in self._paragraphs
            if not is_known and sum(run in self._runs for run in own) <= max_shared * len(own):
                kept.append(paragraph)
                self._paragraphs.add(" ".join(words))
                runs += own
        self._runs.update(runs)
        return "\n\n".join(kept) + "\n" if kept else ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1)]
