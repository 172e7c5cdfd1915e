"""Laws of integer group scales in layers: one int8 product with scales per channel computes what groups compute."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError
from fraqat.nn import (
    ActivationSpec,
    EngineSpec,
    IntegerLayers,
    LayerRule,
    QuantSpec,
    WeightSpec,
    granularity_label,
    quantize_,
    quantized_layers,
    set_bits_,
)

FRACTIONAL = (8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4, 3, 2, 1.7)


def spec(bits: float = 4, **changes: Any) -> QuantSpec:
    values: dict[str, Any] = {"granularity": "group", "group_size": 8, "group_scale": "integer", **changes}
    return QuantSpec(WeightSpec(bits, **values))


def linear(chosen: QuantSpec, *, out: int = 8) -> Any:
    model = nn.Linear(32, out)
    quantize_(model, chosen)
    return model


@pytest.mark.parametrize("bits", FRACTIONAL)
@pytest.mark.parametrize(
    "changes", [{}, {"range_method": "mse"}, {"scale_dtype": "bfloat16"}, {"narrow": True}], ids=str
)
def test_integers_of_the_product_are_the_codes_times_the_multipliers(bits: float, changes: dict[str, Any]) -> None:
    if changes.get("narrow") and bits < 2:
        pytest.skip("no such grid")
    layer = linear(spec(bits, **changes))
    quantizer = layer.weight_quantizer
    codes, qparams = quantizer.codes(layer.weight)
    groups = quantizer.group_scales(layer.weight)
    IntegerLayers(layer, EngineSpec("float32"))
    expected = quantizer.layout.split(codes) * groups.multiplier
    assert -128 <= expected.min() <= expected.max() <= 127
    assert torch.equal(layer.integer.codes.float(), expected.flatten(1))
    assert torch.equal(layer.integer.scale, groups.channel.flatten())
    assert torch.equal(qparams.scale, groups.product)
    assert qparams.scale.shape == (8, 4, 1)
    if changes.get("scale_dtype"):
        assert torch.equal(groups.channel, groups.channel.bfloat16().float())


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 5.5, 4, 2])
@pytest.mark.parametrize("activation", [ActivationSpec(), ActivationSpec(5.5)], ids=["A8", "A5.5"])
def test_layer_computes_what_the_floating_point_path_computes(bits: float, activation: ActivationSpec) -> None:
    layer, x = linear(QuantSpec(spec(bits).weight, activation)), torch.randn(5, 32)
    expected = layer(x)
    integers = IntegerLayers(layer, EngineSpec("float32"))
    assert integers.num_layers == 1
    assert integers.reasons == {}
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-5, atol=1e-6)


def test_float_scales_per_group_keep_the_floating_point_path() -> None:
    layer = linear(spec(group_scale="float"))
    assert IntegerLayers(layer, EngineSpec("float32")).reasons == {"": "float scales per group"}


@pytest.mark.parametrize("bits", [4, 4.5, 3])
@pytest.mark.parametrize("method", ["max_abs", "mse"])
def test_gradients_are_those_of_the_floating_point_path(bits: float, method: str) -> None:
    """Rounding the scales clips even what max-abs covers: the mask must know."""
    model = nn.Sequential(nn.Linear(32, 24), nn.Unflatten(-1, (24, 1, 1)), nn.Conv2d(24, 8, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(24, 32) ** 3)
    quantize_(model, spec(bits, range_method=method))
    reference = copy.deepcopy(model)
    integers = IntegerLayers(model, EngineSpec("float32"))
    for batch in (torch.randn(5, 32), torch.randn(3, 32)):
        for run in (model, reference):
            run(batch).square().sum().backward()
    integers.finish_gradients_()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=2e-6 * theirs.grad.abs().max().item())
    assert 0 < torch.count_nonzero(model[0].weight.grad) < model[0].weight.numel()


def test_layer_at_8_bits_is_the_one_with_a_scale_per_channel() -> None:
    layer, x = linear(spec()), torch.randn(5, 32)
    other = nn.Linear(32, 8)
    other.load_state_dict(layer.state_dict())
    quantize_(other)
    for model in (layer, other):
        set_bits_(model, 8)
    assert torch.equal(layer.weight_quantizer(layer.weight), other.weight_quantizer(other.weight))
    assert torch.equal(layer(x), other(x))


def test_group_of_a_whole_row_is_a_scale_per_channel() -> None:
    layer = linear(spec(group_size=32))
    other = nn.Linear(32, 8)
    other.load_state_dict(layer.state_dict())
    quantize_(other)
    assert torch.equal(layer.weight_quantizer(layer.weight), other.weight_quantizer(other.weight))


def test_weight_that_is_not_finite_makes_the_output_not_finite() -> None:
    layer = linear(spec())
    integers = IntegerLayers(layer, EngineSpec("float32"))
    with torch.no_grad():
        layer.weight[3, 17] = float("nan")
    integers.refresh_()
    finite = torch.isfinite(layer(torch.randn(2, 32))).all(dim=0)
    assert finite.tolist() == [index != 3 for index in range(8)]


def test_whole_model_trains_through_the_widths(tiny: Any, images: Tensor) -> None:
    quantize_(tiny, spec())
    integers = IntegerLayers(tiny, EngineSpec("float32"))
    for bits in (8, 5.5, 4):
        set_bits_(tiny, bits)
        integers.refresh_()
        tiny.zero_grad()
        tiny(images).square().sum().backward()
        integers.finish_gradients_()
        assert all(torch.isfinite(layer.weight.grad).all() for _, layer in quantized_layers(tiny))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_scale": "int4"}, r"weight.group_scale = 'int4' .* allowed is float, integer"),
        ({"group_scale": "integer"}, r"weight.group_scale = 'integer' .* granularity: group. Fix: set granularity"),
        (
            {"granularity": "group", "group_size": 8, "group_scale": "integer", "symmetric": False},
            r"weight.group_scale = 'integer' .* symmetric grids",
        ),
        (
            {"granularity": "group", "group_size": 8, "group_scale": "integer", "range_method": "learned"},
            r"weight.group_scale = 'integer' .* scales that are measured. Fix: use range_method: mse, or group_scale",
        ),
    ],
)
def test_impossible_specs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightSpec(**values)


def test_label_and_rules_know_integer_groups() -> None:
    assert granularity_label(spec()) == "integer group 8 / token"
    assert LayerRule("*", weight_granularity="channel").apply(spec()) == QuantSpec()
    assert LayerRule("*", group_size=16).apply(spec()) == spec(group_size=16)
