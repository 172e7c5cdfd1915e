"""The sections that docs/data.md shows are ones that recipes take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from fraqat.data.captioned import DataSpec
from fraqat.data.prompts import PROMPT_SETS, PromptSpec
from fraqat.data.text import TextDataSpec

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
KINDS: dict[str, Any] = {
    "data of a text-to-image recipe": DataSpec,
    "data of a language recipe": TextDataSpec,
    "prompts": PromptSpec,
}


def test_every_section_of_the_document_is_valid() -> None:
    blocks = re.findall(r"```yaml\n# (.*?)\n(.*?)```", DOCUMENT, re.S)
    assert {kind for kind, _ in blocks} == set(KINDS)
    for kind, text in blocks:
        TypeAdapter(KINDS[kind]).validate_python(yaml.safe_load(text))


def test_the_table_of_prompt_lists_is_the_one_of_the_code() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| `([^`]+)` \| `([^`]+)`, `(\w+)` \|$", DOCUMENT, re.M)
    assert rows == [(name, entry.path, entry.file, entry.column) for name, entry in PROMPT_SETS.items()]
