"""Configurations of models are found without their weights, and full-size models are built without memory."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from fraqat.errors import ModelError
from fraqat.nn import quantize_, quantized_layers
from fraqat.tasks.known import KNOWN_MODELS, build_on_meta, describe_model, known_model
from fraqat.zoo import zoo_path

SIZES = {
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "Efficient-Large-Model/Sana_600M_512px_diffusers": 591_747_872,
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": 610_856_096,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
    "google/gemma-2-2b-it": 2_614_341_888,
    "microsoft/speecht5_tts": 144_431_684,
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("hub_id", list(SIZES))
def test_published_models_have_their_published_size(hub_id: str) -> None:
    entry = known_model(hub_id)
    assert entry is not None
    model = entry.build(torch.bfloat16)
    assert type(model).__name__ == entry.class_name
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[hub_id]
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


def test_the_table_is_what_was_asked_for() -> None:
    assert set(KNOWN_MODELS) == set(SIZES)
    assert known_model("nobody/nothing") is None


def test_shapes_of_inputs_are_known() -> None:
    shapes = {m.class_name: (m.vae_scale_factor, m.latent_channels, m.text_length) for m in KNOWN_MODELS.values()}
    assert shapes["SD3Transformer2DModel"] == (8, 16, 77 + 256)
    assert shapes["SanaTransformer2DModel"] == (32, 32, 300)
    assert shapes["PixArtTransformer2DModel"] == (8, 4, 300)
    assert shapes["FluxTransformer2DModel"] == (8, 16, 256)
    assert shapes["Gemma2ForCausalLM"][:2] == (None, None)


def test_a_full_size_model_is_quantized_without_memory() -> None:
    model = describe_model("Efficient-Large-Model/Sana_600M_512px_diffusers").build()
    quantize_(model)
    assert sum(layer.weight.numel() for _, layer in quantized_layers(model)) > 0.99 * 589e6


def test_a_pipeline_folder_is_read_without_its_weights() -> None:
    folder = zoo_path("color-digits-sana")
    found = describe_model(str(folder))
    assert (found.library, found.component, found.class_name) == ("diffusers", "transformer", "SanaTransformer2DModel")
    assert (found.vae_scale_factor, found.latent_channels) == (4, 8)
    assert found.build().config.num_layers == 3


def test_a_transformers_folder_is_read(tmp_path: Path) -> None:
    config = {**known_model("google/gemma-2-2b-it").config, "num_hidden_layers": 2, "vocab_size": 100}
    write_json(tmp_path / "config.json", config)
    found = describe_model(str(tmp_path))
    assert (found.library, found.class_name, found.text_length) == ("transformers", "Gemma2ForCausalLM", 8192)
    assert len(found.build().model.layers) == 2


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"block_out_channels": [1, 2, 3, 4]}, 8),
        ({"encoder_block_out_channels": [1, 2, 3, 4, 5, 6]}, 32),
        ({"dim_mult": [1, 2, 4, 4], "z_dim": 16}, 8),
        ({"spatial_compression_ratio": 16, "block_out_channels": [1, 2]}, 16),
        ({}, None),
    ],
)
def test_the_scale_of_latents_is_read_from_the_autoencoder(config, factor: int | None, tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"transformer": ["diffusers", "X"], "vae": ["diffusers", "Y"]})
    write_json(tmp_path / "transformer" / "config.json", {})
    write_json(tmp_path / "vae" / "config.json", config)
    assert describe_model(str(tmp_path)).vae_scale_factor == factor


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither model_index.json nor config.json"),
        ({"config.json": {"model_type": "gemma2"}}, "names no class under `architectures`"),
        ({"config.json": [1]}, "it holds no mapping"),
        ({"model_index.json": {"vae": ["diffusers", "X"]}}, "names no transformer or unet"),
        ({"model_index.json": {"transformer": ["diffusers", "X"]}}, "transformer/config.json is missing"),
    ],
)
def test_folders_that_say_too_little_are_explained(files, message: str, tmp_path: Path) -> None:
    for name, value in files.items():
        write_json(tmp_path / name, value)
    with pytest.raises(ModelError, match=message):
        describe_model(str(tmp_path))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(ModelError, match=r"config\.json cannot be read: .* Fix: copy the model again"):
        describe_model(str(tmp_path))


@pytest.mark.parametrize("source", ["no-such-folder", "/no/such/folder", "./x", "a/b/c"])
def test_neither_folder_nor_hub_id_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder, and it is no hub id"):
        describe_model(source)


def test_known_models_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for hub_id in KNOWN_MODELS:
        assert describe_model(hub_id) is KNOWN_MODELS[hub_id]
    with pytest.raises(AssertionError, match="the hub was asked"):
        describe_model("google/gemma-2-2b-it", revision="main")


def test_of_another_hub_id_only_configurations_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zoo_path("color-digits-sana")
    fetched: list[str] = []

    def download(hub_id: str, name: str, revision: str | None = None) -> str:
        fetched.append(name)
        assert (hub_id, revision) == ("someone/sana", "v1")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert describe_model("someone/sana", "v1").class_name == "SanaTransformer2DModel"
    assert fetched == ["model_index.json", "transformer/config.json", "vae/config.json"]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (LocalEntryNotFoundError("no cache"), "it is not in the local cache, and the hub cannot be reached"),
        (OfflineModeIsEnabled("offline mode is on"), "offline mode is on"),
    ],
)
def test_without_the_hub_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=rf"someone/x/model_index.json cannot be had: {cause}.*give a local folder"):
        describe_model("someone/x")


def test_without_a_network_it_is_said_before_the_library_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.utils.http_backoff", no_network)
    expected = (
        r"model.source = 'someone/x': .* the hub cannot be reached \(no route\).* unset HF_HUB_OFFLINE.*local folder"
    )
    with pytest.raises(ModelError, match=expected):
        describe_model("someone/x")


def test_a_file_that_the_hub_lacks_is_no_error_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(ModelError, match=r"neither model_index\.json nor config\.json"):
        describe_model("someone/empty")


def test_unknown_classes_and_wrong_configurations_are_explained() -> None:
    with pytest.raises(ModelError, match="NoSuchModel is in neither diffusers nor transformers"):
        build_on_meta("NoSuchModel", {})
    with pytest.raises(ModelError, match="SanaTransformer2DModel cannot be built from its configuration"):
        build_on_meta("SanaTransformer2DModel", {"patch_size": "two"})
