"""Widths by layer from the command line: measured, chosen, planned, trained, exported, refused."""

import json
from pathlib import Path

import pytest
from cli_helpers import TINY, TINY_ARGUMENTS

from fraqat import workflows
from fraqat.config import load_recipe, load_values
from fraqat.errors import ConfigError
from fraqat.nn import quantized_layers
from fraqat.table import Table
from fraqat.workflows import RunFolder, open_session

WIDTHS = (3, 4, 6)
GGUF_SCALES = "quantization.weight.scale_dtype=float16"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up table of the embedded Sana: attention does not mind few bits."""
    session = open_session(load_recipe("color-digits"))
    rows = []
    for row in session.layers(session.recipe).quantized:
        weights = row.shape[0] * row.shape[1]
        scale = 0.001 if row.family == "Attn" else 1.0
        rises = {f"rise at {bits}": scale * weights * 4.0**-bits for bits in WIDTHS}
        rows.append({"layer": row.name, "family": row.family, "weights": weights, **rises})
    path = tmp_path_factory.mktemp("widths") / "layer-widths.json"
    path.write_text(json.dumps({"kind": "layer-widths", "tables": [{"rows": rows}]}))
    return path


def section(table: Path, /, **values: object) -> str:
    return f"quantization.layer_widths={json.dumps({'table': str(table), 'average_bits': 4, **values})}"


def test_a_run_trains_its_widths_and_exports_them_packed(fraqat, table, tmp_path) -> None:
    arguments = (*TINY_ARGUMENTS, "--set", "train.steps=3", "--set", "schedule.kind=constant", "--set", section(table))
    done = fraqat("train", "color-digits", "--out", tmp_path / "run", "--quiet", *arguments)
    assert done.code == 0, done.err
    run = RunFolder(tmp_path / "run")
    recipe = run.recipe()
    session = open_session(recipe)
    student = session.load_student(recipe, run.student_path)
    bits = {name: layer.weight_quantizer.bits for name, layer in quantized_layers(student)}
    assert bits == recipe.quantization.layer_widths.bits and set(bits.values()) == set(WIDTHS)
    assert all(width == 3 for name, width in bits.items() if ".attn" in name)
    sizes = {name: layer.weight.numel() for name, layer in quantized_layers(student)}
    assert 3.7 < sum(sizes[n] * bits[n] for n in bits) / sum(sizes.values()) <= 4
    packed = json.loads(fraqat("export", run.path, "--quiet", "--json").out)["tables"][0]["rows"][0]
    assert packed["bits per quantized weight"] < 5.0  # with scales and names of a tiny model
    assert fraqat("verify", run.path / "export" / "packed", "--against", run.path, "--quiet").code == 0


def test_analyze_measures_the_table_that_a_recipe_reads(fraqat, tmp_path: Path) -> None:
    done = fraqat(
        *("analyze", "color-digits", "--what", "layer-widths", "--bits", "3,8", "--out", tmp_path, "--json", "--quiet"),
        *TINY_ARGUMENTS,
        *("--set", "train.batch_size=2", "--set", "quantization.rules=[{pattern: proj_out, weight_bits: 8}]"),
    )
    assert done.code == 0, done.err
    rises, averages = json.loads(done.out)["tables"]
    assert len(rises["rows"]) == 37
    by_layer = {row["layer"]: row for row in rises["rows"]}
    assert by_layer["proj_out"]["rise at 3"] is None and by_layer["proj_out"]["rise at 8"] > 0
    assert sum(row["rise at 8"] < row["rise at 3"] for row in rises["rows"] if row["rise at 3"] is not None) >= 34
    assert [row["bits"] for row in averages["rows"]] == [3, 8]
    assert all(row["sum of rises, mixed"] <= row["sum of rises, all alike"] for row in averages["rows"])
    assert {path.name for path in tmp_path.iterdir()} == {f"layer-widths{end}" for end in (".json", ".html", ".svg")}
    recipe = load_recipe("color-digits", (section(tmp_path / "layer-widths.json", average_bits=5),))
    assert recipe.quantization.layer_widths.bits["proj_out"] == 8


def test_plan_prints_the_widths(fraqat, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Planned:
        """The plan itself has tests of its own, and takes seconds."""

        def to_table(self) -> Table:
            return Table("Plan", ("quantity",), ())

    monkeypatch.setattr(workflows, "plan", lambda recipe, device, options: Planned())
    done = fraqat("plan", "color-digits", "--json", "--set", section(table))
    assert done.code == 0, done.err
    _, widths = json.loads(done.out)["tables"]
    assert len(widths["rows"]) == 37 and {row["bits"] for row in widths["rows"]} == set(WIDTHS)
    assert "at most 4 were asked for" in widths["notes"][0]
    assert len(json.loads(fraqat("plan", "color-digits", "--json").out)["tables"]) == 1


def test_the_recipe_keeps_its_answer_and_asks_again_when_the_question_changes(table: Path, tmp_path: Path) -> None:
    copy = tmp_path / "layer-widths.json"
    copy.write_text(table.read_text())
    recipe = load_recipe("color-digits", (*TINY, "train.steps=50", section(copy, widths=[3, 6])))
    assert recipe.quantization.final_bits == 3 and set(recipe.quantization.layer_widths.bits.values()) == {3, 6}
    assert [bits for bits, _ in recipe.schedule.lengths(recipe.quantization.final_bits)][-1] == 3
    copy.unlink()
    values = recipe.to_values()
    assert load_values(values) == recipe
    values["quantization"]["layer_widths"]["average_bits"] = 5
    with pytest.raises(ConfigError, match=r"layer_widths\.table.*No such file.*fraqat analyze RECIPE"):
        load_values(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"average_bits": 2}, "average_bits allowed 3 or more"),
        ({"average_bits": -1}, "layer_widths.average_bits positive"),
        ({"widths": [4, 5]}, "layer_widths.widths = 5 widths of the table: 3, 4, 6"),
        ({"widths": [4, 4]}, "layer_widths.widths different"),
        ({"table": "/nowhere.json"}, "layer_widths.table /nowhere.json measure with"),
        ({"average": 4}, "unknown key average_bits"),
    ],
)
def test_bad_sections_are_named(table: Path, values: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("color-digits", (section(table, **values),))
    assert all(word in str(caught.value) for word in words.split()), caught.value


def test_a_target_without_a_width_says_layer_and_width(tmp_path: Path) -> None:
    plain = load_recipe("gemma-2-2b-it-tiny", ("target=gguf", GGUF_SCALES))
    rows = [
        {"layer": row.name, "weights": row.shape[0] * row.shape[1], "rise at 4": 1.0, "rise at 5": 0.5}
        for row in open_session(plain).layers(plain).quantized
    ]
    path = tmp_path / "layer-widths.json"
    path.write_text(json.dumps({"kind": "layer-widths", "tables": [{"rows": rows}]}))
    recipe = load_recipe("gemma-2-2b-it-tiny", ("target=gguf", GGUF_SCALES, section(path, average_bits=4.5)))
    with pytest.raises(ConfigError, match=r"quantization of layer model\..*: weight\.bits = 5.*for target gguf"):
        open_session(recipe).layers(recipe)


def test_a_table_of_another_model_is_refused(fraqat, table: Path, tmp_path) -> None:
    values = json.loads(table.read_text())
    del values["tables"][0]["rows"][5]
    (tmp_path / "other.json").write_text(json.dumps(values))
    missing = fraqat("train", "color-digits", "--dry-run", "--set", section(tmp_path / "other.json"))
    assert missing.code == 2 and "quantization.layer_widths.table" in missing.err and "is not in it" in missing.err
    again = fraqat("analyze", "color-digits", "--what", "layer-widths", "--set", section(table))
    assert again.code == 2 and "quantization.layer_widths=null" in again.err
