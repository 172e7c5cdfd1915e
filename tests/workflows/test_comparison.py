"""Laws of the tables of `fraqat compare`, on records made by hand."""

from __future__ import annotations

import math

import pytest

from fraqat.config import load_recipe
from fraqat.workflows.comparison import Comparison, MethodResult, RunRecord


def result(method: str, distances: list[float | None]) -> MethodResult:
    records = tuple(
        RunRecord(method, 1e-4, seed, 0.1, 0.1, 10, 1.0, {} if value is None else {"frechet": value})
        for seed, value in enumerate(distances, start=1)
    )
    return MethodResult(method, 1e-4, {1e-4: 0.1}, records)


def comparison(*results: MethodResult) -> Comparison:
    return Comparison(load_recipe("color-digits"), results)


def test_a_ratio_of_quality_is_taken_seed_by_seed() -> None:
    base, other = result("vanilla-qat", [1.0, 4.0, 2.0]), result("fraqat", [0.5, 2.0, 4.0])
    ratio = comparison(other, base).quality_ratio(other, "frechet")
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    assert ratio.mean == pytest.approx((0.5 * 0.5 * 2.0) ** (1 / 3))
    deviation = math.sqrt(sum((math.log(r) - math.log(ratio.mean)) ** 2 for r in (0.5, 0.5, 2.0)) / 2)
    half = 4.303 * deviation / math.sqrt(3)  # Student's t with two degrees of freedom
    assert math.log(ratio.high) - math.log(ratio.mean) == pytest.approx(half, rel=1e-3)
    assert math.log(ratio.mean) - math.log(ratio.low) == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize("distances", [[None, 1.0], [0.0, 1.0], [1.0]])
def test_no_ratio_without_a_positive_value_for_every_seed(distances: list[float | None]) -> None:
    base, other = result("vanilla-qat", [1.0, 1.0]), result("fraqat", distances)
    assert comparison(base, other).quality_ratio(other, "frechet") is None
    assert comparison(base, other).quality_ratio(base, "frechet") is not None
    assert comparison(base, other).quality_ratio(other, "psnr_db") is None
