"""Two tasks for lm-eval out of the held-out help topics, with data beside them: they are scored without a network."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fraqat.data.topics import topic_texts
from fraqat.files import atomic_folder

CHOICE_TASK = "topics_continuation"
WORDS_TASK = "topics_words"

_CONTEXT_WORDS = 40
_CHOICE_WORDS = 8
_NUM_CHOICES = 4


def write_topics_tasks(folder: Path, *, num_questions: int = 200, seed: int = 0, replace: bool = False) -> None:
    """Writes the folder to name as lm-eval's include path.

    `topics_continuation` asks which of four runs of eight words goes on with the text; the wrong ones come from other places
    of the held-out topics. `topics_words` measures word perplexity on whole held-out topics: lm-eval also charges a model for
    the `<bos>` that its tokenizer adds, which weighs little in a long text.

    Args:
        folder: Folder to create.
        num_questions: Questions of the first task.
        seed: Of their choice.
        replace: Let it take the place of an existing folder.

    Raises:
        OutputError: The folder exists and `replace` is false, or cannot be written.
    """
    texts = topic_texts().held_out
    with atomic_folder(folder, replace=replace) as temporary:
        _write_lines(temporary / f"{CHOICE_TASK}.jsonl", _questions(texts, num_questions, random.Random(seed)))  # noqa: S311
        _write_lines(temporary / f"{WORDS_TASK}.jsonl", [{"text": text} for text in texts])
        fields = {
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
        }
        metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        _write_task(
            temporary, folder, CHOICE_TASK, {"output_type": "multiple_choice", "metric_list": [metric], **fields}
        )
        fields = {"doc_to_text": "", "doc_to_target": "text"}
        metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        _write_task(
            temporary, folder, WORDS_TASK, {"output_type": "loglikelihood_rolling", "metric_list": [metric], **fields}
        )


def _questions(texts: Sequence[str], num_questions: int, draw: random.Random) -> list[dict[str, Any]]:
    """Contexts with the true continuation among others, white space as it stands in the text."""
    pieces = [re.findall(r"\s*\S+", text) for text in texts]
    places = [
        (document, start)
        for document, words in enumerate(pieces)
        for start in range(_CONTEXT_WORDS, len(words) - _CHOICE_WORDS + 1)
    ]

    def run(place: tuple[int, int]) -> str:
        document, start = place
        return "".join(pieces[document][start : start + _CHOICE_WORDS])

    questions: list[dict[str, Any]] = []
    for document, start in draw.sample(places, num_questions):
        right = run((document, start))
        wrong = [text for text in map(run, draw.sample(places, 2 * _NUM_CHOICES)) if text != right]
        answer = draw.randrange(_NUM_CHOICES)
        choices = wrong[: _NUM_CHOICES - 1]
        choices.insert(answer, right)
        context = "".join(pieces[document][start - _CONTEXT_WORDS : start]).lstrip()
        questions.append({"context": context, "choices": choices, "answer": answer})
    return questions


def _write_task(written: Path, final: Path, name: str, fields: dict[str, Any]) -> None:
    """One task file; JSON is YAML."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(final.absolute() / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **fields,
    }
    (written / f"{name}.yaml").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
