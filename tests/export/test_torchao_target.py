"""Laws of the torchao folder: our integers, loaded by diffusers and transformers, computed by torchao."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.errors import ConfigError, ModelError
from fraqat.export import ModelDescription
from fraqat.export.codes import layer_codes
from fraqat.export.target import ExportJob, LayerPlace, Part
from fraqat.export.torchao_target import TorchaoTarget
from fraqat.export.torchao_tensors import stored_codes
from fraqat.nn import quantized_layers
from fraqat.zoo import zoo_path

TARGET = TorchaoTarget()
INPUTS = ActivationSpec(**TARGET.defaults["activation"])
PLACE = LayerPlace("a", "Linear", (96, 64))
WEIGHTS = {
    "default": WeightSpec(**TARGET.defaults["weight"]),
    "mse": WeightSpec(range_method="mse"),
    "group": WeightSpec(granularity="group", group_size=32, scale_dtype="bfloat16"),
    "integer group": WeightSpec(granularity="group", group_size=32, group_scale="integer", range_method="mse"),
    "tensor": WeightSpec(granularity="tensor"),
    "5.5 bits": WeightSpec(bits=5.5),
    "narrow": WeightSpec(narrow=True),
    "8 bits": WeightSpec(bits=8),
}


@pytest.fixture(autouse=True)
def _quiet_loaders() -> Iterator[None]:
    """diffusers logs about float32 with integers, which is what we want."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64))
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 33, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.silu(self.a(x + self.table)))


def student(spec: QuantSpec) -> nn.Module:
    model = Toy()
    quantize_(model, spec)
    return model.eval()


def job(model: nn.Module, folder: Path, origin: Path | None = None) -> ExportJob:
    folder.mkdir()
    description = ModelDescription("Toy", {"width": 64}, "zoo:none")
    return ExportJob(model, lambda: (), description, origin, folder, say=lambda _: None)


def part(model: nn.Module) -> Part:
    return Part("toy", model, ("y",), lambda: [{"x": torch.randn(3, 5, 64)}], {"x": {0: "batch"}})


@pytest.mark.parametrize("inputs", [INPUTS, None], ids=["W4A8", "weight only"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_integers_and_outputs_are_the_students(tmp_path: Path, name: str, inputs: ActivationSpec | None) -> None:
    model = student(QuantSpec(WEIGHTS[name], inputs))
    assert all(TARGET.nearest(PLACE, layer.spec) == layer.spec for _, layer in quantized_layers(model))
    TARGET.write(job(model, tmp_path / "e"))
    opened = TARGET.open(tmp_path / "e", model)
    codes = opened.codes()
    for key, layer in layer_codes(model).items():
        assert torch.equal(codes[key], layer.codes)
    call = part(model).batches()[0]
    found = opened.run(part(model), call)
    with torch.no_grad():
        assert torch.equal(found.outputs["y"], model(**call))
    assert set(found.layers) == {"a", "b"}


def test_a_wrong_scale_is_below_the_bound(tmp_path: Path, sqnr_db: Callable[[Tensor, Tensor], float]) -> None:
    model = student(QuantSpec(WEIGHTS["mse"], INPUTS))
    TARGET.write(job(model, tmp_path / "e"))
    path = tmp_path / "e" / "diffusion_pytorch_model.safetensors"
    path = path if path.is_file() else tmp_path / "e" / "model.safetensors"
    tensors = load_file(path)
    tensors["a._weight_scale"] *= 1.01
    tensors["b._weight_qdata"][0, 0] ^= 1
    save_with_metadata_of(path, tensors)
    opened = TARGET.open(tmp_path / "e", model)
    differing = {key: int((opened.codes()[key] != layer.codes).sum()) for key, layer in layer_codes(model).items()}
    assert differing == {"a": 0, "b": 1}
    call = part(model).batches()[0]
    with torch.no_grad():
        ratio = sqnr_db(model(**call), opened.run(part(model), call).outputs["y"])
    assert ratio < 60 < TARGET.bound.sqnr_db


def save_with_metadata_of(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (QuantSpec(), {"activation": INPUTS}),
        (QuantSpec(activation=ActivationSpec(bits=16)), {"activation": None}),
        (
            QuantSpec(activation=ActivationSpec(static=True, granularity="tensor", symmetric=False)),
            {"activation": INPUTS},
        ),
        (QuantSpec(WeightSpec(bits=12), None), {"weight": WeightSpec(bits=8)}),
        (QuantSpec(WeightSpec(symmetric=False), None), {"weight": WeightSpec()}),
    ],
)
def test_nearest_changes_only_what_torchao_cannot_compute(spec: QuantSpec, changes: dict[str, object]) -> None:
    nearest = TARGET.nearest(PLACE, spec)
    assert nearest == dataclasses.replace(spec, **changes)
    assert TARGET.nearest(PLACE, nearest) == nearest


def test_a_convolution_stays_in_floating_point_and_is_refused_if_quantized(tmp_path: Path) -> None:
    assert TARGET.nearest(LayerPlace("c", "PointwiseConv", (8, 8, 1, 1)), QuantSpec()) is None
    model = nn.Sequential(nn.Conv2d(8, 8, 1))
    quantize_(model, QuantSpec(activation=INPUTS))
    with pytest.raises(ConfigError, match=r"0\.type = 'PointwiseConv' is not possible.*skip: true"):
        TARGET.write(job(model.eval(), tmp_path / "e"))


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    model = student(QuantSpec(activation=INPUTS))
    TARGET.write(job(model, tmp_path / "e"))
    path = next((tmp_path / "e").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        TARGET.open(tmp_path / "e", model)


@pytest.mark.parametrize("is_on_hub", [False, True])
def test_diffusers_loads_it_and_computes_the_student(tmp_path: Path, is_on_hub: bool) -> None:
    """Without a folder of the original, as with a hub id, the description alone says whose file it is."""
    from diffusers import SanaTransformer2DModel

    from fraqat.tasks.pipelines import transformer_description

    origin = zoo_path("color-digits-sana")
    model = SanaTransformer2DModel.from_pretrained(origin / "transformer", torch_dtype=torch.float32)
    rules = [LayerRule(module_type="PointwiseConv", skip=True)]
    quantize_(model, QuantSpec(WEIGHTS["default"], INPUTS), rules=rules)
    description = ModelDescription(*transformer_description(model), "hub/sana")
    written = job(model.eval(), tmp_path / "e", None if is_on_hub else origin)
    TARGET.write(dataclasses.replace(written, description=description))
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path / "e", torch_dtype=torch.float32)
    expect_same(model, loaded)
    channels, width = model.config.in_channels, model.config.caption_channels
    call = {"hidden_states": torch.randn(2, channels, 8, 8), "encoder_hidden_states": torch.randn(2, 7, width)}
    call["timestep"] = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        assert torch.equal(loaded(**call).sample, model(**call).sample)


def test_transformers_loads_it_and_computes_the_student(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma2ForCausalLM

    origin = zoo_path("topics-gemma2")
    model = Gemma2ForCausalLM.from_pretrained(origin, dtype=torch.float32)
    quantize_(model, QuantSpec(WEIGHTS["group"], INPUTS))  # the head too, although the embeddings share its weight
    TARGET.write(job(model.eval(), tmp_path / "e", origin))
    assert json.loads((tmp_path / "e" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = Gemma2ForCausalLM.from_pretrained(tmp_path / "e")
    assert loaded.dtype == torch.float32
    expect_same(model, loaded)
    ids = AutoTokenizer.from_pretrained(tmp_path / "e")("the sea is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def expect_same(model: nn.Module, loaded: nn.Module) -> None:
    found = stored_codes(loaded)
    expected = layer_codes(model)
    assert set(found) == set(expected)
    for name, layer in expected.items():
        assert torch.equal(found[name], layer.codes), name
