"""Laws of the loss over widths."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.analysis import losses_over_widths
from fraqat.errors import ConfigError
from fraqat.nn import IntegerLayers, quantized_layers


def make_teacher() -> nn.Module:
    """A small network with biases and a nonlinearity."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 16))


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, teacher: nn.Module) -> float:
    """Mean squared distance to the teacher."""
    with torch.no_grad():
        return float((model(X) - teacher(X)).square().mean())


def quantized(teacher: nn.Module, bits: float, activation: ActivationSpec | None, **weight: object) -> nn.Module:
    """A copy at one width."""
    student = copy.deepcopy(teacher)
    quantize_(student, QuantSpec(WeightSpec(bits=bits, **weight), activation))
    return student


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], list[object]]:
    """Everything that a measurement could leave changed."""
    switches = [
        (layer.weight_quantizer.bits, layer.weight_quantizer.is_bypassed, layer.activation_quantizer.is_bypassed)
        for _, layer in quantized_layers(model)
    ]
    return {name: value.clone() for name, value in model.state_dict().items()}, switches


@pytest.mark.parametrize("method", ["max_abs", "mse", "learned"])
def test_every_width_is_that_of_a_model_quantized_at_it(method: str) -> None:
    teacher = make_teacher()
    student = quantized(teacher, 4, ActivationSpec(), range_method=method)
    found = losses_over_widths(student, (8, 5.5, 4, 3), lambda: loss_of(student, teacher))
    assert [width.bits for width in found.widths] == [8, 5.5, 4, 3]
    for width in found.widths:
        own = quantized(teacher, width.bits, ActivationSpec(), range_method=method)
        floating = quantized(teacher, width.bits, None, range_method=method)
        assert width.loss == pytest.approx(loss_of(own, teacher), rel=1e-5)
        assert width.float_input_loss == pytest.approx(loss_of(floating, teacher), rel=1e-5)
    assert found.float_loss == 0.0


def test_a_narrower_weight_errs_more_and_sqnr_is_that_of_all_weights(sqnr_db) -> None:
    teacher = make_teacher()
    student = quantized(teacher, 4, ActivationSpec())
    widths = losses_over_widths(student, (8, 6, 4, 2), lambda: loss_of(student, teacher)).widths
    assert all(wide.float_input_loss < narrow.float_input_loss for wide, narrow in pairwise(widths))
    assert all(wide.weight_sqnr_db > narrow.weight_sqnr_db + 8 for wide, narrow in pairwise(widths))
    reference = torch.cat([layer.weight.flatten() for _, layer in quantized_layers(student)])
    rounded = torch.cat([layer.weight_quantizer(layer.weight).flatten() for _, layer in quantized_layers(student)])
    assert widths[2].weight_sqnr_db == pytest.approx(sqnr_db(reference, rounded), abs=1e-6)


@pytest.mark.parametrize("method", ["mse", "learned"])
def test_the_model_is_left_as_it_was_also_after_an_error(method: str) -> None:
    teacher = make_teacher()
    student = quantized(teacher, 4, ActivationSpec(), range_method=method)
    with torch.no_grad():  # as training leaves them: no longer what a search would find
        for _, layer in quantized_layers(student):
            state = layer.weight_quantizer.scale if method == "learned" else layer.weight_quantizer.clip_ratio
            state.mul_(0.9371)
    before = state_of(student)

    def fail() -> float:
        raise RuntimeError("stopped")

    losses_over_widths(student, (8, 2), lambda: loss_of(student, teacher))
    with pytest.raises(RuntimeError, match="stopped"):
        losses_over_widths(student, (8, 2), fail)
    after = state_of(student)
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


def test_a_layer_that_a_rule_keeps_wide_stays_wide() -> None:
    teacher = make_teacher()
    student = copy.deepcopy(teacher)
    quantize_(student, QuantSpec(WeightSpec(bits=4)), rules=[LayerRule(pattern="2", weight_bits=6)])
    seen: list[list[float]] = []

    def record() -> float:
        seen.append([layer.weight_quantizer.bits for _, layer in quantized_layers(student)])
        return 1.0

    losses_over_widths(student, (8, 5, 2), record)
    assert seen[1::2] == [[8, 8], [5, 6], [2, 6]]


def test_without_quantized_inputs_both_losses_are_one() -> None:
    teacher = make_teacher()
    student = quantized(teacher, 4, None)
    calls: list[float] = []

    def count() -> float:
        calls.append(loss_of(student, teacher))
        return calls[-1]

    (width,) = losses_over_widths(student, (3,), count).widths
    assert width.loss == width.float_input_loss == calls[-1] > 0
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ((), r"bits = \[\] is not possible: allowed is one or more different widths"),
        ((4, 4), r"bits = \[4, 4\] is not possible: allowed is one or more different widths"),
        ((4, 1), r"bits = 1 is not possible: allowed is 1 < bits <= 32"),
        ((float("nan"),), r"bits = nan is not possible"),
    ],
)
def test_impossible_widths_raise_before_anything_is_measured(bits: tuple[float, ...], message: str) -> None:
    student = quantized(make_teacher(), 4, ActivationSpec())

    def never() -> float:
        raise AssertionError("measured")

    with pytest.raises(ConfigError, match=message):
        losses_over_widths(student, bits, never)


def test_models_that_no_switch_reaches_raise() -> None:
    with pytest.raises(ConfigError, match="allowed is a quantized model"):
        losses_over_widths(make_teacher(), (4,), lambda: 0.0)
    student = quantized(make_teacher(), 4, ActivationSpec())
    engine = IntegerLayers(student)
    with pytest.raises(ConfigError, match=r"0 with an integer path.*floating-point paths"):
        losses_over_widths(student, (4,), lambda: 0.0)
    engine.release_()
    losses_over_widths(student, (4,), lambda: 0.0)
