"""Laws of the packed layers: bit for bit what the trained layers compute."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.nn import (
    ActivationSpec,
    PackedLayer,
    QuantSpec,
    WeightSpec,
    calibrate_,
    packed_codes,
    quantize_,
    quantized_layers,
    set_bits_,
    to_packed_,
    unquantize_,
)
from fraqat.numerics import QParams

STATIC = ActivationSpec(granularity="tensor", static=True)


def pack_(model: nn.Module) -> nn.Module:
    """A packed copy of a quantized model."""
    twin = copy.deepcopy(model)
    layers = dict(quantized_layers(model))
    unquantize_(twin)
    for name, layer in layers.items():
        codes, qparams = layer.weight_quantizer.codes(layer.weight)
        static: QParams | None = None
        if layer.activation_quantizer is not None and layer.activation_quantizer.scale is not None:
            static = QParams(layer.activation_quantizer.scale, layer.activation_quantizer.zero_point)
        to_packed_(twin.get_submodule(name), layer.spec, codes, qparams, static)
    return twin


SPECS = {
    "W4A8": QuantSpec(),
    "W5.5A16": QuantSpec(WeightSpec(5.5), ActivationSpec(16)),
    "W4A-": QuantSpec(WeightSpec(4), None),
    "W8A8 narrow": QuantSpec(WeightSpec(8, narrow=True)),
    "W4.25 group": QuantSpec(WeightSpec(4.25, granularity="group", group_size=8)),
    "W4 integer group": QuantSpec(WeightSpec(4, granularity="group", group_size=8, group_scale="integer")),
    "W4.5 learned": QuantSpec(WeightSpec(4.5, range_method="learned")),
    "W28 learned": QuantSpec(WeightSpec(28, range_method="learned")),
    "W4 mse bf16": QuantSpec(WeightSpec(4, range_method="mse", scale_dtype="bfloat16")),
    "W12 tensor": QuantSpec(WeightSpec(12, granularity="tensor")),
    "W24": QuantSpec(WeightSpec(24)),
    "W4 asymmetric": QuantSpec(WeightSpec(4, symmetric=False, range_method="min_max"), ActivationSpec(symmetric=False)),
    "W4A8 static": QuantSpec(WeightSpec(4), STATIC),
    "W4A8 static asymmetric": QuantSpec(
        WeightSpec(4), ActivationSpec(granularity="tensor", static=True, symmetric=False, range_method="three_sigma")
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_model_equals_the_trained_one_bitwise(
    tiny: Any, images: Tensor, spec: QuantSpec, dtype: torch.dtype
) -> None:
    quantize_(tiny.to(dtype), spec)
    images = images.to(dtype)
    calibrate_(tiny, tiny, [images, 0.5 * images])
    packed = pack_(tiny)
    assert torch.equal(packed(images), tiny(images))


@torch.no_grad()
def test_packed_model_has_codes_and_no_weights(tiny: Any, twin_names: tuple[str, ...]) -> None:
    quantize_(tiny)
    packed = pack_(tiny)
    codes = packed_codes(packed)
    assert tuple(codes) == twin_names
    for name, layer in quantized_layers(tiny):
        assert torch.equal(codes[name], layer.weight_quantizer.codes(layer.weight)[0])
        assert codes[name].dtype is torch.int8
        assert codes[name].shape == layer.weight.shape
        assert f"{name}.weight" not in packed.state_dict()
        assert packed.get_submodule(name).type_name == layer.type_name
    assert all(
        not name.startswith(tuple(twin_names)) or name.endswith(".bias") for name, _ in packed.named_parameters()
    )


@torch.no_grad()
def test_packed_model_follows_the_final_width_only(tiny: Any, images: Tensor) -> None:
    quantize_(tiny)
    final = tiny(images)
    set_bits_(tiny, 8)
    set_bits_(tiny, 4)
    assert torch.equal(pack_(tiny)(images), final)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_packed_model_keeps_codes_and_scales(tiny: Any, images: Tensor, dtype: torch.dtype) -> None:
    quantize_(tiny, QuantSpec(WeightSpec(4, symmetric=False, range_method="min_max")))
    packed = pack_(tiny)
    before = {name: buffer.clone() for name, buffer in packed.named_buffers()}
    packed.to(dtype)
    assert packed.proj_out.bias.dtype is dtype
    for name, buffer in packed.named_buffers():
        assert buffer.dtype is before[name].dtype
        assert torch.equal(buffer, before[name])
    assert packed(images.to(dtype)).dtype is dtype


@torch.no_grad()
def test_packed_state_dict_loads_into_another_packed_model(tiny: Any, images: Tensor) -> None:
    quantize_(tiny)
    source = pack_(tiny)
    other = pack_(tiny)
    for name, layer in other.named_modules():
        if isinstance(layer, PackedLayer):
            layer.codes.zero_()
            assert name
    assert not torch.equal(other(images), source(images))
    other.load_state_dict(source.state_dict())
    assert torch.equal(other(images), source(images))


def test_layer_without_a_packed_form_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="LayerNorm has no packed form"):
        to_packed_(nn.LayerNorm(4), QuantSpec(), torch.zeros(4, dtype=torch.int8), QParams(torch.ones(4)))
