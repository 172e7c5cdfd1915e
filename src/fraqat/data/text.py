"""Documents, packed into rows of tokens of equal length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch

from fraqat.data.bad_samples import BadSampleError
from fraqat.data.loader import RowSource, SampleStream, TensorRows
from fraqat.data.records import RecordsSpec, check_records, describe_records, get_field
from fraqat.data.samples import Sample, SampleSet, open_samples
from fraqat.data.topics import topic_texts
from fraqat.errors import config_error
from fraqat.nn import STRICT_KEYS

TOKENS = "input_ids"
"""Column of the rows, [N, sequence_length] int64."""

Tokenize = Callable[[str], Sequence[int]]
"""Token numbers of a document, without those that mark its start or end."""


@dataclass(frozen=True)
class TextDataSpec:
    """Which text the student learns from.

    Args:
        source: `topics`, the help topics of Python, or `records` for stored rows.
        records: Where stored rows are, for `source: records`.
        text_column: Of stored rows; `a.b` is a field of a column.
        sequence_length: Tokens per row.
        num_train: Rows for training, the first that there are; None takes all.
        num_validation: Held-out rows at most.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    source: Literal["topics", "records"] = "topics"
    records: RecordsSpec | None = None
    text_column: str = "text"
    sequence_length: int = 512
    num_train: int | None = None
    num_validation: int = 256

    def __post_init__(self) -> None:
        check_records("data", self.source, self.records)
        for name, lowest in (("sequence_length", 2), ("num_train", 1), ("num_validation", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise config_error(f"data.{name}", value, allowed=f"{lowest} or more", fix=f"correct data.{name}")
        if self.records is not None and self.records.streaming and self.num_train is None:
            raise config_error("data.num_train", None, allowed="a number for streamed rows", fix="set data.num_train")


@dataclass(frozen=True)
class Documents:
    """Texts of both sides of the split, read when they are asked for.

    Args:
        train: Documents to learn from.
        validation: Held-out documents.
    """

    train: Iterable[str]
    validation: Iterable[str]


def open_documents(spec: TextDataSpec) -> Documents:
    """The documents of a source, in stored order.

    Raises:
        ConfigError: The data is missing or has no such column.
    """
    if spec.records is None:
        texts = topic_texts()
        return Documents(texts.train, texts.validation)
    train, validation = open_samples(
        spec.records,
        _TextReader(spec.text_column),
        [spec.text_column],
        image_column=None,
        num_train=None,
        num_validation=None,
    )
    return Documents(_StoredTexts(train), _StoredTexts(validation))


def load_text(spec: TextDataSpec, tokenize: Tokenize, *, bos_token_id: int | None) -> RowSource:
    """Rows of tokens for training and validation, in memory; no more documents are read than they need.

    Args:
        spec: Source and sizes.
        tokenize: Called with each document.
        bos_token_id: Put before each document; None where the tokenizer has none.

    Returns:
        Rows with the column `input_ids`.

    Raises:
        ConfigError: The data is missing, or has too little text.
    """
    documents = open_documents(spec)
    train = _rows(documents.train, spec, tokenize, bos_token_id, spec.num_train)
    if len(train) < (spec.num_train or 1):
        raise config_error(
            "data.num_train",
            spec.num_train,
            allowed=f"1 to {len(train)}, what the text gives in rows of {spec.sequence_length} tokens",
            fix="use less, more text or a shorter data.sequence_length",
        )
    validation = _rows(documents.validation, spec, tokenize, bos_token_id, spec.num_validation)
    if len(validation) == 0:
        raise config_error(
            "data.sequence_length",
            spec.sequence_length,
            allowed="what the held-out text fills at least one row of",
            fix="use a shorter data.sequence_length, or hold out more",
        )
    return RowSource(train, validation)


def pack_tokens(documents: Iterable[Sequence[int]], length: int, *, bos_token_id: int | None) -> Iterator[list[int]]:
    """Joins documents in order and cuts them into rows; the end that fills no row is dropped.

    Args:
        documents: Tokens of each document.
        length: Tokens per row.
        bos_token_id: Put before each document; None puts nothing.
    """
    rest: list[int] = []
    for document in documents:
        rest += [*([] if bos_token_id is None else [bos_token_id]), *document]
        whole = len(rest) - len(rest) % length
        for start in range(0, whole, length):
            yield rest[start : start + length]
        rest = rest[whole:]


def describe_text(spec: TextDataSpec) -> dict[str, Any]:
    """Plain values that identify the rows, but for the tokenizer.

    Raises:
        ConfigError: The data is missing or cannot be reached.
    """
    values: dict[str, Any] = {"source": spec.source, "sequence_length": spec.sequence_length}
    values |= {"num_train": spec.num_train, "num_validation": spec.num_validation}
    if spec.records is None:
        return values | {"sha256": topic_texts().sha256}
    return values | {"text_column": spec.text_column, "records": describe_records(spec.records)}


@dataclass(frozen=True)
class _TextReader:
    column: str

    def __call__(self, key: str, row: Mapping[str, Any]) -> Sample:
        text = get_field(row, self.column)
        if not isinstance(text, str):
            raise BadSampleError("text is missing" if text is None else f"text is a {type(text).__name__}")
        if not text.strip():
            raise BadSampleError("text is empty")
        return {"text": text}


@dataclass(frozen=True)
class _StoredTexts:
    samples: SampleSet

    def __iter__(self) -> Iterator[str]:
        return (sample["text"] for sample in SampleStream(self.samples, None, num_epochs=1))


def _rows(
    documents: Iterable[str], spec: TextDataSpec, tokenize: Tokenize, bos_token_id: int | None, num_rows: int | None
) -> TensorRows:
    tokens = (tokenize(document) for document in documents)
    packed = pack_tokens(tokens, spec.sequence_length, bos_token_id=bos_token_id)
    rows = [torch.tensor(row) for row in islice(packed, num_rows)]
    return TensorRows({TOKENS: torch.stack(rows) if rows else torch.empty(0, spec.sequence_length, dtype=torch.int64)})
