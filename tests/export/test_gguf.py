"""Laws of the GGUF target: Q4_0 bytes against the `gguf` package, names against diffusers' own converters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.errors import ConfigError, FraqatError, ModelError
from fraqat.export.codes import layer_codes
from fraqat.export.gguf import FILE, GgufTarget, file_tensors
from fraqat.export.gguf_blocks import dequantize_q4_0, pack_q4_0, round_to_q8_0, unpack_q4_0
from fraqat.export.target import ExportJob, LayerPlace, ModelDescription, Part
from fraqat.nn import quantized_layers
from fraqat.zoo.locate import zoo_path

gguf = pytest.importorskip("gguf")
TARGET = GgufTarget()
SPEC = QuantSpec(WeightSpec(granularity="group", group_size=32, scale_dtype="float16"), ActivationSpec())
PLACE = LayerPlace("blocks.0.fc", "Linear", (8, 64))
Db = Callable[[Tensor, Tensor], float]


def codes_and_scale(num_blocks: int = 5) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-8, 8, (6, 32 * num_blocks), dtype=torch.int8)
    return codes, (0.001 + torch.rand(6, num_blocks)).bfloat16().float()


def test_q4_0_is_what_the_gguf_package_reads() -> None:
    codes, scale = codes_and_scale()
    packed = pack_q4_0(codes, scale, "layer")
    theirs = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_0))
    assert torch.equal(theirs, codes * scale.repeat_interleave(32, dim=1))
    assert torch.equal(dequantize_q4_0(codes, scale), theirs)
    assert packed.shape == (6, 5 * 18)


@given(st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_q4_0_comes_back(num_blocks: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes, scale = codes_and_scale(num_blocks)
    found_codes, found_scale = unpack_q4_0(pack_q4_0(codes, scale, "layer"))
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_scale, torch.where((codes.unflatten(1, (-1, 32)) != 0).any(-1), scale, 0))


def test_trained_float16_scales_fit_whatever_the_weights_are() -> None:
    layer = nn.Sequential(nn.Linear(64, 4))
    with torch.no_grad():
        layer[0].weight.mul_(torch.tensor([1e-30, 1e-6, 1.0, 1e7]).unsqueeze(1))
    quantize_(layer, SPEC)
    found = layer_codes(layer)["0"]
    scale_OB = found.qparams.scale.flatten(1)
    packed = pack_q4_0(found.codes, scale_OB, "0")
    weight = layer[0].weight_quantizer(layer[0].weight)
    assert torch.equal(dequantize_q4_0(*unpack_q4_0(packed)), weight)


def test_the_comparison_notices_swapped_nibbles_and_a_scale_one_percent_off(sqnr_db: Db) -> None:
    codes, scale = codes_and_scale()
    packed = pack_q4_0(codes, scale, "layer")
    wrong = packed.clone()
    wrong[0, 2] = (wrong[0, 2] >> 4) | (wrong[0, 2] << 4)
    assert (unpack_q4_0(wrong)[0] != codes).sum() in (0, 2)
    assert not torch.equal(unpack_q4_0(pack_q4_0(codes.flip(1), scale, "layer"))[0], codes)
    with pytest.raises(ConfigError, match="float16"):
        pack_q4_0(codes, scale * 1.01, "layer")
    assert sqnr_db(dequantize_q4_0(codes, scale), dequantize_q4_0(codes, scale * 1.01)) < 41


def test_a_block_of_zeros_may_have_any_scale() -> None:
    packed = pack_q4_0(torch.zeros(1, 32, dtype=torch.int8), torch.tensor([[1.2e-30]]), "layer")
    assert torch.equal(dequantize_q4_0(*unpack_q4_0(packed)), torch.zeros(1, 32))


@pytest.mark.parametrize(
    ("codes", "scale", "message"),
    [
        (torch.full((1, 32), 8), 1.0, r"layer\.codes = \[8, 8\] .* -8 to 7.*4 bits"),
        (torch.ones(1, 40), 1.0, r"layer\.in_features = 40 .* multiples of 32"),
        (torch.ones(1, 32), 1e-9, r"layer\.weight\.scale = 9\.99.*e-10 .* scale_dtype: float16"),
        (torch.ones(1, 32), 1e6, r"layer\.weight\.scale = 1000000\.0 .* float16"),
    ],
)
def test_what_a_block_cannot_hold_is_refused(codes: Tensor, scale: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack_q4_0(codes.to(torch.int8), torch.full((1, codes.shape[1] // 32), scale), "layer")


def test_inputs_are_rounded_as_q8_0() -> None:
    x = torch.randn(7, 96) * 10
    x[0, :32] = 0
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))
    assert torch.equal(round_to_q8_0(x), theirs)


WEIGHTS = {
    "group of 32": (WeightSpec(granularity="group", group_size=32, scale_dtype="float16"), {}),
    "group of 64": (WeightSpec(granularity="group", group_size=64, scale_dtype="float16"), {}),
    "channel": (WeightSpec(scale_dtype="float16"), {}),
    "learned": (WeightSpec(scale_dtype="float16", range_method="learned"), {}),
    "3.5 bits": (WeightSpec(bits=3.5, scale_dtype="float16"), {}),
    "float16 scale": (WeightSpec(scale_dtype="float16"), {}),
    "bfloat16 scale": (WeightSpec(scale_dtype="bfloat16"), {"scale_dtype": "float16"}),
    "float32 scale": (WeightSpec(), {"scale_dtype": "float16"}),
    "8 bits": (WeightSpec(bits=8, scale_dtype="float16"), {"bits": 4}),
    "asymmetric": (WeightSpec(symmetric=False, scale_dtype="float16"), {"symmetric": True}),
    "group of 16": (WeightSpec(granularity="group", group_size=16, scale_dtype="float16"), {"group_size": 32}),
    "integer scales": (
        WeightSpec(granularity="group", group_size=32, scale_dtype="float16", group_scale="integer"),
        {"group_scale": "float"},
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_nearest_changes_only_what_q4_0_cannot_hold(name: str) -> None:
    weight, changes = WEIGHTS[name]
    found = TARGET.nearest(PLACE, QuantSpec(weight))
    assert found is not None
    assert found.activation == ActivationSpec()
    assert {k: getattr(found.weight, k) for k in changes} == changes
    same = [f for f in weight.__dataclass_fields__ if f not in changes]
    assert all(getattr(found.weight, f) == getattr(weight, f) for f in same)
    assert TARGET.nearest(PLACE, found) == found


def test_nearest_of_inputs_and_of_other_layers() -> None:
    static = ActivationSpec(granularity="tensor", static=True, symmetric=False)
    found = TARGET.nearest(PLACE, QuantSpec(SPEC.weight, static))
    assert found is not None and found.activation == ActivationSpec()
    for activation in (None, ActivationSpec(bits=16)):
        found = TARGET.nearest(PLACE, QuantSpec(SPEC.weight, activation))
        assert found is not None and found.activation is None
    for name, kind, shape in (
        ("a", "PointwiseConv", (8, 64, 1, 1)),
        ("a", "Linear", (8, 40)),
        ("lm_head", "Linear", (8, 64)),
    ):
        assert TARGET.nearest(LayerPlace(name, kind, shape), SPEC) is None


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4, pos_embed_max_size=4,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


def exported(
    model: nn.Module,
    folder: Path,
    spec: QuantSpec = SPEC,
    *,
    rules: Any = (),
    origin: Path | None = None,
    **changes: Any,
) -> nn.Module:
    quantize_(model, spec, rules=list(rules))
    model.eval()
    folder.mkdir()
    config: Any = getattr(model, "config", {})
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    description = ModelDescription(type(model).__name__, settings | changes.pop("config", {}), "zoo:tiny")
    TARGET.write(ExportJob(model, lambda: (), description, origin, folder, say=lambda _: None, **changes))
    return model


def file_values(path: Path) -> dict[str, Tensor]:
    return {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(path).tensors
    }


def effective_weights(student: nn.Module) -> dict[str, Tensor]:
    """The student's tensors with the weights that it multiplies with."""
    layers = dict(quantized_layers(student))
    state = {n: t for n, t in student.state_dict().items() if "_quantizer." not in n}
    with torch.no_grad():
        return state | {f"{n}.weight": layer.weight_quantizer(layer.weight) for n, layer in layers.items()}


@pytest.mark.parametrize(
    ("build", "converter", "architecture"),
    [
        (sd3, "convert_sd3_transformer_checkpoint_to_diffusers", "sd3"),
        (flux, "convert_flux_transformer_checkpoint_to_diffusers", "flux"),
    ],
)
def test_diffusers_reads_the_names_and_the_weights_back(
    tmp_path: Path,
    build: Callable[[], nn.Module],
    converter: str,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers.loaders import single_file_utils

    split = torch.split

    def scaled_split(tensor: Tensor, sizes: Any, dim: int = 0) -> Any:  # diffusers knows FLUX's own width alone
        unit = sum(sizes) // tensor.shape[dim] if isinstance(sizes, tuple) else 1
        return split(tensor, [size // unit for size in sizes] if unit > 1 else sizes, dim)

    monkeypatch.setattr(torch, "split", scaled_split)
    student = exported(build(), tmp_path / "g")
    values = file_values(tmp_path / "g" / FILE)
    assert all(name.startswith("model.diffusion_model.") for name in values)
    theirs = getattr(single_file_utils, converter)(
        {n.removeprefix("model.diffusion_model."): t for n, t in values.items()}
    )
    ours = effective_weights(student)
    assert set(theirs) == set(ours)
    assert not [name for name in ours if not torch.equal(theirs[name], ours[name])]
    field = gguf.GGUFReader(tmp_path / "g" / FILE).fields["general.architecture"]
    assert field.contents() == architecture


def inputs_of(student: nn.Module) -> dict[str, Tensor]:
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([0.9, 0.2]),
    }
    if type(student).__name__ == "FluxTransformer2DModel":
        inputs |= {"hidden_states": torch.randn(2, 6, 32), "pooled_projections": torch.randn(2, 32)}
        inputs |= {"guidance": torch.ones(2), "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}
    return inputs


class FirstOutput(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("build", [sd3, flux])
def test_an_opened_file_has_the_codes_and_computes_the_student(
    tmp_path: Path, build: Callable[[], nn.Module], sqnr_db: Db
) -> None:
    student = exported(build(), tmp_path / "g")
    opened = TARGET.open(tmp_path / "g", student)
    codes = opened.codes()
    expected = layer_codes(student)
    assert list(codes) == list(expected)
    assert all(torch.equal(codes[name], expected[name].codes) for name in codes)
    part = Part("transformer", FirstOutput(student), ("sample",), lambda: (), {})
    inputs = inputs_of(student)
    found = opened.run(part, inputs)
    with torch.no_grad():
        assert sqnr_db(part.module(**inputs), found.outputs["sample"]) > TARGET.bound.sqnr_db
        for name, layer in quantized_layers(student):
            assert sqnr_db(layer(found.layer_inputs[name]), found.layers[name]) > TARGET.bound.layer_sqnr_db


def test_bfloat16_of_the_rest_leaves_codes_and_vectors_alone(tmp_path: Path) -> None:
    student = exported(
        flux(), tmp_path / "g", rules=[LayerRule(pattern="x_embedder", skip=True)], float_dtype="bfloat16"
    )
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "g" / FILE).tensors}
    assert types["model.diffusion_model.img_in.weight"] == "BF16"
    assert {kind for name, kind in types.items() if not name.endswith(".weight")} == {"F32"}
    opened = TARGET.open(tmp_path / "g", student)
    assert all(torch.equal(opened.codes()[n], c.codes) for n, c in layer_codes(student).items())


def test_one_of_three_joined_layers_in_floating_point_is_refused(tmp_path: Path) -> None:
    rule = LayerRule(pattern="transformer_blocks.0.attn.to_k", skip=True)
    with pytest.raises(ConfigError, match=r"transformer_blocks\.0\.attn\.to_k = 'in floating point' .*img_attn\.qkv"):
        exported(flux(), tmp_path / "g", rules=[rule])


@pytest.mark.parametrize("rules", [(), (LayerRule(pattern="transformer_blocks.0.attn.to_*", skip=True),)])
def test_joined_layers_of_other_widths_are_refused(tmp_path: Path, rules: Any) -> None:
    model = flux()
    model.get_submodule("transformer_blocks.0.attn").to_k = nn.Linear(64, 32)
    with pytest.raises(
        ConfigError, match=r"to_q\.weight and .*to_k\.weight.*\[\[32\], \[64\], \[32\]\].*img_attn\.qkv"
    ):
        exported(model, tmp_path / "g", rules=rules)


def test_other_models_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model = 'Sequential' .* Gemma2ForCausalLM, SD3Transformer2DModel, Flux"):
        exported(nn.Sequential(nn.Linear(32, 32)), tmp_path / "g")
    with pytest.raises(ConfigError, match=r"tensor = 'controlnet\.weight' .* another target"):
        file_tensors("FluxTransformer2DModel", ["x_embedder.weight", "x_embedder.bias", "controlnet.weight"])


def gemma(**changes: Any) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
        "max_position_embeddings": 64, "attn_implementation": "eager",
    }  # fmt: skip
    return Gemma2ForCausalLM(Gemma2Config(**(settings | changes)))


HEAD = [LayerRule(pattern="lm_head", skip=True)]
ORIGIN = zoo_path("topics-gemma2")


def test_gemma2_has_the_names_settings_and_vocabulary_of_llama_cpp(tmp_path: Path) -> None:
    model = gemma()
    with torch.no_grad():
        model.model.norm.weight.normal_()
    student = exported(model, tmp_path / "g", rules=HEAD, origin=ORIGIN)
    reader = gguf.GGUFReader(tmp_path / "g" / FILE)
    values = file_values(tmp_path / "g" / FILE)
    arch = gguf.MODEL_ARCH.GEMMA2
    wanted = {gguf.TENSOR_NAMES[kind].format(bid=i) + ".weight" for kind in gguf.MODEL_TENSORS[arch] for i in range(2)}
    assert set(values) == wanted - {"rope_freqs.weight", "output.weight"}
    ours = effective_weights(student)
    assert torch.equal(values["output_norm.weight"], 1 + ours["model.norm.weight"])
    assert torch.equal(values["blk.1.ffn_down.weight"], ours["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(values["token_embd.weight"], ours["model.embed_tokens.weight"])
    settings = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert settings["general.architecture"] == "gemma2"
    assert settings["gemma2.attention.sliding_window"] == 8
    assert settings["gemma2.attention.key_length"] == 32
    assert settings["tokenizer.ggml.model"] == "gpt2"
    assert len(settings["tokenizer.ggml.tokens"]) == 1024
    assert settings["tokenizer.ggml.bos_token_id"] == 2
    assert settings["tokenizer.ggml.eos_token_id"] == 1
    tokenizer = json.loads((ORIGIN / "tokenizer.json").read_text(encoding="utf-8"))
    assert settings["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]


def test_an_opened_gemma2_computes_the_student(tmp_path: Path, sqnr_db: Db) -> None:
    student = exported(gemma(), tmp_path / "g", rules=HEAD, origin=ORIGIN)
    opened = TARGET.open(tmp_path / "g", student)
    part = Part("language_model", FirstOutput(student), ("logits",), lambda: (), {})
    inputs = {"input_ids": torch.randint(3, 1024, (2, 12))}
    with torch.no_grad():
        expected = part.module(**inputs)
    assert sqnr_db(expected, opened.run(part, inputs).outputs["logits"]) > TARGET.bound.sqnr_db
    assert all(torch.equal(opened.codes()[n], c.codes) for n, c in layer_codes(student).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query_pre_attn_scalar": 16}, r"config\.query_pre_attn_scalar = 16\.0 .* 32\.0 in llama\.cpp"),
        ({"hidden_activation": "silu"}, r"config\.hidden_activation = 'silu'"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight = 'weights of its own' .* embeddings"),
    ],
)
def test_what_llama_cpp_computes_in_another_way_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        exported(gemma(**settings), tmp_path / "g", rules=HEAD, origin=ORIGIN)


def test_a_missing_or_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer of zoo:tiny is not on this machine"):
        exported(gemma(), tmp_path / "a", rules=HEAD)
    (tmp_path / "o").mkdir()
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        exported(gemma(), tmp_path / "b", rules=HEAD, origin=tmp_path / "o")
    (tmp_path / "o" / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer = 'WordLevel after None' .* SentencePiece"):
        exported(gemma(), tmp_path / "c", rules=HEAD, origin=tmp_path / "o")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": None}, r"config\.sliding_window = None .* whole numbers from 1 to 2\^32 - 1"),
        ({"max_position_embeddings": 2**32}, r"config\.max_position_embeddings = 4294967296 "),
        ({"rms_norm_eps": "x"}, r"config\.rms_norm_eps = 'x' .* numbers that float32 holds"),
        ({"final_logit_softcapping": float("nan")}, r"config\.final_logit_softcapping = nan "),
        ({"rope_parameters": ["x"]}, r"config\.rope_parameters = \['x'\] .* a mapping"),
        ({"layer_types": ["sliding_attention"]}, r"config\.layer_types = "),
        ({"bos_token_id": -1}, r"a name or a setting of zoo:tiny cannot be written to model\.gguf"),
    ],
)
def test_a_configuration_that_a_file_cannot_hold_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    origin = tmp_path / "o"
    origin.mkdir()
    (origin / "tokenizer.json").write_text((ORIGIN / "tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(FraqatError, match=message):
        exported(gemma(), tmp_path / "g", rules=HEAD, origin=origin, config=changes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 4000}}, "pre_tokenizer": {"type": "ByteLevel"}}'),
        ("tokenizer_config.json", "{x"),
        ("tokenizer.model", "x"),
    ],
)
def test_damaged_files_of_a_tokenizer_are_named(tmp_path: Path, name: str, content: str) -> None:
    origin = tmp_path / "o"
    origin.mkdir()
    (origin / "tokenizer.json").write_text((ORIGIN / "tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
    (origin / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"the tokenizer in .*/o cannot be read .* whole folder"):
        exported(gemma(), tmp_path / "g", rules=HEAD, origin=origin)


def test_sentencepiece_keeps_pieces_scores_and_kinds(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    origin = tmp_path / "o"
    origin.mkdir()
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        f"--input={tmp_path / 'text'} --model_prefix={origin / 'tokenizer'} --vocab_size=320 --model_type=bpe "
        "--byte_fallback=true --pad_id=0 --eos_id=1 --bos_id=2 --unk_id=3 --hard_vocab_limit=false "
        "--minloglevel=2"
    )
    exported(gemma(), tmp_path / "g", rules=HEAD, origin=origin)
    fields = gguf.GGUFReader(tmp_path / "g" / FILE).fields
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(origin / "tokenizer.model"))
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: len(pieces)] == [pieces.IdToPiece(i) for i in range(len(pieces))]
    assert len(tokens) == 1024 and tokens[-1] == "[PAD1023]"
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[2] == gguf.TokenType.CONTROL and types[3] == gguf.TokenType.UNKNOWN
    assert types[pieces.PieceToId("<0x41>")] == gguf.TokenType.BYTE
    assert types[-1] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.model"].contents() == "llama"


def test_a_changed_or_cut_file_is_noticed(tmp_path: Path) -> None:
    student = exported(flux(), tmp_path / "g")
    path = tmp_path / "g" / FILE
    place = next(t for t in gguf.GGUFReader(path).tensors if t.name.endswith("double_blocks.0.img_attn.qkv.weight"))
    content = bytearray(path.read_bytes())
    content[place.data_offset + 2] ^= 1  # a code one off
    path.write_bytes(content)
    found = TARGET.open(tmp_path / "g", student).codes()
    wrong = {name: int((found[name] != c.codes).sum()) for name, c in layer_codes(student).items()}
    assert {name: n for name, n in wrong.items() if n} == {"transformer_blocks.0.attn.to_q": 1}
    path.write_bytes(content[:100])
    with pytest.raises(ModelError, match="no GGUF file"):
        TARGET.open(tmp_path / "g", student)


def test_llama_cpp_computes_the_opened_file(tmp_path: Path, sqnr_db: Db) -> None:
    """In a real llama.cpp, where one is installed; `benchmarks/llama_cpp_logits.py` runs it from another environment."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ORIGIN, dtype=torch.float32)
    student = exported(model, tmp_path / "g", rules=HEAD, origin=ORIGIN)
    text = "The if statement is used for conditional execution: it selects exactly one of the suites"
    ids = AutoTokenizer.from_pretrained(ORIGIN)(text).input_ids
    llama = llama_cpp.Llama(str(tmp_path / "g" / FILE), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    assert llama.tokenize(text.encode(), add_bos=True) == ids
    llama.eval(ids)
    theirs = torch.tensor(llama.scores[: len(ids)])
    llama.close()
    part = Part("language_model", FirstOutput(student), ("logits",), lambda: (), {})
    found = TARGET.open(tmp_path / "g", student).run(part, {"input_ids": torch.tensor([ids])}).outputs["logits"][0]
    with torch.no_grad():
        assert sqnr_db(student(torch.tensor([ids])).logits[0], theirs) > TARGET.bound.sqnr_db
    assert sqnr_db(found, theirs) > 45  # llama.cpp keeps keys and values in float16, and its GELU is a table
