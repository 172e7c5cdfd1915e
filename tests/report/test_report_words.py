"""Laws of the comparison of two texts."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fraqat.report.word_differences import TextPart, compare_words

WORDS = st.lists(st.sampled_from(["a", "b", "the", "猫", "\n\n", "  ", "c.", "\x00"]), max_size=14).map(" ".join)


def words_of(text: str) -> list[str]:
    """Words as the comparison sees them; the one ideograph of these tests stands alone."""
    return re.findall(r"猫|[^\s猫]+", text)


def marked(text: str, original: str) -> list[tuple[str, str]]:
    """Departures and what the original has instead."""
    return [(part.text, part.original) for part in compare_words(text, original) if part.is_departure]


@given(WORDS, WORDS)
def test_parts_join_to_the_text_and_to_the_words_of_the_original(text: str, original: str) -> None:
    parts = compare_words(text, original)
    assert "".join(part.text for part in parts) == text
    rebuilt = " ".join(part.original if part.is_departure else part.text for part in parts)
    assert words_of(rebuilt) == words_of(original)


@given(WORDS)
def test_same_words_are_never_marked(text: str) -> None:
    assert marked(text, text) == []
    assert marked(text, text.replace(" ", "\n\t")) == []


@given(WORDS, WORDS)
def test_departures_are_words_without_outer_space(text: str, original: str) -> None:
    for mine, theirs in marked(text, original):
        assert mine or theirs
        assert (mine.strip(), theirs.strip()) == (mine, theirs)


@pytest.mark.parametrize(
    ("text", "original", "expected"),
    [
        ("a red cat sat", "a blue cat sat", [("red", "blue")]),
        ("a cat sat", "a blue cat sat", [("", "blue")]),
        ("a very blue cat", "a blue cat", [("very", "")]),
        ("cat", "Cat", [("cat", "Cat")]),
        ("", "a blue cat", [("", "a blue cat")]),
        ("a blue cat", "", [("a blue cat", "")]),
        ("黒い猫が寝る", "白い猫が寝る", [("黒", "白")]),
    ],
)
def test_known_departures_are_found(text: str, original: str, expected: list[tuple[str, str]]) -> None:
    assert marked(text, original) == expected


def test_missing_words_leave_an_empty_part_before_the_space() -> None:
    parts = compare_words("a cat sat", "a blue cat sat")
    assert parts == (TextPart("a"), TextPart("", True, "blue"), TextPart(" cat sat"))


def test_long_texts_are_compared_in_bounded_time() -> None:
    text, original = ("start " + "a b c " * 20_000 + "end"), ("start " + "b a " * 30_000 + "end")
    start = time.perf_counter()
    parts = compare_words(text, original)
    assert time.perf_counter() - start < 5
    assert [part.text for part in parts if not part.is_departure] == ["start ", " end"]
