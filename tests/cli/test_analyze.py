"""`fraqat analyze` on a small recipe: what it prints, writes and refuses, and its place in the report of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import SHORT_ARGUMENTS, TINY_ARGUMENTS

from fraqat.config import load_recipe
from fraqat.distill import validation_loss
from fraqat.errors import OutputError
from fraqat.tasks import ModelSpec, pipelines
from fraqat.workflows import Session, SilentProgress, analyzing, open_session

SMALL = [*TINY_ARGUMENTS, "--set", "train.calibration_samples=8", "--set", "data.num_validation=8"]


@pytest.mark.xdist_group("cli")
def test_bits_measures_every_width_and_four_bits_is_the_dynamic_baseline(fraqat, tmp_path: Path) -> None:
    done = fraqat("analyze", "color-digits", "--what", "bits", "--bits", "8,4,2", "--json", "--quiet", *SMALL)
    assert done.code == 0, done.err
    (table,) = json.loads(done.out)["tables"]
    rows = {row["bits"]: row for row in table["rows"]}
    assert list(rows) == [8, 4, 2]
    losses = [rows[bits]["loss, inputs of 8 bits"] for bits in (8, 4, 2)]
    assert losses == sorted(losses)
    assert rows[8]["loss, float inputs"] < rows[8]["loss, inputs of 8 bits"]
    recipe = load_recipe("color-digits", [text for text in SMALL if text != "--set"])
    session = open_session(recipe)
    student, _ = session.new_student(recipe)
    expected = validation_loss(session.task, session.teacher, student, recipe.train)
    assert rows[4]["loss, inputs of 8 bits"] == pytest.approx(expected, rel=1e-6)
    assert not list(tmp_path.iterdir())


@pytest.mark.xdist_group("cli")
def test_outliers_has_a_row_for_every_quantized_layer_and_files_are_written_once(fraqat, tmp_path: Path) -> None:
    arguments = ("analyze", "color-digits", "--what", "outliers", "--out", tmp_path / "a", "--json", "--quiet", *SMALL)
    done = fraqat(*arguments)
    assert done.code == 0, done.err
    layers, families = json.loads(done.out)["tables"]
    assert len(layers["rows"]) == 37
    assert all(row["weight kurtosis"] > 1 and row["input kurtosis"] > 1 for row in layers["rows"])
    assert {row["family"] for row in families["rows"]} == {"FF", "Attn", "-"}
    names = {"outliers.json", "outliers.html", "outliers.svg", "outliers-2.svg"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    written = json.loads((tmp_path / "a" / "outliers.json").read_text())
    assert written["recipe"]["name"] == "color-digits"
    assert written["tables"][0]["rows"] == layers["rows"]
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    refused = fraqat(*arguments)
    assert refused.code == 6
    assert "exists already. Fix: pass --overwrite or another --out." in refused.err
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    (tmp_path / "a" / "outliers-3.svg").write_text("of an analysis with more drawings")
    assert fraqat(*arguments, "--overwrite").code == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == names


@pytest.mark.xdist_group("cli")
def test_an_analysis_in_a_run_is_shown_in_its_report(own_run, fraqat) -> None:
    folder = own_run.path / "analysis"
    recipe = own_run.path / "recipe.yaml"
    done = fraqat("analyze", recipe, "--what", "bits", "--bits", "8,4", "--out", folder, "--quiet")
    assert done.code == 0, done.err
    assert fraqat("report", own_run.path, "--overwrite").code == 0
    page = own_run.report_path.read_text()
    assert "Loss over the width of the weights, without training" in page
    assert "plot bits-wide" in page
    (folder / "bits.json").write_text('{"tables": [{"title": 1}]}')
    broken = fraqat("report", own_run.path, "--overwrite")
    assert broken.code == 3
    assert "bits.json cannot be read" in broken.err
    assert own_run.report_path.read_text() == page


@pytest.mark.xdist_group("cli")
@pytest.mark.slow
def test_sensitivity_ranks_the_layers_and_sums_families(fraqat, tmp_path: Path) -> None:
    done = fraqat(
        "analyze", "color-digits", "--what", "sensitivity", "--out", tmp_path, "--json", "--quiet", *SMALL,
        "--set", "data.num_validation=4", "--set", "train.batch_size=4",
    )  # fmt: skip
    assert done.code == 0, done.err
    layers, families = json.loads(done.out)["tables"]
    rises = [row["rise alone"] for row in layers["rows"]]
    assert len(rises) == 37
    assert rises == sorted(rises, reverse=True)
    *single, total = families["rows"]
    assert total["family"] == "all"
    assert total["sum of rises alone"] == pytest.approx(sum(rises))
    assert sum(row["layers"] for row in single) == total["layers"] == 37
    assert {path.name for path in tmp_path.iterdir()} == {f"sensitivity{end}" for end in (".json", ".html", ".svg")}


@pytest.mark.xdist_group("cli")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--what", "bits", "--bits", "4,x"), "--bits = '4,x' is not possible: allowed is numbers"),
        (
            ("--what", "bits", "--bits", "4,4"),
            "bits = [4.0, 4.0] is not possible: allowed is one or more different widths",
        ),
        (("--what", "bits", "--bits", "1"), "bits = 1.0 is not possible: allowed is 1 < bits <= 32"),
        (("--what", "bits", "--bits", ""), "bits = [] is not possible"),
        (("--what", "outliers", "--bits", "4"), "bits = [4.0] is not possible: allowed is only with --what bits"),
        (("--what", "colour"), "'colour' is not one of 'bits', 'outliers', 'sensitivity'"),
    ],
)
def test_bad_arguments_name_what_is_allowed(fraqat, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = fraqat("analyze", "color-digits", *arguments, "--out", tmp_path / "a", "--quiet", *SMALL)
    assert done.code == 2
    assert message in done.err.replace("│ ", "").replace(" │", "")
    assert not (tmp_path / "a").exists()


@pytest.mark.xdist_group("cli")
def test_changed_codes_of_a_run_are_in_its_log_and_leave_the_fingerprint(fraqat, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("--set", "train.validate_every=2", "--set", "train.log_code_flips=true")
    done = fraqat("train", "color-digits", "--out", run, "--quiet", *SHORT_ARGUMENTS, *settings)
    assert done.code == 0, done.err
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    codes = [event for event in events if event["event"] == "codes"]
    assert [event["step"] + 1 for event in codes] == [2, 3]
    assert {"all", "FF", "Attn", "-"} == set(codes[0]["shares"])
    assert 0 < codes[0]["shares"]["all"] < 1
    from fraqat.workflows import RunFolder
    from fraqat.workflows.reporting import _code_flips

    curves = _code_flips(RunFolder(run))
    assert {curve.label for curve in curves} == {"all layers", "FF", "Attn", "other"}
    assert curves[0].points == tuple((event["step"] + 1, 100 * event["shares"]["all"]) for event in codes)
    with_flips, without = (
        load_recipe("color-digits", (f"train.log_code_flips={flag}",)).fingerprint() for flag in ("true", "false")
    )
    assert with_flips == without


@pytest.mark.parametrize("kind", ["bits", "sensitivity", "layer-widths"])
def test_an_empty_cache_is_filled_with_one_loading_of_the_encoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    loaded: list[ModelSpec] = []
    load = pipelines.load_pipeline

    def counting(spec: ModelSpec, **arguments: Any) -> Any:
        loaded.append(spec)
        return load(spec, **arguments)

    def calibrate(session: Session[Any], *_: object) -> None:
        session.task.calibration_batches(8, 8)  # one shard of several, as static activations take
        raise OutputError("the test needs no student")

    monkeypatch.setenv("FRAQAT_CACHE", str(tmp_path))
    monkeypatch.setattr(pipelines, "load_pipeline", counting)
    monkeypatch.setattr(analyzing, "calibrated_student", calibrate)
    for module in ("image_samples", "encoding"):
        monkeypatch.setattr(f"fraqat.tasks.{module}.SHARD_SAMPLES", 8)
    recipe = load_recipe("color-digits", ("data.num_train=16", "data.num_validation=8", "train.batch_size=8"))
    session = open_session(recipe)
    with pytest.raises(OutputError, match="needs no student"):
        analyzing.analyze(recipe, analyzing.AnalysisKind(kind), SilentProgress(), session=session)
    session.task.validation_batches(8)  # what losses are taken on
    session.task.train_stream(8, 0)
    assert len(loaded) == 1
    assert len(list(tmp_path.rglob("shard-*.safetensors"))) == 3
