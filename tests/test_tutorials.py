"""The tutorials: every command, recipe, option and file that they name exists, and the tiny twins run from start to export."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from fraqat import cli
from fraqat.config import load_recipe, recipe_names
from fraqat.data.speech_signal import LogMelSpec, write_wav
from fraqat.data.speech_source import load_speech_data
from fraqat.planning import DEVICES
from fraqat.tasks.known import KNOWN_MODELS
from fraqat.workflows import open_session

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "tutorials"
OVERVIEW = (FOLDER / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.md"))}
FAMILIES = [name for name in PAGES if name != "README"]
CHEAP = {
    "text-to-image": (
        *("data.num_train=16", "data.num_validation=4", "train.batch_size=4"),
        *("sampler.num_steps=2", "evaluation.num_images=2"),
    ),
    "language": (
        *("data.num_train=16", "data.num_validation=4", "data.sequence_length=32", "train.batch_size=4"),
        *("evaluation.num_sequences=4", "evaluation.max_new_tokens=4"),
    ),
    "text-to-speech": (
        *("data.num_train=8", "data.num_validation=2", "train.batch_size=4"),
        *("evaluation.num_phrases=1", "evaluation.batch_size=1"),
    ),
}
SHORT = ("train.steps=9", "train.tensorboard=false", "quantization.weight.range_method=max_abs")
TWO_STEPS = ("train.steps=2", "schedule={kind: custom, stages: [[8, 0.5], [4, 0.5]]}")
"""Of runs beside the one that is followed to its export: they are quicker without all nine stages."""

MIXED_NORM = "ignore:Mismatch dtype between input and weight:UserWarning"  # rms_norm of bf16 with float32 weights
OTHER_PARTS = {"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"}
"""What no recipe names, for models whose repository is not a whole pipeline."""


def blocks(page: str, language: str = "") -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.S | re.M)
    return [text for found, text in fenced if found == language]


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(page) for line in block.splitlines()]


def option(arguments: list[str], name: str) -> list[str]:
    return [value for key, value in pairwise(arguments) if key == name]


def of_the_twin(page: str) -> list[list[str]]:
    """The page's commands on a tiny recipe, or on the runs that those commands made."""
    ours = [words for words in commands(page) if words[0] == "fraqat"]
    runs = {Path(option(words, "--out")[0]) for words in ours if words[1] == "train" and words[2].endswith("-tiny")}
    return [words for words in ours if words[2].endswith("-tiny") or runs & {Path(words[2]), *Path(words[2]).parents}]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], None]:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code in (0, None), words

    return call


def cheap(words: list[str]) -> list[str]:
    """A training command made short."""
    settings = (*SHORT, *CHEAP[load_recipe(words[2]).task], *(() if "--baselines" in words else TWO_STEPS))
    if any("lm_eval" in word for word in words):
        settings += ("evaluation.lm_eval.limit=2",)
    return [*words, *(text for setting in settings for text in ("--set", setting))]


@pytest.mark.xdist_group("tutorials")
@pytest.mark.filterwarnings(MIXED_NORM)
@pytest.mark.parametrize("page", FAMILIES)
def test_the_tiny_twin_runs_from_start_to_export(
    page: str, run: Callable[[list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = [block for block in blocks(page, "python") if "write_topics_tasks" in block]
    for block in setup:
        exec(compile(block, page, "exec"), {})
    steps = of_the_twin(page)
    assert {"train", "evaluate", "report", "export", "generate", "inspect"} == {words[1] for words in steps}
    for words in steps:
        run(cheap(words) if words[1] == "train" else words)
    capsys.readouterr()
    main = Path(option(steps[0], "--out")[0])
    promised = {name for name in re.findall(r"`(runs/[\w./-]+)`", PAGES[page]) if (tmp_path / name).suffix}
    promised |= {name.replace("RUN", str(main)) for name in re.findall(r"`(RUN/[\w./-]+)`", OVERVIEW)}
    assert len(promised) >= 9
    for name in promised:
        assert (tmp_path / name).exists(), name
    evaluation = json.loads((tmp_path / main / "evaluation.json").read_text())
    assert [row["model"] for row in evaluation["models"]] == ["original", "dynamic", "vanilla-qat", "fraqat"]


def test_one_family_alone_is_what_the_pages_train() -> None:
    for page in FAMILIES:
        trained = [option(words, "--set") for words in of_the_twin(page) if words[1] == "train"]
        names = [text.partition("=")[2] for settings in trained for text in settings if "quantization.train" in text]
        assert len(names) == 1, page
        assert names[0] in ("FF", "Attn", "TF"), page


@pytest.mark.parametrize("page", PAGES)
def test_commands_options_and_settings_exist(page: str) -> None:
    group = typer.main.get_command(cli.app)
    assert commands(page)
    for words in commands(page):
        if words[0] != "fraqat":
            assert words[:2] in (["hf", "download"], ["hf", "auth"], ["pip", "install"]), words
            continue
        verb = group.commands[words[1]]  # pyright: ignore[reportAttributeAccessIssue]
        verb.make_context(words[1], words[2:])
        if words[1] in ("train", "plan"):
            assert words[2] in recipe_names(), words
            load_recipe(words[2], tuple(s for s in option(words, "--set") if "include_path" not in s))
        assert set(option(words, "--device")) <= set(DEVICES), words


@pytest.mark.parametrize("page", PAGES)
def test_downloads_are_what_recipes_need(page: str) -> None:
    needed = {text for name in recipe_names() for text in _texts(load_recipe(name).to_values())} | OTHER_PARTS
    for words in commands(page):
        if words[:2] == ["hf", "download"]:
            assert words[2] in needed, words


def _texts(values: Any) -> Iterator[str]:
    """All texts in nested values."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)


def test_messages_are_those_of_the_program() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    for page, text in PAGES.items():
        table = re.search(r"^\| message \| what to do \|\n\|.*?\n((?:\|.*\n)+)", text, re.M)
        assert table, page
        messages = re.findall(r"^\| `(.+?)` \|", table[1], re.M)
        assert len(messages) == table[1].count("\n") >= 3, page
        for message in messages:
            assert message in joined, f"{page}: {message}"


def test_settings_named_in_the_text_exist() -> None:
    """`section.field` in the text is a field of some recipe."""
    known = {name for recipe in recipe_names() for name in _dotted(load_recipe(recipe).to_values())}
    sections = ("model", "data", "sampler", "language", "quantization", "train", "evaluation", "schedule")
    for page, text in PAGES.items():
        for name in re.findall(rf"`(?:--set )?\"?((?:{'|'.join(sections)})\.[\w.]+)", text):
            assert any(name == field or name.startswith(field + ".") for field in known), f"{page}: {name}"


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def test_the_overview_names_every_page_recipe_and_checkpoint() -> None:
    rows = re.findall(r"^\| \[.*?\]\(([\w.-]+)\.md\) \| `(.*?)` \| `(.*?)` \| `(.*?)` \|", OVERVIEW, re.M)
    assert sorted(page for page, *_ in rows) == sorted(FAMILIES)
    for page, recipe, twin, source in rows:
        assert twin == f"{recipe}-tiny"
        assert load_recipe(recipe).model.source == source
        assert any(words[1:3] == ["train", twin] for words in commands(page)), page
        assert any(words[1:3] == ["plan", recipe] for words in commands(page)), page


def test_the_table_of_layers_is_what_the_dry_run_says() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", OVERVIEW, re.M)
    assert len(rows) == len(FAMILIES)
    for name, parameters, *counts in rows:
        recipe = load_recipe(name)
        report = open_session(recipe).layers(recipe)
        quantized = report.quantized
        wide = sum(1 for row in quantized if row.spec and row.spec.activation and row.spec.activation.bits == 16)
        by_family = [sum(row.family == family for row in quantized) for family in ("FF", "Attn")]
        assert int(parameters.replace(",", "")) == report.num_model_parameters, name
        assert [int(value) for value in counts] == [len(quantized), *by_family, wide], name


def test_the_table_of_text_embeddings_is_computed_right() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \|$", OVERVIEW, re.M)
    assert len(rows) == 4
    for name, captions, tokens, width, gigabytes in rows:
        recipe = load_recipe(name)
        known = KNOWN_MODELS[recipe.model.source]
        widths = {known.config.get(key) for key in ("joint_attention_dim", "caption_channels")}
        assert int(captions.replace(",", "")) == recipe.data.num_train
        assert int(tokens) == known.text_length
        assert int(width) in widths
        assert int(gigabytes) == round(recipe.data.num_train * int(tokens) * int(width) * 2 / 1e9)


@pytest.mark.parametrize("page", FAMILIES)
def test_published_settings_are_those_of_the_recipe(page: str) -> None:
    """Learning rates and batch in the table are the recipe's."""
    name = next(words[2] for words in commands(page) if words[1] == "plan")
    recipe = load_recipe(name)
    numbers = [f"{recipe.train.learning_rate.peak:.0e}".replace("e-0", "e-"), str(recipe.train.batch_size)]
    numbers.append(f"{recipe.baseline('vanilla-qat').train.learning_rate.peak:.0e}".replace("e-0", "e-"))
    line = re.search(r"learning rate[^.]*", PAGES[page])
    assert line, page
    for number in numbers:
        assert number in line[0], f"{page}: {number}"


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for text in PAGES.values() for name in re.findall(r"fraqat\[(\w+)\]", text)}
    assert named
    assert named <= set(extras)


def test_recordings_and_voices_become_what_the_speech_recipe_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {7306: {"xvector": [0.5] * 512}})
    wavs = tmp_path / "LJSpeech-1.1" / "wavs"
    wavs.mkdir(parents=True)
    texts = [f'text {i}, with a "quotation' for i in range(12)]
    (wavs.parent / "metadata.csv").write_text("".join(f"LJ{i}|raw {i}|{text}\n" for i, text in enumerate(texts)))
    for i in range(len(texts)):
        write_wav(wavs / f"LJ{i}.wav", torch.randn(8000) * 0.1, 16000)
    for block in blocks("text-to-speech", "python"):
        exec(compile(block, "text-to-speech.md", "exec"), {})
    command = next(words for words in commands("text-to-speech") if words[1:3] == ["train", "speecht5"])
    changes = ("data.num_train=4", "data.num_validation=1", "data.records.validation_share=0.5", "train.batch_size=4")
    recipe = load_recipe("speecht5", (*option(command, "--set"), *changes))
    train, held_out = load_speech_data(recipe.data, None, LogMelSpec())  # pyright: ignore[reportArgumentType]
    assert set(train.texts) < set(texts)
    assert set(held_out.texts) < set(texts) - set(train.texts)
    assert train.speakers.tolist() == [[0.5] * 512] * 4
