"""Laws of the layer errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fraqat import LayerRule, QuantSpec, WeightSpec, quantize_
from fraqat.analysis import layer_errors
from fraqat.analysis.layer_error import sqnr_db


def test_sqnr_of_a_known_error() -> None:
    signal = torch.ones(100)
    assert sqnr_db(signal, signal * 1.01) == pytest.approx(40.0, abs=1e-4)
    assert sqnr_db(signal, signal) is None
    assert sqnr_db(torch.zeros(3), torch.ones(3)) is None


def test_errors_belong_to_their_layers() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    student = copy.deepcopy(teacher)
    quantize_(student, QuantSpec(weight=WeightSpec(bits=8)), rules=[LayerRule(pattern="2", weight_bits=2)])
    x = torch.randn(64, 32)
    errors = layer_errors(teacher, student, lambda model: model(x))
    assert list(errors) == ["0", "2"]
    assert errors["0"].weight_sqnr_db > 35
    assert errors["2"].weight_sqnr_db < 10
    assert errors["0"].output_sqnr_db > errors["2"].output_sqnr_db + 20
    with torch.no_grad():
        signal = teacher(x)
        noise = student(x) - signal
    expected = 10 * math.log10(float(signal.square().sum() / noise.square().sum()))
    assert errors["2"].output_sqnr_db == pytest.approx(expected, abs=1e-3)
