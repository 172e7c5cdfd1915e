"""Laws of one model for several widths: each has scales of its own, and gets them back as they were."""

import copy

import pytest
import torch
from torch import nn

from fraqat.nn import (
    LayerRule,
    QuantSpec,
    WeightSpec,
    describe,
    kept_widths,
    quantize_,
    quantized_layers,
    scale_parameters,
    scale_rates,
    serve_widths_,
    set_bits_,
    settle_at_,
)

WIDTHS = (8, 5.5, 4)


def make(method: str = "learned", rules: tuple[LayerRule, ...] = ()) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
    quantize_(model, QuantSpec(WeightSpec(range_method=method)), rules=rules)
    serve_widths_(model, WIDTHS)
    return model


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [layer.weight_quantizer(layer.weight).detach() for _, layer in quantized_layers(model)]


@pytest.mark.parametrize("method", ["max_abs", "mse", "learned"])
def test_every_width_begins_as_a_model_quantized_to_it(method: str) -> None:
    model = make(method)
    for bits in WIDTHS:
        alone = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
        alone.load_state_dict({n: t for n, t in model.state_dict().items() if "quantizer" not in n})
        quantize_(alone, QuantSpec(WeightSpec(bits=bits, range_method=method)))
        set_bits_(model, bits)
        assert all(torch.equal(a, b) for a, b in zip(codes(model), codes(alone), strict=True))


def test_a_learned_scale_is_its_widths_own_and_comes_back_as_the_same_parameter() -> None:
    model = make()
    scales = scale_parameters(model)
    assert len(scales) == 2 * len(WIDTHS) and len({id(scale) for scale in scales}) == len(scales)
    quantizer = model[0].weight_quantizer
    own = {}
    for i, bits in enumerate(WIDTHS):
        set_bits_(model, bits)
        own[bits] = quantizer.scale
        with torch.no_grad():
            quantizer.scale.fill_(1.0 + i)
    for i, bits in enumerate(WIDTHS):
        set_bits_(model, bits)
        assert quantizer.scale is own[bits] and bool((quantizer.scale == 1.0 + i).all())


def test_the_rate_of_a_scale_is_in_proportion_to_the_scale() -> None:
    model = make(rules=(LayerRule(pattern="2", weight_bits=5.5),))
    rates = scale_rates(model)
    assert list(rates) == scale_parameters(model)
    fine = 2**4.5 - 1
    assert list(rates.values()) == pytest.approx([1, 7 / fine, 7 / 127, 1, fine / 127])


def test_only_the_present_widths_scale_has_a_gradient() -> None:
    model = make()
    set_bits_(model, 5.5)
    model(torch.randn(4, 16)).square().sum().backward()
    with_gradient = [scale for scale in scale_parameters(model) if scale.grad is not None]
    assert {id(scale) for scale in with_gradient} == {
        id(layer.weight_quantizer.scale) for _, layer in quantized_layers(model)
    }


@pytest.mark.parametrize("method", ["mse", "learned"])
def test_the_state_is_saved_whole_and_loads_at_the_same_width(method: str) -> None:
    model, twin = make(method), make(method)
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if "quantizer" in name:
            tensor.fill_(0.01 * (number + 1))
    for bits in (4, 8):
        set_bits_(model, bits)
        set_bits_(twin, bits)
        twin.load_state_dict(model.state_dict())
        for other in (5.5, 8, 4):
            set_bits_(model, other)
            set_bits_(twin, other)
            assert all(torch.equal(a, b) for a, b in zip(codes(model), codes(twin), strict=True))


@pytest.mark.parametrize("method", ["max_abs", "mse", "learned"])
def test_a_settled_model_is_one_of_that_width_alone(method: str) -> None:
    model = make(method)
    set_bits_(model, 5.5)
    expected = codes(model)
    set_bits_(model, 4)
    settle_at_(model, 5.5)
    assert all(torch.equal(a, b) for a, b in zip(codes(model), expected, strict=True))
    assert {row.spec.weight.bits for row in describe(model).quantized} == {5.5}
    alone = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
    quantize_(alone, QuantSpec(WeightSpec(bits=5.5, range_method=method)))
    assert alone.state_dict().keys() == model.state_dict().keys()


def test_a_width_that_is_not_served_is_searched_and_leaves_the_others_alone() -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with kept_widths(model):
        set_bits_(model, 6)
        alone = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
        alone.load_state_dict({n: t for n, t in model.state_dict().items() if "quantizer" not in n})
        quantize_(alone, QuantSpec(WeightSpec(bits=6, range_method="learned")))
        assert all(torch.equal(a, b) for a, b in zip(codes(model), codes(alone), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_that_a_rule_keeps_wide_serves_no_less() -> None:
    model = make(rules=(LayerRule(pattern="2", weight_bits=6),))
    for bits, expected in ((8, 8), (5.5, 6), (4, 6)):
        set_bits_(model, bits)
        assert model[2].weight_quantizer.bits == expected
    assert len(scale_parameters(model)) == 3 + 2


def test_precision_copies_and_frozen_layers() -> None:
    model = make(rules=(LayerRule(pattern="0", trainable=False),))
    assert not any(scale.requires_grad for scale in scale_parameters(model[0]))
    assert all(scale.requires_grad for scale in scale_parameters(model[2]))
    copied = copy.deepcopy(model).bfloat16()
    assert {scale.dtype for scale in scale_parameters(copied)} == {torch.float32}
    assert describe(model).num_model_parameters == 16 * 32 + 32 + 32 * 8 + 8
