"""Laws of widths by layer: measured as by hand, and chosen as the exact solution would."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fraqat import LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.analysis import LayerChoices, choose_layer_widths, layer_width_rises
from fraqat.errors import ConfigError
from fraqat.nn import quantized_layers

WIDTHS = (2.0, 3.0, 5.0, 8.0)


def optimum(layers: list[LayerChoices], average_bits: float) -> float:
    """Least sum of rises within the budget, by trying every combination."""
    budget = average_bits * sum(layer.num_weights for layer in layers)
    sums = [
        sum(layer.rises[b] for layer, b in zip(layers, widths, strict=True))
        for widths in itertools.product(*(layer.rises for layer in layers))
        if sum(layer.num_weights * b for layer, b in zip(layers, widths, strict=True)) <= budget
    ]
    return min(sums)


def random_layers(seed: int, *, convex: bool) -> list[LayerChoices]:
    chance = random.Random(seed)
    layers = []
    for i in range(4):
        scale, noise = 10 ** chance.uniform(-4, 0), 0.0 if convex else 0.5
        rises = {b: scale * 4**-b * (1 + noise * chance.uniform(-1, 1)) for b in WIDTHS}
        layers.append(LayerChoices(f"layer{i}", chance.choice((64, 128, 512)), rises))
    return layers


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(2.0, 8.0), st.booleans())
def test_the_choice_is_within_one_widening_of_the_exact_optimum(seed: int, average: float, convex: bool) -> None:
    layers = random_layers(seed, convex=convex)
    choice = choose_layer_widths(layers, average)
    total = sum(layer.num_weights for layer in layers)
    used = sum(layer.num_weights * choice.bits[layer.name] for layer in layers)
    assert used / total == pytest.approx(choice.average_bits) and used <= average * total + 1e-9
    assert choice.rise == pytest.approx(sum(layer.rises[choice.bits[layer.name]] for layer in layers))
    largest_step = max(layer.rises[2.0] - min(layer.rises.values()) for layer in layers)
    exact = optimum(layers, average)
    assert exact - 1e-12 <= choice.rise <= exact + largest_step


def test_the_choice_is_the_exact_optimum_in_nearly_all_small_cases() -> None:
    ratios = [
        choose_layer_widths(layers, average).rise / optimum(layers, average)
        for seed in range(20)
        for average in (3.0, 4.0, 5.5)
        for layers in [random_layers(seed, convex=True)]
    ]
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 0.6 * len(ratios)
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(1)


def test_more_room_never_raises_the_sum_at_the_hulls_own_budgets() -> None:
    layers = random_layers(3, convex=True)
    rises = [choose_layer_widths(layers, average).rise for average in (2, 3, 5, 8)]
    assert rises == sorted(rises, reverse=True)
    assert choose_layer_widths(layers, 8).bits == {layer.name: 8.0 for layer in layers}
    assert choose_layer_widths(layers, 2).bits == {layer.name: 2.0 for layer in layers}


def test_a_sensitive_layer_gets_what_an_insensitive_one_gives_up() -> None:
    layers = [
        LayerChoices("sensitive", 100, {3: 1.0, 4: 0.25, 5: 0.0625}),
        LayerChoices("robust", 100, {3: 0.01, 4: 0.0025, 5: 0.0006}),
    ]
    choice = choose_layer_widths(layers, 4)
    assert choice.bits == {"sensitive": 5, "robust": 3} and choice.average_bits == 4


def test_a_wider_layer_that_is_worse_is_never_taken_and_fractional_widths_take_whole_bits() -> None:
    layers = [LayerChoices("odd", 10, {3: 0.2, 4: 0.1, 5: 0.3})]
    assert choose_layer_widths(layers, 8).bits == {"odd": 4}
    assert choose_layer_widths([LayerChoices("f", 10, {4: 1.0, 4.5: 0.5})], 4.5).bits == {"f": 4}
    assert choose_layer_widths([LayerChoices("f", 10, {4: 1.0, 4.5: 0.5})], 5).bits == {"f": 4.5}


def test_impossible_budgets_and_layers_are_named() -> None:
    with pytest.raises(ConfigError, match=r"average_bits = 2 is not possible: allowed is 3 or more"):
        choose_layer_widths([LayerChoices("a", 10, {3: 1.0, 4: 0.5})], 2)
    with pytest.raises(ConfigError, match="at least one"):
        choose_layer_widths([], 4)
    with pytest.raises(ConfigError, match="at least one weight and one width"):
        LayerChoices("a", 10, {})


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("method", ["max_abs", "mse", "learned"])
def test_rises_are_those_of_hand_made_models_and_the_model_is_left_as_it_was(method: str) -> None:
    torch.manual_seed(2)
    teacher, x = Network(), torch.randn(40, 16)
    student = copy.deepcopy(teacher)
    quantize_(student, QuantSpec(WeightSpec(range_method=method)), rules=[LayerRule(pattern="second", weight_bits=8)])

    def loss_of(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x) - teacher(x)).square().mean())

    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    done: list[int] = []
    found = layer_width_rises(student, (3, 8), lambda: loss_of(student), pinned="second".__eq__, on_layer=done.append)
    assert [(layer.name, layer.num_weights, tuple(layer.rises)) for layer in found] == [
        ("first", 256, (3, 8)),
        ("second", 128, (8,)),
    ]
    by_hand = copy.deepcopy(teacher)
    quantize_(
        by_hand,
        QuantSpec(WeightSpec(bits=3, range_method=method), None),
        rules=[LayerRule(pattern="second", skip=True)],
    )
    assert found[0].rises[3] == pytest.approx(loss_of(by_hand), rel=1e-5)
    assert found[0].rises[8] < found[0].rises[3] and done == [1, 2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert [layer.weight_quantizer.bits for _, layer in quantized_layers(student)] == [4, 8]
