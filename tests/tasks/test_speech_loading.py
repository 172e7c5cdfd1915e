"""Laws of loading text-to-speech models: the same path for folders and the hub, safe files only, errors that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fraqat.errors import ModelError
from fraqat.tasks.spec import ModelSpec
from fraqat.tasks.speech_loading import build_speech_model, load_speech_model

SIZES: dict[str, dict[str, Any]] = {
    "SpeechT5ForTextToSpeech": {
        "hidden_size": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "speech_decoder_prenet_units": 32,
        "speech_decoder_postnet_units": 32,
        "speaker_embedding_dim": 8,
    },
    "FastSpeech2ConformerModel": {
        "hidden_size": 32,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_linear_units": 32,
        "decoder_linear_units": 32,
        "speech_decoder_postnet_units": 32,
        "duration_predictor_channels": 32,
        "energy_predictor_channels": 32,
        "pitch_predictor_channels": 32,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    build_speech_model("SpeechT5ForTextToSpeech", SIZES["SpeechT5ForTextToSpeech"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("class_name", list(SIZES))
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_a_saved_model_is_loaded_as_it_was(class_name: str, shard_size: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    built: Any = build_speech_model(class_name, SIZES[class_name])
    built.bfloat16().save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    loaded = load_speech_model(ModelSpec(str(tmp_path), device="cpu")).model
    assert type(loaded) is type(built)
    assert not loaded.training
    for name, value in built.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == (torch.float32 if value.is_floating_point() else value.dtype)
        assert torch.equal(other, value.to(other.dtype)), name


def test_the_precision_is_the_one_asked_for(folder: Path) -> None:
    model = load_speech_model(ModelSpec(str(folder), device="cpu"), torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        load_speech_model(ModelSpec(str(folder)))


def test_truncated_weights_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or damaged"):
        load_speech_model(ModelSpec(str(folder)))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_speech_model(ModelSpec(str(tmp_path)))
    with pytest.raises(ModelError, match="there is no such folder"):
        load_speech_model(ModelSpec(str(tmp_path / "none")))


def test_a_model_of_another_kind_says_what_to_add(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["SpeechT5ForSpeechToText"]}))
    with pytest.raises(ModelError, match=r"class SpeechT5ForSpeechToText has no entry .* SPEECH_ARCHITECTURES"):
        load_speech_model(ModelSpec(str(folder)))


def test_a_tokenizer_whose_package_is_missing_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_package(*arguments: Any, **settings: Any) -> None:
        raise ImportError("SpeechT5Tokenizer requires the SentencePiece library")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", needs_package)
    loaded = load_speech_model(ModelSpec(str(folder), device="cpu"))
    with pytest.raises(ModelError, match="pip install sentencepiece"):
        loaded.tokenize(["a"])


def test_a_hub_id_is_loaded_by_revision_and_from_safetensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def config(source: str, **settings: Any) -> Any:
        return transformers.SpeechT5Config(architectures=["SpeechT5ForTextToSpeech"])

    def offline(source: str, **settings: Any) -> None:
        seen.update(settings, source=source)
        raise OSError("nobody/nothing is not a valid model identifier\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    monkeypatch.setattr(transformers.SpeechT5ForTextToSpeech, "from_pretrained", offline)
    with pytest.raises(ModelError, match="'nobody/nothing' cannot be loaded"):
        load_speech_model(ModelSpec("nobody/nothing", revision="abc", variant="fp16"))
    assert seen["use_safetensors"] is True
    assert (seen["source"], seen["revision"], seen["variant"]) == ("nobody/nothing", "abc", "fp16")
