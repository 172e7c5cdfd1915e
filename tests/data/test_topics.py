"""Laws of the help-topics text: the parts share nothing that matters, and the tasks made of it are answerable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fraqat.data.topics import HELD_OUT_TOPICS, VALIDATION_TOPICS, TopicTexts, shared_share, topic_texts
from fraqat.data.topics_tasks import CHOICE_TASK, WORDS_TASK, write_topics_tasks
from fraqat.errors import OutputError


@pytest.fixture(scope="module")
def texts() -> TopicTexts:
    return topic_texts()


def paragraphs(documents: tuple[str, ...]) -> list[str]:
    return [" ".join(part.split()) for text in documents for part in text.split("\n\n") if part.strip()]


def test_every_part_has_its_share(texts: TopicTexts) -> None:
    sizes = [sum(map(len, part)) for part in (texts.train, texts.validation, texts.held_out)]
    assert sizes[0] > 250_000
    assert sizes[1] > 15_000
    assert sizes[2] > 25_000
    assert len(texts.validation) == len(VALIDATION_TOPICS)
    assert len(texts.held_out) == len(HELD_OUT_TOPICS)


def test_no_paragraph_is_in_two_parts_or_twice(texts: TopicTexts) -> None:
    everything = paragraphs(texts.train + texts.validation + texts.held_out)
    assert len(everything) == len(set(everything))


def test_held_out_text_is_no_near_duplicate_of_what_is_learned(texts: TopicTexts) -> None:
    for part in (texts.validation, texts.held_out):
        assert all(shared_share(text, texts.train) < 0.16 for text in part)
    long = [part for part in paragraphs(texts.held_out) if len(part.split()) >= 20]
    assert len(long) > 80
    learned = texts.train + texts.validation
    assert max(shared_share(part, learned) for part in long[::20]) <= 0.3


def test_the_measure_of_sharing_notices_a_copy(texts: TopicTexts) -> None:
    copied = texts.train[3].replace("\n", " ").upper()
    assert shared_share(copied, texts.train) == 1.0
    assert shared_share("one two three four", ("one two three four",)) == 0.0
    half = "a b c d e f g h i j"
    assert shared_share(half, ("a b c d e f",)) == pytest.approx(2 / 6)


def test_the_split_is_the_same_every_time(texts: TopicTexts) -> None:
    assert topic_texts() == texts
    assert len(texts.sha256) == 64
    assert TopicTexts(texts.train[:-1], texts.validation, texts.held_out).sha256 != texts.sha256


def test_questions_have_one_right_answer_that_goes_on_with_the_text(tmp_path: Path, texts: TopicTexts) -> None:
    folder = tmp_path / "tasks"
    write_topics_tasks(folder, num_questions=50)
    questions = [json.loads(line) for line in (folder / f"{CHOICE_TASK}.jsonl").read_text().splitlines()]
    assert len(questions) == 50
    everything = "\0".join(texts.held_out)
    for question in questions:
        assert len(question["choices"]) == 4
        goes_on = [question["context"] + choice in everything for choice in question["choices"]]
        assert goes_on.index(True) == question["answer"]
        assert sum(goes_on) == 1
    assert len({question["answer"] for question in questions}) == 4
    words = [json.loads(line)["text"] for line in (folder / f"{WORDS_TASK}.jsonl").read_text().splitlines()]
    assert words == list(texts.held_out)


def test_tasks_are_the_same_for_the_same_seed_and_never_overwritten_unasked(tmp_path: Path) -> None:
    def questions(seed: int) -> str:
        write_topics_tasks(tmp_path / "tasks", num_questions=5, seed=seed, replace=True)
        return (tmp_path / "tasks" / f"{CHOICE_TASK}.jsonl").read_text()

    assert questions(0) == questions(0) != questions(1)
    with pytest.raises(OutputError, match="exists already"):
        write_topics_tasks(tmp_path / "tasks")
