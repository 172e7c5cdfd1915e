"""Laws of the packed format, on small models of every grid."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.errors import ModelError, OutputError
from fraqat.export import ModelDescription, load_packed_, read_packed, write_packed
from fraqat.files import sha256_of
from fraqat.nn import packed_codes, quantized_layers

DESCRIPTION = ModelDescription("Toy", {"width": 64}, "zoo:none")


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.SiLU(), nn.LayerNorm(96), nn.Unflatten(1, (96, 1, 1)), nn.Conv2d(96, 33, 1), nn.Flatten(1)
    )


SPECS = {
    "channel": WeightSpec(),
    "mse bf16": WeightSpec(range_method="mse", scale_dtype="bfloat16"),
    "group": WeightSpec(granularity="group", group_size=32, scale_dtype="bfloat16"),
    "group fp16": WeightSpec(granularity="group", group_size=32, scale_dtype="float16"),
    "learned fp16": WeightSpec(range_method="learned", scale_dtype="float16"),
    "integer group": WeightSpec(granularity="group", group_size=32, group_scale="integer", range_method="mse"),
    "integer group bf16": WeightSpec(
        bits=4.5, granularity="group", group_size=16, group_scale="integer", scale_dtype="bfloat16"
    ),
    "integer group 12 bits": WeightSpec(bits=12, granularity="group", group_size=32, group_scale="integer"),
    "learned": WeightSpec(range_method="learned"),
    "learned bf16": WeightSpec(bits=4.5, range_method="learned", scale_dtype="bfloat16"),
    "tensor": WeightSpec(granularity="tensor"),
    "narrow": WeightSpec(narrow=True),
    "asymmetric": WeightSpec(symmetric=False, range_method="min_max"),
    "5.5 bits": WeightSpec(bits=5.5),
    "3 bits": WeightSpec(bits=3),
    "8 bits": WeightSpec(bits=8),
    "16 bits": WeightSpec(bits=16),
    "28 bits": WeightSpec(bits=28),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_student_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    student = build()
    quantize_(student, QuantSpec(weight=SPECS[name]), rules=[LayerRule(pattern="4", activation_bits=16)])
    student.eval()
    write_packed(student, DESCRIPTION, tmp_path / "p")
    packed = read_packed(tmp_path / "p")
    assert packed.description == DESCRIPTION
    assert packed.specs == {key: layer.spec for key, layer in quantized_layers(student)}
    loaded = load_packed_(build(), packed)
    for key, layer in quantized_layers(student):
        expected, _ = layer.weight_quantizer.codes(layer.weight)
        assert torch.equal(packed_codes(loaded)[key].to(torch.int64), expected.to(torch.int64))
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), student(x))


def test_a_trained_student_differs_from_the_float_model_it_is_loaded_into(tmp_path: Path) -> None:
    student = build()
    quantize_(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    write_packed(student, DESCRIPTION, tmp_path / "p")
    loaded = load_packed_(build(), read_packed(tmp_path / "p"))
    assert torch.equal(loaded[2].weight, student[2].weight)
    assert torch.equal(loaded[0].bias, student[0].bias)
    assert not any(name.endswith("0.weight") for name, _ in loaded.named_parameters())


def test_static_activations_come_back(tmp_path: Path) -> None:
    from fraqat import calibrate_

    activation = ActivationSpec(granularity="tensor", static=True, symmetric=False, range_method="three_sigma")
    student = build()
    quantize_(student, QuantSpec(activation=activation))
    calibrate_(student, student, [torch.randn(7, 64), torch.randn(3, 64)])
    student.eval()
    write_packed(student, DESCRIPTION, tmp_path / "p")
    loaded = load_packed_(build(), read_packed(tmp_path / "p"))
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), student(x))


def test_an_unbatched_picture_gives_the_same_as_in_the_student(tmp_path: Path) -> None:
    student = nn.Conv2d(16, 8, 1)
    holder = nn.Sequential(student)
    quantize_(holder)
    write_packed(holder, DESCRIPTION, tmp_path / "p")
    loaded = load_packed_(nn.Sequential(nn.Conv2d(16, 8, 1)), read_packed(tmp_path / "p"))
    x = torch.randn(16, 5, 6)
    with torch.no_grad():
        assert torch.equal(loaded(x), holder(x))


def test_a_student_above_its_final_width_is_refused(tmp_path: Path) -> None:
    from fraqat import set_bits_
    from fraqat.errors import ConfigError

    student = build()
    quantize_(student)
    set_bits_(student, 8)
    with pytest.raises(ConfigError, match=r"0\.bits = 8 .* 4, the final width"):
        write_packed(student, DESCRIPTION, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_sizes_are_those_of_the_file(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512))
    quantize_(student, QuantSpec(weight=WeightSpec(scale_dtype="bfloat16")))
    size = write_packed(student, DESCRIPTION, tmp_path / "p")
    path = tmp_path / "p" / "model.safetensors"
    assert size.num_file_bytes == path.stat().st_size
    assert size.num_quantized_weights == 512 * 512
    assert size.num_other_bytes == 4 * 3 * 512
    assert size.bits_per_weight == pytest.approx(8 * (path.stat().st_size - 4 * 3 * 512) / 512**2)
    assert 4 + 16 / 512 < size.bits_per_weight < 4.1


def test_four_bit_codes_lie_low_nibble_first(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        student[0].weight.copy_(torch.tensor([[7.0, -3.0]]))
    quantize_(student)
    write_packed(student, DESCRIPTION, tmp_path / "p")
    with safe_open(tmp_path / "p" / "model.safetensors", framework="pt") as stream:
        assert stream.get_tensor("0.weight.codes").tolist() == [[7 | (13 << 4)]]
        assert stream.get_tensor("0.weight.scale").tolist() == [[1.0]]
        description = json.loads(stream.metadata()["fraqat"])
    assert description["model"]["class_name"] == "Toy"
    assert description["layers"] == {"0": 0}
    assert description["specs"][0]["weight"]["bits"] == 4.0


def test_integer_group_scales_are_stored_as_one_byte_each(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Linear(64, 3))
    weight = WeightSpec(granularity="group", group_size=16, group_scale="integer", scale_dtype="bfloat16")
    quantize_(student, QuantSpec(weight))
    write_packed(student, DESCRIPTION, tmp_path / "p")
    with safe_open(tmp_path / "p" / "model.safetensors", framework="pt") as stream:
        scale, multiplier = (stream.get_tensor(f"0.weight.{name}") for name in ("scale", "multiplier"))
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (3, 1, 1))
    assert (multiplier.dtype, multiplier.shape) == (torch.uint8, (3, 4, 1))
    _, qparams = student[0].weight_quantizer.codes(student[0].weight)
    assert torch.equal(scale.float() * multiplier.float(), qparams.scale)
    loaded = load_packed_(nn.Sequential(nn.Linear(64, 3)), read_packed(tmp_path / "p"))
    assert torch.equal(loaded[0].scale, qparams.scale)


def test_a_file_of_format_1_is_read(tmp_path: Path) -> None:
    """It knows nothing of `group_scale`."""
    student = nn.Sequential(nn.Linear(8, 3))
    quantize_(student)
    write_packed(student, DESCRIPTION, tmp_path / "p")
    path, manifest_path = tmp_path / "p" / "model.safetensors", tmp_path / "p" / "manifest.json"
    with safe_open(path, framework="pt") as stream:
        metadata = json.loads(stream.metadata()["fraqat"])
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    del metadata["specs"][0]["weight"]["group_scale"]
    save_file(tensors, path, {"fraqat": json.dumps(metadata | {"format_version": 1})})
    manifest = json.loads(manifest_path.read_text())
    manifest |= {"format_version": 1, "sha256": sha256_of(path)}
    manifest_path.write_text(json.dumps(manifest))
    loaded, x = load_packed_(nn.Sequential(nn.Linear(8, 3)), read_packed(tmp_path / "p")), torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), student(x))


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    student = build()
    quantize_(student)
    write_packed(student, DESCRIPTION, tmp_path / "p")
    path = tmp_path / "p" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="checksum"):
        read_packed(tmp_path / "p")


def test_another_model_is_refused(tmp_path: Path) -> None:
    student = build()
    quantize_(student)
    write_packed(student, DESCRIPTION, tmp_path / "p")
    packed = read_packed(tmp_path / "p")
    with pytest.raises(ModelError, match="does not fit Linear"):
        load_packed_(nn.Linear(3, 3), packed)


@pytest.mark.parametrize("name", ["0.weight.scale", "0.weight.offset"])
def test_scales_of_another_shape_are_refused(tmp_path: Path, name: str) -> None:
    student = build()
    quantize_(student, QuantSpec(WeightSpec(symmetric=False)))
    write_packed(student, DESCRIPTION, tmp_path / "p")
    packed = read_packed(tmp_path / "p")
    shape = list(packed.tensors[name].shape)
    packed.tensors[name] = packed.tensors[name][1:]
    with pytest.raises(
        ModelError, match=rf"{re.escape(name)} has the shape .* instead of {re.escape(str(shape))}.*Fix"
    ):
        load_packed_(build(), packed)


def test_an_export_is_never_overwritten_unless_told(tmp_path: Path) -> None:
    student = build()
    quantize_(student)
    write_packed(student, DESCRIPTION, tmp_path / "p")
    before = (tmp_path / "p" / "model.safetensors").read_bytes()
    other = copy.deepcopy(student)
    with torch.no_grad():
        other[0].weight.mul_(-1)
    with pytest.raises(OutputError, match="exists already"):
        write_packed(other, DESCRIPTION, tmp_path / "p")
    assert (tmp_path / "p" / "model.safetensors").read_bytes() == before
    write_packed(other, DESCRIPTION, tmp_path / "p", overwrite=True)
    assert (tmp_path / "p" / "model.safetensors").read_bytes() != before


class TiedHead(nn.Module):
    """Embeddings whose weight is the head's too."""

    def __init__(self, is_tied: bool = True):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


@pytest.mark.parametrize("is_tied_again", [True, False])
def test_tied_weights_are_stored_once(tmp_path: Path, is_tied_again: bool) -> None:
    student = TiedHead()
    quantize_(student, rules=[LayerRule(pattern="head", skip=True)])
    write_packed(student.eval(), DESCRIPTION, tmp_path / "p")
    with safe_open(tmp_path / "p" / "model.safetensors", framework="pt") as stream:
        assert sum("embed" in name or "head" in name for name in stream.keys()) == 1  # noqa: SIM118
    loaded = load_packed_(TiedHead(is_tied_again), read_packed(tmp_path / "p"))
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(5)), student(torch.arange(5)))


def test_a_tied_head_that_is_quantized_leaves_the_embeddings_whole(tmp_path: Path) -> None:
    student = TiedHead()
    quantize_(student)
    write_packed(student.eval(), DESCRIPTION, tmp_path / "p")
    loaded = load_packed_(TiedHead(is_tied=False), read_packed(tmp_path / "p"))
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(5)), student(torch.arange(5)))
