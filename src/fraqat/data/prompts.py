"""Lists of prompts for evaluation: those that the field compares by, or a user's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from fraqat.data.hub import snapshot
from fraqat.data.record_files import find_local_files, is_local_path
from fraqat.data.records import RecordsSpec, get_field, open_records
from fraqat.errors import ConfigError, check_seed, config_error
from fraqat.nn import STRICT_KEYS

_SECTION = "evaluation.prompts"
_LINES, _TABLES = (".txt",), (".csv", ".tsv")
_FILE_SUFFIXES = (".json", ".jsonl", *_LINES, *_TABLES)


@dataclass(frozen=True)
class PromptSet:
    """A published list of prompts.

    Args:
        path: Hub id of a data set.
        file: File in it.
        column: Field of its rows.
        about: What it is.
    """

    path: str
    file: str
    column: str
    about: str


PROMPT_SETS: Mapping[str, PromptSet] = MappingProxyType(
    {
        "pixart-sigma": PromptSet(
            "PixArt-alpha/PixArt-Eval30K", "PixArt-Eval30K.json", "prompt", "30,000 evaluation prompts of PixArt-Sigma"
        ),
        "mjhq-30k": PromptSet(
            "playgroundai/MJHQ-30K",
            "meta_data.json",
            "prompt",
            "30,000 Midjourney prompts in ten categories (MJHQ-30K)",
        ),
    }
)
"""Name in recipes -> list."""


@dataclass(frozen=True)
class PromptSpec:
    """Which prompts images are sampled from.

    Args:
        source: A name in `PROMPT_SETS`, a local file (text with a prompt per line, JSON, JSON lines, CSV), or a hub id.
        column: Field or column with the prompt; None takes that of a named list, or `prompt`.
        file: File to read in a hub data set; None reads its rows.
        split: Of a hub data set that is read by rows.
        revision: Branch, tag or commit of a hub data set.
        seed: Decides which prompts are taken when fewer are asked for than there are.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    source: str
    column: str | None = None
    file: str | None = None
    split: str = "train"
    revision: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            names = ", ".join(PROMPT_SETS)
            raise config_error(f"{_SECTION}.source", self.source, allowed=f"{names}, a file or a hub id", fix="set it")
        check_seed(f"{_SECTION}.seed", self.seed)


def load_prompts(spec: PromptSpec) -> tuple[str, ...]:
    """All prompts of a list, in its order; empty ones are left out.

    Raises:
        ConfigError: The list is missing or out of reach, or has no such column.
    """
    named = PROMPT_SETS.get(spec.source)
    column = spec.column or (named.column if named else "prompt")
    if named is None and is_local_path(spec.source):
        values = _read_file(find_local_files(spec.source, spec.file, f"{_SECTION}.source").paths[0], column)
    elif named is not None or spec.file is not None:
        path, file = (named.path, named.file) if named else (spec.source, str(spec.file))
        values = _read_file(_hub_file(path, spec.revision, file), column)
    else:
        records = RecordsSpec(spec.source, split=spec.split, revision=spec.revision)
        values = open_records(records, spec.split, [column]).values(column)
    prompts = tuple(value.strip() for value in values if isinstance(value, str) and value.strip())
    if not prompts:
        raise ConfigError(
            f"{_SECTION}.source = {spec.source!r} has no prompt in {column!r}. Fix: set {_SECTION}.column."
        )
    return prompts


def choose_prompts(spec: PromptSpec, num_prompts: int) -> tuple[str, ...]:
    """Some prompts of a list, by the list's seed; more of them begin with the same ones.

    Args:
        spec: The list.
        num_prompts: How many.

    Raises:
        ConfigError: The list is missing, or has fewer.
    """
    prompts = load_prompts(spec)
    if num_prompts > len(prompts):
        raise config_error(
            "evaluation.num_images",
            num_prompts,
            allowed=f"at most the {len(prompts)} prompts of {spec.source}",
            fix="ask for fewer, or use a longer list",
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(spec.seed))
    return tuple(prompts[i] for i in order[:num_prompts].tolist())


def _hub_file(path: str, revision: str | None, file: str) -> Path:
    found = Path(snapshot(f"{_SECTION}.source", path, revision, file), file)
    if not found.is_file():
        raise config_error(f"{_SECTION}.file", file, allowed=f"a file of {path}", fix="correct the name")
    return found


def _read_file(path: Path, column: str) -> list[Any]:
    if path.suffix not in _FILE_SUFFIXES:
        allowed = f"files of the types {', '.join(_FILE_SUFFIXES)}"
        raise config_error(f"{_SECTION}.source", str(path), allowed=allowed, fix="convert it")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in _LINES:
        return list(text.splitlines())
    if path.suffix in _TABLES:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        return _column(path, list(csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)), column)
    try:
        if path.suffix == ".jsonl":
            return _column(path, [json.loads(line) for line in text.splitlines() if line.strip()], column)
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Fix: correct the file or its suffix.") from None
    if isinstance(values, dict) and isinstance(values.get(column), list):
        return values[column]
    return _column(path, list(values.values()) if isinstance(values, dict) else list(values), column)


def _column(path: Path, rows: list[Any], column: str) -> list[Any]:
    """One field of every row; rows that are texts are the prompts themselves."""
    fields = {name: None for row in rows if isinstance(row, Mapping) for name in row}
    if fields and column not in fields and column.partition(".")[0] not in fields:
        raise config_error(
            f"{_SECTION}.column", column, allowed=", ".join(fields), fix=f"name the column of {path.name}"
        )
    return [get_field(row, column) if isinstance(row, Mapping) else row for row in rows]
