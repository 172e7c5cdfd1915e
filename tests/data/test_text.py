"""Laws of packed text: nothing lost, nothing reordered, held-out text apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fraqat.data.bad_samples import SkippedSamplesWarning
from fraqat.data.records import RecordsSpec
from fraqat.data.text import TOKENS, TextDataSpec, describe_text, load_text, open_documents, pack_tokens
from fraqat.errors import ConfigError

BOS = 1000


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def write_texts(path: Path, texts: list[str | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "url": f"u{i}"}) + "\n" for i, text in enumerate(texts)))
    return path


@given(st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=12), st.integers(1, 9))
def test_packing_keeps_every_token_in_order_but_for_the_last_row(documents: list[list[int]], length: int) -> None:
    rows = list(pack_tokens(documents, length, bos_token_id=BOS))
    stream = [token for document in documents for token in (BOS, *document)]
    assert [token for row in rows for token in row] == stream[: len(stream) // length * length]
    assert all(len(row) == length for row in rows)
    plain = list(pack_tokens(documents, length, bos_token_id=None))
    assert not any(BOS in row for row in plain)


def test_documents_are_read_only_as_far_as_rows_need_them() -> None:
    read = list[int]()

    def documents():
        for i in range(100):
            read.append(i)
            yield [i] * 4

    rows = pack_tokens(documents(), 4, bos_token_id=None)
    assert [next(rows) for _ in range(3)] == [[0] * 4, [1] * 4, [2] * 4] and read == [0, 1, 2]


def test_topics_are_packed_with_the_start_token_before_each() -> None:
    spec = TextDataSpec(sequence_length=64, num_train=20, num_validation=5)
    source = load_text(spec, letters, bos_token_id=BOS)
    assert source.train.columns[TOKENS].shape == (20, 64) and source.validation.columns[TOKENS].shape == (5, 64)
    assert source.train.columns[TOKENS][0, 0] == source.validation.columns[TOKENS][0, 0] == BOS
    whole = load_text(TextDataSpec(sequence_length=64), letters, bos_token_id=BOS)
    assert (whole.train.columns[TOKENS][:20] == source.train.columns[TOKENS]).all() and whole.num_train > 1000


@pytest.mark.parametrize("streaming", [False, True])
def test_stored_documents_have_a_validation_split_or_a_held_out_share(offline: Path, streaming: bool) -> None:
    texts = [f"document {i:03d}" for i in range(60)]
    write_texts(offline / "data" / "train-0.jsonl", texts[:50])
    write_texts(offline / "data" / "validation-0.jsonl", texts[50:])
    named = RecordsSpec(str(offline / "data"), validation_split="validation", streaming=streaming)
    spec = TextDataSpec("records", named, sequence_length=12, num_train=10, num_validation=3)
    documents = open_documents(spec)
    assert list(documents.train) == texts[:50] and list(documents.validation) == texts[50:]
    shared = RecordsSpec(str(offline / "data"), validation_share=0.3, key_column="url", streaming=streaming)
    sides = open_documents(TextDataSpec("records", shared, num_train=10))
    assert sorted([*sides.train, *sides.validation]) == texts[:50] and list(sides.validation)
    rows = load_text(spec, letters, bos_token_id=None).train.columns[TOKENS]
    assert "".join(chr(token) for token in rows[1].tolist()) == texts[1]


def test_empty_documents_are_counted_and_left_out(offline: Path) -> None:
    path = write_texts(offline / "a.jsonl", ["one", "", None, " \n", "two"])
    records = RecordsSpec(str(path), validation_share=1e-6, max_bad_share=0.9)
    spec = TextDataSpec("records", records)
    with pytest.raises(ConfigError, match="holds out at least one of 5 rows"):
        open_documents(spec)
    folder = offline / "data"
    write_texts(folder / "train-0.jsonl", ["one", "", None, " \n", "two"])
    write_texts(folder / "test-0.jsonl", ["three"])
    records = RecordsSpec(str(folder), validation_split="test", max_bad_share=0.9)
    with pytest.warns(SkippedSamplesWarning) as caught:
        assert list(open_documents(TextDataSpec("records", records)).train) == ["one", "two"]
    assert "3 of 5 samples skipped: 2 text is empty (1, 3); 1 text is missing (2)" in str(caught[-1].message)


def test_too_little_text_is_an_error_with_the_number_of_rows(offline: Path) -> None:
    folder = offline / "data"
    write_texts(folder / "train-0.jsonl", ["x" * 50])
    write_texts(folder / "validation-0.jsonl", ["x" * 15])
    records = RecordsSpec(str(folder), validation_split="validation")
    with pytest.raises(
        ConfigError, match=r"data.num_train = 6 is not possible: allowed is 1 to 5, what the text gives"
    ):
        load_text(TextDataSpec("records", records, sequence_length=10, num_train=6), letters, bos_token_id=None)
    with pytest.raises(ConfigError, match=r"data.sequence_length = 20 .* the held-out text fills at least one row"):
        load_text(TextDataSpec("records", records, sequence_length=20), letters, bos_token_id=None)
    assert load_text(TextDataSpec("records", records, sequence_length=10), letters, bos_token_id=None).num_train == 5


def test_the_description_names_text_and_sizes(offline: Path) -> None:
    first = describe_text(TextDataSpec())
    assert first != describe_text(TextDataSpec(sequence_length=64)) and first == describe_text(TextDataSpec())
    path = write_texts(offline / "a.jsonl", ["one"])
    spec = TextDataSpec("records", RecordsSpec(str(path)))
    before = describe_text(spec)
    write_texts(path, ["one", "two"])
    assert describe_text(spec) != before


def test_impossible_sections_are_refused() -> None:
    adapter = TypeAdapter(TextDataSpec)
    streamed = {"path": "allenai/c4", "name": "en", "streaming": True, "validation_split": "validation"}
    for values, message in (
        ({"source": "records"}, "data.records = None"),
        ({"records": {"path": "a/b"}}, "data.source = 'topics'"),
        ({"source": "records", "records": streamed}, "data.num_train = None .* a number for streamed rows"),
        ({"sequence_length": 1}, "data.sequence_length = 1 is not possible: allowed is 2 or more"),
        ({"source": "books"}, "'topics' or 'records'"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.validate_python(values)
    spec = adapter.validate_python({"source": "records", "records": streamed, "num_train": 384_000})
    assert adapter.validate_python(adapter.dump_python(spec, mode="json")) == spec
