"""Targets from the command line: what a recipe's `target` sets, what an export refuses, what `verify` finds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fraqat.config import load_recipe
from fraqat.errors import ConfigError
from fraqat.export import TARGETS, write_manifest

pytestmark = pytest.mark.xdist_group("cli")

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="session")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with an ONNX export."""
    from fraqat import workflows

    run = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(finished, run)
    workflows.export(workflows.RunFolder(run), "onnx", workflows.SilentProgress())
    return run


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run / "export" / "onnx", folder))


def test_packed_export_is_the_student_exactly(finished: Path, own_run, fraqat) -> None:
    done = fraqat("verify", own_run.path / "export" / "packed", "--against", own_run.path, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    rows = {row["check"]: row for row in result["tables"][0]["rows"]}
    assert rows["codes that differ"]["found"] == 0
    assert rows["SQNR of transformer.output, dB"]["found"] == "exact"
    assert result["holds"] is True
    assert len(result["tables"][1]["rows"]) == 37


@pytest.mark.slow
def test_onnx_export_holds_and_samples_a_picture(exported: Path, fraqat) -> None:
    done = fraqat(
        "verify",
        exported / "export" / "onnx",
        "--against",
        exported,
        "--prompt",
        "a red three on white",
        "--num-batches",
        1,
    )
    assert done.code == 0, done.err + done.out
    assert "holds" in done.out
    pictures = {name: (exported / "verify" / "onnx" / f"{name}.png").read_bytes() for name in ("student", "export")}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


@pytest.mark.slow
def test_a_changed_code_is_found_and_named(exported: Path, fraqat, tmp_path: Path) -> None:
    folder = copy_of(exported, tmp_path / "onnx")
    path, layer = folder / "transformer.onnx", "transformer_blocks.1.attn1.to_k"
    model = onnx.load(path)
    tensor = next(item for item in model.graph.initializer if item.name == f"{layer}.codes")
    raw = bytearray(tensor.raw_data)
    raw[0] ^= 0x01
    tensor.raw_data = bytes(raw)
    onnx.save(model, path)
    cut = fraqat("verify", folder, "--against", exported)
    assert cut.code == 3
    assert "checksum" in cut.err
    write_manifest(folder, "onnx", {})
    done = fraqat("verify", folder, "--against", exported, "--layers", "--num-batches", 1)
    assert done.code == 7
    assert "DOES NOT HOLD" in done.out
    assert f"the first layer that parts is {layer}" in done.err


@pytest.mark.slow
def test_a_newer_format_and_a_missing_file_are_refused(exported: Path, fraqat, tmp_path: Path) -> None:
    folder = copy_of(exported, tmp_path / "onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    newer = fraqat("verify", folder, "--against", exported)
    assert newer.code == 3
    assert "has format 99, this program reads up to 1. Fix: update fraqat." in newer.err
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {"../../result.json": "0"}}))
    assert "outside of the export" in fraqat("verify", folder, "--against", exported).err
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "transformer.onnx").unlink()
    assert "is missing. Fix: export again." in fraqat("verify", folder, "--against", exported).err


@pytest.mark.slow
def test_generate_says_that_an_onnx_export_runs_elsewhere(exported: Path, fraqat, tmp_path: Path) -> None:
    done = fraqat("generate", exported / "export" / "onnx", "--prompt", "a red three", "--out", tmp_path / "a.png")
    assert done.code == 3
    assert "an export for onnx, which runs elsewhere" in done.err


def test_export_to_a_grid_that_was_not_trained_is_refused_with_the_reason(own_run, fraqat) -> None:
    done = fraqat("export", own_run.path, "--format", "onnx-qdq")
    assert done.code == 2
    assert "was not trained for target onnx-qdq" in done.err
    assert "activation.granularity = token, the target computes tensor" in done.err
    assert "train with `--set target=onnx-qdq`, or pass --accept-loss" in done.err
    assert not (own_run.path / "export" / "onnx-qdq").exists()


def test_unknown_targets_and_foreign_models_are_refused(own_run, fraqat) -> None:
    unknown = fraqat("export", own_run.path, "--format", "tflite")
    assert unknown.code == 2
    assert "allowed is packed, onnx" in unknown.err
    assert fraqat("train", "color-digits", "--dry-run", "--set", "target=vllm").code == 2


@pytest.mark.parametrize(
    "name", [name for name, t in TARGETS.items() if "text-to-image" in t.tasks and not t.model_classes]
)
def test_a_recipe_that_names_a_target_is_on_its_grid(name: str) -> None:
    from fraqat.export import LayerPlace
    from fraqat.workflows import open_session

    target = TARGETS[name]
    recipe = load_recipe("color-digits", (f"target={name}",))
    again = type(recipe).model_validate(recipe.to_values())
    assert again == recipe
    rows = open_session(recipe).layers(recipe).quantized
    assert len(rows) >= 20
    for row in rows:
        assert target.nearest(LayerPlace(row.name, row.type_name, row.shape), row.spec) == row.spec


def test_a_field_that_contradicts_the_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation\.static = False .* target onnx-qdq"):
        load_recipe("color-digits", ("target=onnx-qdq", "quantization.activation.static=false"))
    with pytest.raises(ConfigError, match=r"target = 'tpu'"):
        load_recipe("color-digits", ("target=tpu",))


def test_a_model_without_a_runtime_is_refused_before_training() -> None:
    from fraqat.workflows import open_session

    recipe = load_recipe("color-digits", ("target=gguf", "quantization.weight.scale_dtype=float16"))
    with pytest.raises(ConfigError, match="targets that take SanaTransformer2DModel"):
        open_session(recipe).layers(recipe)


def test_a_channel_grid_may_replace_a_targets_groups() -> None:
    recipe = load_recipe("gemma-2-2b-it-tiny", ("target=vllm", "quantization.weight.granularity=channel"))
    assert recipe.quantization.weight.group_size is None


def test_a_recipe_may_make_a_targets_inputs_symmetric_or_is_told_which_field() -> None:
    with pytest.raises(ConfigError, match=r"activation\.symmetric = True .* target torchao"):
        load_recipe("gemma-2-2b-it-tiny", ("target=torchao", "quantization.activation.symmetric=true"))


@pytest.mark.parametrize("value", ["[onnx]", "{a: b}", "3"])
def test_a_target_that_is_no_name_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="target"):
        load_recipe("color-digits", (f"target={value}",))


def test_targets_are_listed(fraqat) -> None:
    done = fraqat("targets", "--json")
    rows = json.loads(done.out)["tables"][0]["rows"]
    assert [row["name"] for row in rows] == list(TARGETS)
    assert all(row["what it is"] for row in rows)
    assert np.all([row["models"] for row in rows])
