"""The path that hub models take, on tiny pipelines: shards, variants, single files, and errors that say what to do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from fraqat.errors import ModelError
from fraqat.tasks import ModelSpec
from fraqat.tasks.conditioning import compute_dtype
from fraqat.tasks.language import load_language_model
from fraqat.tasks.loading import hub_commit, weight_files, why_unreachable
from fraqat.tasks.pipelines import load_pipeline, load_transformer, transformer_class
from fraqat.tasks.speech_loading import load_speech_model

Save = Callable[[str], Path]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


@pytest.fixture
def source(architecture_name: str, saved_pipeline: Save) -> ModelSpec:
    return ModelSpec(str(saved_pipeline(architecture_name)))


def test_the_transformer_alone_is_the_pipelines_own(source: ModelSpec) -> None:
    assert same_weights(load_transformer(source), load_pipeline(source).transformer)


def test_a_sharded_transformer_is_loaded_whole(source: ModelSpec, tmp_path: Path) -> None:
    pipeline: Any = load_pipeline(source)
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path / "transformer", None)) > 1
    assert same_weights(pipeline.transformer, load_transformer(ModelSpec(str(tmp_path))))


def test_a_variant_is_chosen_by_name(saved_pipeline: Save, tmp_path: Path) -> None:
    pipeline: Any = load_pipeline(ModelSpec(str(saved_pipeline("sd3"))))
    pipeline.save_pretrained(tmp_path)
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    spec = ModelSpec(str(tmp_path), variant="fp16")
    assert [path.name for path in weight_files(tmp_path / "transformer", "fp16")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    loaded = load_transformer(spec)
    assert same_weights(loaded, pipeline.transformer.float())


def test_a_missing_variant_says_so(saved_pipeline: Save) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded: .*variant.* Fix: use a variant that the repository has"):
        load_pipeline(ModelSpec(str(saved_pipeline("sd3")), variant="fp8"))


def test_weights_of_one_file_take_the_place_of_the_folders(saved_pipeline: Save, tmp_path: Path) -> None:
    folder = saved_pipeline("sd3")
    transformer = load_transformer(ModelSpec(str(folder)))
    changed = {name: value + 1 for name, value in transformer.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(changed, path)
    spec = ModelSpec(str(folder), single_file=str(path))
    loaded: Any = load_transformer(spec)
    assert all(torch.equal(value, changed[name]) for name, value in loaded.state_dict().items())
    pipeline: Any = load_pipeline(spec)
    assert same_weights(pipeline.transformer, loaded)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.ckpt", b"x", r"allowed is a \.safetensors file"),
        ("model.safetensors", b"x", "is truncated or damaged"),
        ("missing.safetensors", None, "is truncated or damaged"),
    ],
)
def test_impossible_single_files_are_refused(
    saved_pipeline: Save, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_transformer(ModelSpec(str(saved_pipeline("sd3")), single_file=str(tmp_path / name)))


def test_teachers_are_loaded_in_their_own_precision(source: ModelSpec) -> None:
    transformer = load_transformer(source, dtype=torch.bfloat16)
    pipeline: Any = load_pipeline(source, dtype=torch.float32, transformer=transformer)
    assert pipeline.transformer is transformer
    assert compute_dtype(pipeline.transformer) == torch.bfloat16
    assert next(pipeline.vae.parameters()).dtype == torch.float32


def test_a_pipeline_without_a_transformer_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline", "unet": [null, null]}')
    with pytest.raises(ModelError, match="has no transformer, only unet"):
        transformer_class(ModelSpec(str(tmp_path)))


def test_offline_says_how_to_get_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_OFFLINE", True, raising=False)
    with pytest.raises(
        ModelError, match=r"'nobody/nothing' cannot be loaded: .* or download it first with `hf download"
    ):
        load_pipeline(ModelSpec("nobody/nothing"))


def no_network(method: str, url: str, **arguments: Any) -> None:
    """As the hub's library gives up."""
    names = [name for name in ("httpx2", "httpx") if name in sys.modules]
    raise sys.modules[names[0]].ConnectError(f"no route to {url} after {1 + arguments['max_retries']} times")


def loaders() -> list[Callable[[ModelSpec], object]]:
    return [load_pipeline, load_transformer, load_language_model, load_speech_model, hub_commit]


@pytest.mark.parametrize("load", loaders(), ids=lambda load: load.__name__)
def test_without_a_network_a_hub_id_fails_before_the_libraries_retry(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[ModelSpec], object]
) -> None:
    def model_info(*args: object, **arguments: object) -> None:
        no_network("GET", "https://huggingface.co", max_retries=2)

    monkeypatch.setattr("huggingface_hub.utils.http_backoff", no_network)
    monkeypatch.setattr("fraqat.tasks.loading.model_info", model_info)  # which does not retry
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load(ModelSpec("nobody/nothing"))
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "model.source = 'nobody/nothing' cannot be had" in message
    assert "https://huggingface.co cannot be reached (no route to https://huggingface.co after 3 times)" in message
    for fix in ("connect to the network", "unset HF_HUB_OFFLINE", "local folder", "`hf download nobody/nothing`"):
        assert fix in message


def test_what_is_in_the_cache_is_loaded_without_asking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub_asked: list[str]
) -> None:
    folder = tmp_path / "models--someone--sana" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert why_unreachable("someone/sana", None) is None and hub_asked == []
    assert why_unreachable("someone/other", None) is None and hub_asked == ["https://huggingface.co"]
    assert why_unreachable(str(tmp_path), None) is None and len(hub_asked) == 1


def test_a_gated_model_says_where_to_accept_its_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, **arguments: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"accept the licence on https://huggingface.co/black-forest-labs/FLUX.1-dev"):
        load_pipeline(ModelSpec("black-forest-labs/FLUX.1-dev"))
