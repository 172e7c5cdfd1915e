"""Every verb on a small real run: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import SHORT_ARGUMENTS, TINY_ARGUMENTS
from PIL import Image

from fraqat.config import load_recipe

METHODS = ["original", "dynamic", "vanilla-qat", "fraqat"]


@pytest.mark.xdist_group("cli")
def test_demo_leaves_everything_and_does_nothing_twice(finished: Path, fraqat) -> None:
    for name in ("recipe.yaml", "log.jsonl", "student.safetensors", "result.json", "layers.json", "report.html"):
        assert (finished / name).is_file(), name
    for name in ("dynamic", "vanilla-qat"):
        assert (finished / "baselines" / name / "student.safetensors").is_file()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    again = fraqat("demo", "--out", finished, "--json", "--quiet", *TINY_ARGUMENTS)
    assert again.code == 0
    result = json.loads(again.out)
    assert [row["model"] for row in result["tables"][0]["rows"]] == METHODS
    assert result["page"] == str(finished / "report.html")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


@pytest.mark.xdist_group("cli")
def test_the_export_gives_the_trained_student_back(finished: Path, fraqat) -> None:
    result = json.loads(fraqat("demo", "--out", finished, "--json", "--quiet", *TINY_ARGUMENTS).out)
    check = {row["check"]: row["found"] for row in result["tables"][1]["rows"]}
    assert check["codes that differ"] == 0
    assert check["largest output difference"] == 0.0
    assert check["largest output"] > 0.1


@pytest.mark.xdist_group("cli")
def test_methods_share_steps_and_differ_in_widths(finished: Path) -> None:
    def bits(folder: Path) -> list[float]:
        events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [event["bits"] for event in events if event["event"] == "step"]

    assert bits(finished) == [8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4]
    assert bits(finished / "baselines" / "vanilla-qat") == [4.0] * 9
    assert not (finished / "baselines" / "dynamic" / "log.jsonl").exists()


@pytest.mark.xdist_group("cli")
def test_evaluate_refuses_to_overwrite_unless_told(own_run, fraqat) -> None:
    before = own_run.evaluation_path.read_text()
    refused = fraqat("evaluate", own_run.path)
    assert refused.code == 6
    assert "exists already" in refused.err
    assert own_run.evaluation_path.read_text() == before
    done = fraqat("evaluate", own_run.path, "--overwrite", "--num-images", "3", "--json", "--quiet")
    assert done.code == 0
    assert [row["model"] for row in json.loads(done.out)["tables"][0]["rows"]] == METHODS
    assert json.loads(own_run.evaluation_path.read_text())["notes"][0].startswith("3 images per model")
    assert json.loads(own_run.evaluation_path.read_text())["notes"][-1].startswith(
        "dynamic: quantized without training. vanilla-qat: 9 training steps at 4 bits. "
        "fraqat: 9 training steps at 8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4 bits. W4A8: "
    )


@pytest.mark.xdist_group("cli")
def test_evaluation_is_the_same_at_every_batch_size(own_run, fraqat) -> None:
    def figures(batch_size: int) -> list[dict]:
        text = own_run.path / "recipe.yaml"
        lines = [
            f"  batch_size: {batch_size}" if line.startswith("  batch_size") and in_evaluation else line
            for line, in_evaluation in _with_section(text.read_text(), "evaluation")
        ]
        text.write_text("\n".join(lines))
        assert fraqat("evaluate", own_run.path, "--overwrite", "--quiet").code == 0
        return json.loads(own_run.evaluation_path.read_text())["models"]

    for left, right in zip(figures(4), figures(3), strict=True):
        assert left["quality"]["digit"] == right["quality"]["digit"]
        if left["quality"]["psnr_db"] is not None:
            assert left["quality"]["psnr_db"] == pytest.approx(right["quality"]["psnr_db"], abs=0.05)


def _with_section(text: str, wanted: str):
    section = ""
    for line in text.splitlines():
        section = line.split(":")[0] if line and not line.startswith(" ") else section
        yield line, section == wanted


@pytest.mark.xdist_group("cli")
def test_generate_gives_the_same_image_from_run_and_export(finished: Path, fraqat, tmp_path: Path) -> None:
    images = []
    for name, source in (("a.png", finished), ("b.png", finished / "export" / "packed")):
        done = fraqat("generate", source, "--prompt", "a red seven on white", "--out", tmp_path / name, "--seed", "3")
        assert done.code == 0, done.err
        images.append(Image.open(tmp_path / name).convert("RGB"))
    assert images[0].size == (32, 32)
    assert images[0].tobytes() == images[1].tobytes()
    assert len(set(images[0].tobytes())) > 10


@pytest.mark.xdist_group("cli")
def test_generate_refuses_to_overwrite_and_empty_prompts(finished: Path, fraqat, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"mine")
    refused = fraqat("generate", finished, "--prompt", "a red seven on white", "--out", out)
    assert (refused.code, out.read_bytes()) == (6, b"mine")
    assert fraqat("generate", finished, "--prompt", " ", "--out", tmp_path / "b.png").code == 2


@pytest.mark.xdist_group("cli")
def test_packed_file_is_small_and_says_how_small(finished: Path, own_run, fraqat) -> None:
    manifest = json.loads((finished / "export" / "packed" / "manifest.json").read_text())
    assert manifest["bits_per_weight"] <= 4.6
    assert manifest["num_file_bytes"] == (finished / "export" / "packed" / "model.safetensors").stat().st_size
    assert fraqat("export", own_run.path).code == 6
    done = fraqat("export", own_run.path, "--overwrite", "--float-dtype", "bfloat16", "--json")
    smaller = json.loads(done.out)["tables"][0]["rows"][0]
    assert smaller["files, bytes"] < manifest["num_file_bytes"]


@pytest.mark.xdist_group("cli")
def test_report_holds_every_image_row_and_refuses_to_overwrite(own_run, fraqat) -> None:
    assert fraqat("report", own_run.path).code == 6
    assert fraqat("report", own_run.path, "--overwrite").code == 0
    page = own_run.report_path.read_text()
    for label in METHODS:
        assert label in page
    assert page.count("data:image/png;base64,") >= 4 * len(METHODS)
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.xdist_group("cli")
@pytest.mark.parametrize("what", ["run", "export", "recipe", "model"])
def test_inspect_lists_the_layers_of_anything(finished: Path, fraqat, what: str) -> None:
    sources = {
        "run": finished,
        "export": finished / "export" / "packed",
        "recipe": "color-digits",
        "model": "zoo:color-digits-sana",
    }
    done = fraqat("inspect", sources[what], "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["tables"][0]["rows"]
    last = next(row for row in rows if row["layer"] == "proj_out")
    assert last.get("bits") == ("float" if what == "model" else "W4A16")
    if what == "model":
        assert {row["bits"] for row in rows} == {"float"}
        assert json.loads(done.out)["tables"][0]["notes"] == [
            f"the model is not quantized; {len(rows)} layers, 1,942,088 parameters"
        ]
    if what == "run":
        assert 10 < last["weight SQNR, dB"] < 40
        assert 5 < last["output SQNR, dB"] < 60


@pytest.mark.xdist_group("cli")
def test_dry_run_prints_recipe_and_layers_and_writes_nothing(fraqat, tmp_path: Path) -> None:
    done = fraqat("train", "color-digits", "--out", tmp_path / "run", "--dry-run", "--json", "--set", "train.steps=50")
    result = json.loads(done.out)
    assert result["recipe"]["train"]["steps"] == 50
    own = [row for row in result["stages"]["rows"] if row["method"] == "fraqat"]
    assert [row["bits"] for row in own] == [8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4]
    assert sum(row["steps"] for row in own) == 50
    assert any(row["bits"] == "W4A16" for row in result["layers"]["rows"])
    assert not (tmp_path / "run").exists()
    text = fraqat("train", "color-digits", "--out", tmp_path / "run", "--dry-run").out
    assert "kind: fractional" in text
    assert "proj_out" in text


@pytest.mark.xdist_group("cli")
def test_static_activations_train_and_survive_the_export(fraqat, tmp_path: Path) -> None:
    static = (
        "quantization.activation={granularity: tensor, static: true, symmetric: false, range_method: three_sigma}",
    )
    options = [text for setting in static for text in ("--set", setting)]
    run = tmp_path / "run"
    done = fraqat("train", "color-digits", "--out", run, *SHORT_ARGUMENTS, *options)
    assert done.code == 0, done.err
    assert "static activation ranges of 37 layers calibrated" in done.err
    assert fraqat("export", run, "--quiet").code == 0
    from fraqat.workflows import RunFolder, check_packed

    found = {row[0]: row[1] for row in check_packed(RunFolder(run)).rows}
    assert found["codes that differ"] == 0
    assert found["largest output difference"] == 0.0


def test_help_lists_the_verbs_and_exit_codes(fraqat) -> None:
    done = fraqat("--help")
    assert done.code == 0
    for verb in ("demo", "train", "evaluate", "generate", "export", "report", "inspect", "Exit codes"):
        assert verb in done.out


def test_recipe_round_trip(tiny_recipe, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(tiny_recipe.to_yaml())
    assert load_recipe(str(path)) == tiny_recipe
