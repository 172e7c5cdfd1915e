"""Laws of the verdict: what breaks a bound, and what no bound may hide."""

import math
from typing import Any

import pytest
import torch

from fraqat.export import Bound, StepsApart
from fraqat.workflows.verdict import Error, LayerCheck, judge

BOUND = Bound(30.0, 60.0, "a reason", steps=1.0)


def error_of(wanted: list[float], found: list[float]) -> Error:
    error = Error()
    error.add(torch.tensor(wanted), torch.tensor(found))
    return error


GOOD = error_of([1.0, -2.0], [1.0, -2.0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_breaks_every_bound_and_is_shown(value: float) -> None:
    error = error_of([1.0, 2.0], [1.0, value])
    assert error.sqnr_db == -math.inf
    found = judge([LayerCheck("a", 0, GOOD)], {"part.y": error}, BOUND, "onnx")
    assert not found.holds
    rows = {row[0]: row[1] for row in found.summary.rows}
    assert rows["largest error of part.y"] == "not finite"


def test_sqnr_is_the_ratio_of_all_squares() -> None:
    error = error_of([3.0, 4.0], [3.0, 4.5])
    error.add(torch.tensor([5.0]), torch.tensor([5.0]))
    assert error.sqnr_db == pytest.approx(10 * math.log10(50 / 0.25))
    assert error.largest == 0.5
    assert GOOD.sqnr_db == math.inf


BROKEN: dict[str, dict[str, Any]] = {
    "a code": {"num_differing_codes": 1},
    "codes that are not there": {"num_differing_codes": None},
    "a layer": {"error": error_of([1.0], [1.01])},
    "a scale": {"weight_error": error_of([1.0], [1.01])},
    "steps": {"steps": StepsApart(8, 2.0, 0.9)},
}


@pytest.mark.parametrize("what", BROKEN)
def test_one_broken_bound_of_one_layer_is_enough_and_is_named(what: str) -> None:
    values = {"num_differing_codes": 0, "error": GOOD, **BROKEN[what]}
    layers = [LayerCheck("first", 0, GOOD), LayerCheck("second", **values), LayerCheck("third", **values)]
    found = judge(layers, {"part.y": GOOD}, BOUND, "onnx")
    assert not found.holds
    assert found.first_difference == "second"


def test_steps_of_wide_outputs_and_missing_measurements_break_nothing() -> None:
    layers = [LayerCheck("wide", 0, GOOD, steps=StepsApart(16, 9.0, 0.5)), LayerCheck("hidden", 0)]
    found = judge(layers, {"part.y": error_of([1.0], [1.01])}, BOUND, "qualcomm")
    assert found.holds
    assert found.first_difference == ""
    assert ("largest difference of a 16-bit layer output, steps", 9.0, None) in found.summary.rows
