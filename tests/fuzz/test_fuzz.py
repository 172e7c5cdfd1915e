"""Damaged and hostile input ends in an error of ours: a short run every time, minutes with `-m fuzz`."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fraqat.config.reading import load_values
from fraqat.errors import ConfigError
from fraqat.printable import printable
from fraqat.table import Table
from fuzz import fuzz
from fuzz_inputs import HOSTILE
from fuzz_targets import TARGETS

NUM_INPUTS = {"onnx writer": 1, "gguf writer": 8, "report page": 2, "recipe values": 8, "recipe text": 8}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = ("name", "task", "model", "data", "quantization", "schedule", "train", "sampler", "evaluation", "baselines")


@pytest.mark.parametrize("name", TARGETS)
def test_every_failure_is_an_error_of_ours(name: str) -> None:
    found = fuzz(name, 0, num_inputs=NUM_INPUTS.get(name, 40))
    assert not found.findings
    assert sum(found.counts.values()) == NUM_INPUTS.get(name, 40)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TARGETS)
def test_for_minutes(name: str, pytestconfig: pytest.Config) -> None:
    found = fuzz(name, 1, seconds=60 * pytestconfig.getoption("--fuzz-minutes"))
    assert not found.findings


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=5), values, max_size=5))
def test_any_mapping_is_a_recipe_or_refused(recipe: dict[str, Any]) -> None:
    try:
        load_values(recipe)
    except ConfigError:
        return


@given(st.text())
def test_text_that_is_printed_cannot_move_a_terminal(text: str) -> None:
    shown = printable(text, "")
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    shown.encode()
    assert printable(shown, "") == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_keep_hostile_text_in_its_cell(text: str) -> None:
    shown = str(Table(text, (text, "b"), ((text, 1),), (text,)))
    assert len(shown.splitlines()) <= 5 + 2 * text.count("\n")
    assert not {"\x1b", "\x07", "\x00", "\r", "\u202e", "\u2028"} & set(shown)
    shown.encode()


def test_usual_text_is_left_alone() -> None:
    for text in ("a red seven on white", "Ångström 数字 ٣ 😀", "two\nlines\tand a tab"):
        assert printable(text) == text


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", "", "x\x1b[2J", "x\ny", "n" * 101, "\u202ex"])
def test_names_that_become_folders_are_names(name: str) -> None:
    from fraqat.config import load_recipe

    plain = load_recipe("color-digits").to_values()
    with pytest.raises(ConfigError, match="baselines"):
        load_values(plain | {"baselines": {name: {"train": {"steps": 0}}}})


def test_commands_write_out_what_a_terminal_would_obey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fraqat import cli

    monkeypatch.setattr(sys, "argv", ["fraqat", "status", str(tmp_path / "\x1b[2Jrun\u202e")])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert "\\x1b[2Jrun\\u202e" in "".join(shown.split("\n"))
    assert "\x1b" not in shown
