"""Which words of a text depart from another text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_IDEOGRAPH = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # scripts without spaces are compared by character
_WORD = re.compile(f"[{_IDEOGRAPH}]|[^\\s{_IDEOGRAPH}]+")
_MAX_ALIGNED_WORDS = (
    1000  # aligning takes quadratic time: of longer texts everything between the first and last difference
)

Span = tuple[int, int]


@dataclass(frozen=True)
class TextPart:
    """A piece of a text.

    Args:
        text: The piece, spaces and line breaks included; empty where only words of the original are missing.
        is_departure: Whether the original has something else here.
        original: What the original has instead; empty where it has nothing.
    """

    text: str
    is_departure: bool = False
    original: str = ""


def count_words(text: str) -> int:
    """Number of words that `compare_words` sees."""
    return len(_spans(text))


def compare_words(text: str, original: str) -> tuple[TextPart, ...]:
    """Splits a text where its words depart from the original's. Spaces and line breaks are not compared.

    Args:
        text: A student's.
        original: The teacher's.

    Returns:
        Parts whose texts give `text` when joined. The words outside departures, with the words that departures have
        instead, are the words of the original in their order.
    """
    mine, theirs = _spans(text), _spans(original)
    parts: list[TextPart] = []
    place = 0
    for (their_first, their_end), (first, end) in _differences(_words(original, theirs), _words(text, mine)):
        start = mine[first][0] if end > first else place if first == 0 else mine[first - 1][1]
        stop = mine[end - 1][1] if end > first else start
        instead = original[theirs[their_first][0] : theirs[their_end - 1][1]] if their_end > their_first else ""
        parts += [TextPart(text[place:start])] if start > place else []
        parts.append(TextPart(text[start:stop], True, instead))
        place = stop
    return (*parts, TextPart(text[place:])) if place < len(text) else tuple(parts)


def _spans(text: str) -> list[Span]:
    return [match.span() for match in _WORD.finditer(text)]


def _words(text: str, spans: Sequence[Span]) -> list[str]:
    return [text[start:end] for start, end in spans]


def _differences(original: Sequence[str], words: Sequence[str]) -> list[tuple[Span, Span]]:
    """Ranges of original and words that stand for each other without being equal."""
    shorter = min(len(original), len(words))
    head = next((i for i in range(shorter) if original[i] != words[i]), shorter)
    tail = next((i for i in range(shorter - head) if original[-1 - i] != words[-1 - i]), shorter - head)
    old, new = original[head : len(original) - tail], words[head : len(words) - tail]
    if not old and not new:
        return []
    if max(len(old), len(new)) > _MAX_ALIGNED_WORDS:
        return [((head, head + len(old)), (head, head + len(new)))]
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    return [
        ((head + i, head + i_end), (head + j, head + j_end))
        for tag, i, i_end, j, j_end in matcher.get_opcodes()
        if tag != "equal"
    ]
