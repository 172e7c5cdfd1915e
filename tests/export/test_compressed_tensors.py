"""Laws of the vLLM target: the folder against compressed-tensors' own packing and transformers' own loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.errors import ConfigError, ModelError
from fraqat.export.codes import layer_codes
from fraqat.export.compressed_tensors import CompressedTensorsTarget, pack_int32
from fraqat.export.target import ExportJob, LayerPlace, ModelDescription, Part
from fraqat.nn import quantized_layers
from fraqat.zoo.locate import zoo_path

pytest.importorskip("compressed_tensors")
TARGET = CompressedTensorsTarget()
GROUP = WeightSpec(granularity="group", group_size=32, scale_dtype="bfloat16", range_method="mse")
CHANNEL = WeightSpec(scale_dtype="bfloat16")
A8 = ActivationSpec()
HEAD = LayerRule(pattern="lm_head", skip=True)
PLACE = LayerPlace("model.layers.0.mlp.up_proj", "Linear", (8, 64))
Db = Callable[[Tensor, Tensor], float]


def gemma(**changes: Any) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
        "max_position_embeddings": 64, "attn_implementation": "eager",
    }  # fmt: skip
    return Gemma2ForCausalLM(Gemma2Config(**(settings | changes)))


def exported(
    folder: Path,
    spec: QuantSpec,
    rules: Any = (HEAD,),
    model: nn.Module | None = None,
    origin: Path | None = None,
    **changes: Any,
) -> nn.Module:
    model = gemma() if model is None else model
    quantize_(model, spec, rules=list(rules))
    model.eval()
    folder.mkdir()
    config: Any = getattr(model, "config", None)
    description = ModelDescription(type(model).__name__, config.to_dict() if config else {}, "zoo:tiny")
    TARGET.write(ExportJob(model, lambda: (), description, origin, folder, **{"say": lambda _: None, **changes}))
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def tokens() -> Tensor:
    return torch.randint(0, 128, (3, 12))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 36])
def test_words_are_those_of_the_library(bits: int, width: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, width), dtype=torch.int8)
    assert torch.equal(pack_int32(codes, bits), pack_to_int32(codes, bits))


CASES = {
    "W4A16 groups": (QuantSpec(GROUP, None), [HEAD], 200.0),
    "W4A16 channel": (QuantSpec(CHANNEL, None), [HEAD], 200.0),
    "W4A16 tensor": (QuantSpec(WeightSpec(granularity="tensor", scale_dtype="bfloat16"), None), [HEAD], 200.0),
    "W5.5A16": (QuantSpec(WeightSpec(bits=5.5, scale_dtype="bfloat16"), None), [HEAD], 200.0),
    "W4A8": (QuantSpec(GROUP, A8), [HEAD], 30.0),
    "mixed": (
        QuantSpec(GROUP, A8),
        [LayerRule(pattern="*mlp*", spec=QuantSpec(CHANNEL, None)), LayerRule(pattern="*1.mlp*", skip=True), HEAD],
        30.0,
    ),
}
"""The library divides by 127.5 where training and vLLM divide by 127, so that with A8 transformers differs a little."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_the_folder_and_computes_the_student(tmp_path: Path, name: str, sqnr_db: Db) -> None:
    from transformers import AutoModelForCausalLM

    spec, rules, bound = CASES[name]
    student = exported(tmp_path / "v", spec, rules)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "v", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    x = tokens()
    assert sqnr_db(logits(student, x), logits(loaded, x)) > bound
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits


@pytest.mark.parametrize("name", CASES)
def test_an_opened_folder_computes_the_student(tmp_path: Path, name: str, sqnr_db: Db) -> None:
    spec, rules, _ = CASES[name]
    student = exported(tmp_path / "v", spec, rules)
    opened = TARGET.open(tmp_path / "v", student)
    codes, expected = opened.codes(), layer_codes(student)
    assert list(codes) == list(expected)
    assert all(torch.equal(codes[n], c.codes) for n, c in expected.items())
    x = tokens()
    part = Part("language_model", Logits(student), ("logits",), lambda: (), {})
    found = opened.run(part, {"input_ids": x})
    assert sqnr_db(logits(student, x), found.outputs["logits"]) > TARGET.bound.sqnr_db
    with torch.no_grad():
        for layer_name, layer in quantized_layers(student):
            value = layer(found.layer_inputs[layer_name])
            assert sqnr_db(value, found.layers[layer_name]) > TARGET.bound.layer_sqnr_db


def test_a_scale_one_percent_off_and_a_code_one_off_are_noticed(tmp_path: Path, sqnr_db: Db) -> None:
    student = exported(tmp_path / "v", QuantSpec(GROUP, A8))
    path, name = tmp_path / "v" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    x = tokens()
    part = Part("language_model", Logits(student), ("logits",), lambda: (), {})
    wrong = {**tensors, f"{name}.weight_scale": tensors[f"{name}.weight_scale"] * 1.01}
    save_file(wrong, path)
    found = TARGET.open(tmp_path / "v", student).run(part, {"input_ids": x})
    with torch.no_grad():
        value = student.get_submodule(name)(found.layer_inputs[name])
    assert sqnr_db(value, found.layers[name]) < TARGET.bound.layer_sqnr_db
    packed = tensors[f"{name}.weight_packed"].clone()
    packed[0, 0] ^= 1
    save_file({**tensors, f"{name}.weight_packed": packed}, path)
    codes = TARGET.open(tmp_path / "v", student).codes()
    assert int((codes[name] != layer_codes(student)[name].codes).sum()) == 1


def test_the_config_names_schemes_and_float_layers(tmp_path: Path) -> None:
    exported(tmp_path / "a", QuantSpec(GROUP, A8))
    config = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    found = config["quantization_config"]
    assert config["architectures"] == ["Gemma2ForCausalLM"] and config["dtype"] == "float32"
    assert (found["quant_method"], found["format"], found["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    group = found["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["strategy"] == "group" and group["weights"]["group_size"] == 32
    assert group["input_activations"]["strategy"] == "token" and group["input_activations"]["dynamic"]
    exported(tmp_path / "b", *CASES["mixed"][:2])
    found = json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert len(found["config_groups"]) == 2
    assert sorted(found["ignore"]) == ["lm_head", *(f"model.layers.1.mlp.{n}_proj" for n in ("down", "gate", "up"))]


def test_bfloat16_loses_nothing_of_codes_and_scales(tmp_path: Path) -> None:
    student = exported(tmp_path / "v", QuantSpec(GROUP, A8), float_dtype="bfloat16")
    tensors = load_file(tmp_path / "v" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    scale = layer_codes(student)[name].qparams.scale.flatten(1)
    assert tensors[f"{name}.weight_scale"].dtype is torch.bfloat16
    assert torch.equal(tensors[f"{name}.weight_scale"].float(), scale)
    assert tensors[f"{name}.weight_packed"].dtype is torch.int32
    assert tensors[f"{name}.weight_shape"].tolist() == [96, 64]
    assert "lm_head.weight" not in tensors


def test_the_tokenizer_is_copied_or_missed_aloud(tmp_path: Path) -> None:
    exported(tmp_path / "a", QuantSpec(GROUP, A8), origin=zoo_path("topics-gemma2"))
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    said: list[str] = []
    exported(tmp_path / "b", QuantSpec(GROUP, A8), say=said.append)
    assert "--tokenizer" in said[-1]


NEAREST = {
    "as it is": (QuantSpec(GROUP, A8), {}, {}),
    "8 bits": (QuantSpec(WeightSpec(bits=8, scale_dtype="bfloat16"), A8), {}, {}),
    "weight only": (QuantSpec(GROUP, None), {}, None),
    "16-bit inputs": (QuantSpec(GROUP, ActivationSpec(bits=16)), {}, None),
    "float32 scale": (QuantSpec(WeightSpec(), A8), {"scale_dtype": "bfloat16"}, {}),
    "groups of 16": (QuantSpec(WeightSpec(granularity="group", group_size=16, scale_dtype="bfloat16"), A8),
                     {"group_size": 32}, {}),
    "asymmetric": (QuantSpec(WeightSpec(symmetric=False, scale_dtype="bfloat16"), A8), {"symmetric": True}, {}),
    "static": (
        QuantSpec(GROUP, ActivationSpec(granularity="tensor", static=True, symmetric=False)),
        {},
        {"granularity": "token", "static": False, "symmetric": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAREST)
def test_nearest_changes_only_what_vllm_cannot_compute(name: str) -> None:
    spec, weight, activation = NEAREST[name]
    found = TARGET.nearest(PLACE, spec)
    assert found is not None
    for field in spec.weight.__dataclass_fields__:
        assert getattr(found.weight, field) == weight.get(field, getattr(spec.weight, field))
    if activation is None or spec.activation is None:
        assert found.activation is None
    else:
        assert found.activation is not None
        for field in spec.activation.__dataclass_fields__:
            assert getattr(found.activation, field) == activation.get(field, getattr(spec.activation, field))
    assert TARGET.nearest(PLACE, found) == found


def test_the_head_and_convolutions_stay_float() -> None:
    assert TARGET.nearest(LayerPlace("lm_head", "Linear", (8, 64)), QuantSpec()) is None
    assert TARGET.nearest(LayerPlace("a", "PointwiseConv", (8, 64, 1, 1)), QuantSpec()) is None


@pytest.mark.parametrize(
    ("spec", "rules", "message"),
    [
        (QuantSpec(WeightSpec(), A8), [HEAD], r"self_attn\.q_proj\.weight\.scale = .* scale_dtype: bfloat16"),
        (QuantSpec(WeightSpec(symmetric=False), A8), [HEAD], r"q_proj = 'Linear' .* symmetric"),
        (
            QuantSpec(GROUP, A8),
            [LayerRule(pattern="*0.self_attn.k_proj", skip=True), HEAD],
            r"0\.self_attn\.k_proj = 'floating point' .* vLLM joins them",
        ),
    ],
)
def test_what_vllm_cannot_hold_is_refused(tmp_path: Path, spec: QuantSpec, rules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        exported(tmp_path / "v", spec, rules)


def test_other_models_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model = 'Sequential' .*ForCausalLM"):
        exported(tmp_path / "a", QuantSpec(GROUP, A8), (), nn.Sequential(nn.Linear(32, 32)))
    student = exported(tmp_path / "v", QuantSpec(GROUP, A8))
    path = tmp_path / "v" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.0\.mlp\.up_proj\.weight_scale'"):
        TARGET.open(tmp_path / "v", student)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="no compressed-tensors folder"):
        TARGET.open(tmp_path / "v", student)
