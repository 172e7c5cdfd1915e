"""docs/add_an_architecture.md: its programs run, its entries are the table's, its limits are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import BUILDERS, tiny_sampler

from fraqat.config import load_recipe
from fraqat.errors import ModelError
from fraqat.tasks import ModelSpec, families, speech_architectures
from fraqat.tasks.conditioning import PromptEncoder
from fraqat.tasks.families import ARCHITECTURES
from fraqat.tasks.pipelines import load_pipeline
from fraqat.tasks.speech_architectures import SPEECH_ARCHITECTURES, SpeechArchitecture
from fraqat.tasks.speech_calls import SpeechCalls
from fraqat.workflows import layers

DOCUMENT = (Path(__file__).parents[2] / "docs" / "add_an_architecture.md").read_text()
FENCED = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.S | re.M)
ENTRIES = [text for kind, text in FENCED if kind == "python" and text.startswith('"')]
PROGRAMS = [text for kind, text in FENCED if kind == "python" and not text.startswith('"')]


@pytest.fixture
def models(saved_pipeline: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds the tiny pipelines that the document names."""
    folders = [saved_pipeline(name) for name in ("lumina2", "wan")]
    monkeypatch.chdir(folders[0].parent)


def test_entries_are_those_of_the_table() -> None:
    diffusion, speech = ENTRIES
    shown = eval(f"{{{diffusion}}}", dict(vars(families)))
    assert set(shown) == {"Lumina2Transformer2DModel", "WanTransformer3DModel"}
    assert all(ARCHITECTURES[name] == entry for name, entry in shown.items())
    assert all(line.startswith('"') for line in diffusion.splitlines()), "one line each"
    shown = eval(f"{{{speech}}}", dict(vars(speech_architectures)))
    assert all(SPEECH_ARCHITECTURES[name] == entry for name, entry in shown.items())
    assert isinstance(shown["FastSpeech2ConformerModel"], SpeechArchitecture)


def test_programs_run_before_there_is_an_entry_and_print_what_is_shown(
    models: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(families, "ARCHITECTURES", {})
    for program in PROGRAMS:
        exec(compile(program, "add_an_architecture.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("Lumina2Transformer2DModel\n")
    rows = re.findall(r"^(\S+) +Linear +(\S+) ", printed, re.M)
    assert rows[-1] == (ARCHITECTURES["Lumina2Transformer2DModel"].last_layers[0], "-")
    assert printed.endswith(next(text for kind, text in FENCED if kind == "text"))


def test_the_recipe_is_valid_and_keeps_the_last_layer(models: None, tmp_path: Path) -> None:
    recipe = tmp_path / "my-wan.yaml"
    recipe.write_text(
        next(text for kind, text in FENCED if kind == "yaml") + "data: {source: color-digits}\ntrain: {steps: 9}\n"
    )
    report = layers(load_recipe(str(recipe)))
    wide = [row.name for row in report.quantized if row.spec and row.spec.activation and row.spec.activation.bits == 16]
    assert wide == ["proj_out"]


def test_fields_and_calls_in_the_tables_exist() -> None:
    tables: dict[str, Any] = {"field": families.Architecture, "call": SpeechCalls}
    for title, owner in tables.items():
        table = re.search(rf"^\| {title} \|.*\n\|.*\n((?:\|.*\n)+)", DOCUMENT, re.M)
        assert table
        names = re.findall(r"^\| `(\w+)` \|", table[1], re.M)
        assert set(names) == set(owner.__dataclass_fields__)


def test_files_and_names_in_the_text_exist() -> None:
    root = Path(__file__).parents[2]
    for name in re.findall(r"`((?:src|tests)/[\w./]+\.py)`", DOCUMENT):
        assert (root / name).is_file(), name
    assert {"lumina2", "wan"} <= set(BUILDERS)
    assert "CONFIGS" in (root / "tests" / "tasks" / "test_speech.py").read_text()


def test_prompts_of_other_lengths_are_refused_with_both_shapes(models: None) -> None:
    encoder = PromptEncoder(load_pipeline(ModelSpec("wan")), tiny_sampler("wan"))
    longest = {name: torch.zeros(1, 5, *value.shape[2:]) for name, value in encoder.empty.items()}
    with pytest.raises(
        ModelError, match=r"encoder_hidden_states of shape \[1, 5, 64\] .* \[1, 8, 64\] for the empty one"
    ):
        encoder.per_sample(longest)
