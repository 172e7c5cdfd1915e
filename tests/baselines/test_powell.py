"""Laws of Powell's method: exact on quadratics, never worse, never over budget."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fraqat.baselines import PowellResult, minimize_powell

Point = tuple[float, ...]


def coupled_quadratic(num_variables: int, seed: int) -> tuple[Callable[[Point], float], torch.Tensor]:
    """(x - optimum)^T A (x - optimum) + 1 with a condition number of about 100, and the optimum."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(num_variables, num_variables, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, 2, num_variables, dtype=torch.float64)
    matrix = basis @ torch.diag(spectrum) @ basis.T
    optimum = torch.randn(num_variables, generator=generator, dtype=torch.float64)

    def function(point: Point) -> float:
        distance = torch.tensor(point, dtype=torch.float64) - optimum
        return (1 + distance @ matrix @ distance).item()

    return function, optimum


def minimize(function: Callable[[Point], float], start: list[float], budget: int) -> PowellResult:
    return minimize_powell(
        function, start, function(tuple(start)), first_step=0.1, last_step=1e-6, max_evaluations=budget
    )


@pytest.mark.parametrize("num_variables", [1, 2, 5, 8])
def test_the_optimum_of_a_coupled_quadratic_is_found(num_variables: int) -> None:
    function, optimum = coupled_quadratic(num_variables, num_variables)
    result = minimize(function, [0.0] * num_variables, 4000)
    torch.testing.assert_close(torch.tensor(result.point, dtype=torch.float64), optimum, rtol=0, atol=1e-3)
    assert result.value == pytest.approx(1, abs=1e-4)
    assert result.num_evaluations < 4000


def test_changed_directions_follow_a_narrow_valley() -> None:
    """Along the axes alone a narrow diagonal valley takes thousands of evaluations."""
    result = minimize(lambda p: 1000 * (p[0] - p[1]) ** 2 + (p[0] + p[1] - 10) ** 2, [0.0, 0.0], 200)
    assert result.point == pytest.approx((5, 5), abs=1e-2)


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 7, 20, 50])
def test_the_budget_is_kept_and_the_result_is_never_worse_than_the_start(budget: int) -> None:
    function, _ = coupled_quadratic(4, 0)
    calls: list[Point] = []

    def counted(point: Point) -> float:
        calls.append(point)
        return function(point)

    start = [0.5, -0.5, 0.25, 0.0]
    result = minimize_powell(
        counted, start, function(tuple(start)), first_step=0.1, last_step=1e-6, max_evaluations=budget
    )
    assert result.num_evaluations == len(calls) == budget
    assert result.value == function(result.point) == min([function(tuple(start)), *map(function, calls)])


def test_values_that_are_not_finite_are_avoided() -> None:
    result = minimize(lambda p: math.nan if p[0] > 1 else math.inf if p[0] < -1 else (p[0] - 2) ** 2, [0.0], 200)
    assert result.point[0] == pytest.approx(1, abs=1e-3)
    assert result.point[0] <= 1


def test_a_flat_function_ends_the_search() -> None:
    result = minimize(lambda p: 3.0, [1.0, 2.0], 1000)
    assert result.point == (1.0, 2.0)
    assert result.num_evaluations < 200
