"""Laws of the sensitivity of layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.analysis import layer_sensitivity
from fraqat.errors import ConfigError
from fraqat.nn import quantized_layers

NAMES = ("first", "ff.up", "ff.down")
SPEC = QuantSpec(WeightSpec(bits=3, range_method="mse"), ActivationSpec(bits=6))


class Network(nn.Module):
    """Three linear layers, two of them a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.ff = nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.ff["down"](nn.functional.silu(self.ff["up"](x)))


X = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))


def make_pair() -> tuple[nn.Module, nn.Module]:
    """Teacher and student."""
    torch.manual_seed(2)
    teacher = Network()
    student = copy.deepcopy(teacher)
    quantize_(student, SPEC)
    return teacher, student


def loss_of(model: nn.Module, teacher: nn.Module) -> float:
    """Mean squared distance to the teacher."""
    with torch.no_grad():
        return float((model(X) - teacher(X)).square().mean())


def hand_made(teacher: nn.Module, skipped: set[str]) -> nn.Module:
    """The teacher with every layer quantized but these."""
    model = copy.deepcopy(teacher)
    quantize_(model, SPEC, rules=[LayerRule(pattern=name, skip=True) for name in skipped])
    return model


def test_losses_are_those_of_hand_made_models() -> None:
    teacher, student = make_pair()
    found = layer_sensitivity(student, lambda: loss_of(student, teacher))
    assert [(layer.name, layer.place) for layer in found.layers] == [(name, i) for i, name in enumerate(NAMES)]
    assert found.float_loss == 0.0
    assert found.full_loss == loss_of(student, teacher) > 0
    for layer in found.layers:
        assert layer.alone == loss_of(hand_made(teacher, set(NAMES) - {layer.name}), teacher)
        assert layer.without == loss_of(hand_made(teacher, {layer.name}), teacher)
        assert found.rise_alone(layer) == layer.alone
        assert found.fall_without(layer) == found.full_loss - layer.without


def test_sqnr_is_of_the_layers_own_error_on_clean_inputs(sqnr_db) -> None:
    teacher, student = make_pair()
    found = {layer.name: layer for layer in layer_sensitivity(student, lambda: loss_of(student, teacher)).layers}
    with torch.no_grad():
        inner = nn.functional.silu(teacher.ff["up"](teacher.first(X)))
        clean = teacher.ff["down"](inner)
        layer = student.ff["down"]
        assert found["ff.down"].output_sqnr_db == pytest.approx(sqnr_db(clean, layer(inner)), abs=1e-3)
        rounded = layer.weight_quantizer(layer.weight)
        assert found["ff.down"].weight_sqnr_db == pytest.approx(sqnr_db(layer.weight, rounded), abs=1e-6)


def test_the_only_layer_is_the_whole_model() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 8))
    student = copy.deepcopy(teacher)
    quantize_(student, SPEC)
    found = layer_sensitivity(student, lambda: loss_of(student, teacher))
    (layer,) = found.layers
    assert (layer.alone, layer.without) == (found.full_loss, found.float_loss)


def test_the_worst_layer_comes_first_and_families_sum() -> None:
    teacher, _ = make_pair()
    student = copy.deepcopy(teacher)
    quantize_(
        student, SPEC, rules=[LayerRule(pattern="first", weight_bits=8), LayerRule(pattern="ff.up", weight_bits=8)]
    )
    found = layer_sensitivity(student, lambda: loss_of(student, teacher))
    ranked = found.ranked
    assert ranked[0].name == "ff.down"
    assert [layer.alone for layer in ranked] == sorted((layer.alone for layer in ranked), reverse=True)
    sums = found.sums(lambda name: "FF" if name.startswith("ff.") else "-")
    assert list(sums) == ["-", "FF"]
    assert (sums["-"].num_layers, sums["FF"].num_layers) == (1, 2)
    first, up, down = found.layers
    assert sums["FF"].rise_alone == pytest.approx(up.alone + down.alone)
    assert sums["FF"].fall_without == pytest.approx(2 * found.full_loss - up.without - down.without)
    assert sums["-"].rise_alone == first.alone


def test_the_model_is_left_as_it_was() -> None:
    teacher, student = make_pair()
    before = student(X)
    done: list[int] = []
    layer_sensitivity(student, lambda: loss_of(student, teacher), on_layer=done.append)
    assert done == [1, 2, 3]
    assert torch.equal(student(X), before)
    for _, layer in quantized_layers(student):
        assert not layer.weight_quantizer.is_bypassed
        assert not layer.activation_quantizer.is_bypassed
        assert not layer._forward_hooks


def test_a_layer_that_is_never_called_costs_nothing() -> None:
    teacher, _ = make_pair()
    teacher.spare = nn.Linear(16, 16)
    student = copy.deepcopy(teacher)
    quantize_(student, SPEC)
    found = {layer.name: layer for layer in layer_sensitivity(student, lambda: loss_of(student, teacher)).layers}
    assert found["spare"].alone == 0.0
    assert found["spare"].output_sqnr_db is None
    assert found["spare"].weight_sqnr_db > 0


def test_a_model_that_is_not_quantized_raises() -> None:
    with pytest.raises(ConfigError, match=r"allowed is a quantized model\. Fix: call quantize_ first"):
        layer_sensitivity(Network(), lambda: 0.0)
