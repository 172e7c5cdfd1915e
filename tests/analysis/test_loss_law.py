"""The loss law: what it was made from is found again, and runs that it has not seen are predicted."""

from __future__ import annotations

import math
import random

import pytest

from fraqat.analysis import LawRun, LossLaw, bootstrap_laws, fit_loss_law, held_out_errors, log_errors
from fraqat.analysis.loss_law import percentile_interval
from fraqat.errors import ConfigError

TRUE = LossLaw(log_theta=-1.5, kappa=1.6, tau=0.1, log_phi=2.0, chi=1.1, psi=0.2, omega=0.45)
SIZES, WIDTHS, TOKENS = (4e5, 1.5e6), (2, 3, 4, 6), (5e3, 1e4, 2e4, 4e4, 8e4)


def made_runs(law: LossLaw = TRUE, noise: float = 0.0, sizes: tuple[float, ...] = SIZES) -> list[LawRun]:
    source = random.Random(1)
    return [
        LawRun(n, b, d, law.loss(n, b, d) * math.exp(source.gauss(0, noise)))
        for n in sizes
        for b in WIDTHS
        for d in TOKENS
    ]


def largest(errors: list[float]) -> float:
    return max(abs(error) for error in errors)


def test_the_law_is_the_published_form() -> None:
    n, b, d = 1e6, 4.0, 3e4
    s = d / (n * b / 8)
    first = math.exp(TRUE.log_theta) * 2 ** (-1.6 * b) / n**0.1
    second = math.exp(TRUE.log_phi) * 2 ** (-1.1 * b) / (n**0.2 * s**0.45)
    assert TRUE.loss(n, b, d) == pytest.approx(first + second)
    assert TRUE.floor(n, b) == pytest.approx(first)


def test_a_law_is_found_again_from_its_own_losses() -> None:
    law = fit_loss_law(made_runs())
    assert largest(log_errors(law, made_runs())) < 1e-3
    assert law.omega == pytest.approx(0.45, abs=0.02)
    assert law.chi == pytest.approx(1.1, abs=0.05)


def test_longer_runs_than_those_fitted_are_predicted() -> None:
    runs = made_runs(noise=0.02)
    short = [run for run in runs if run.num_tokens < 4e4]
    errors = log_errors(fit_loss_law(short), [run for run in runs if run.num_tokens >= 4e4])
    assert largest(errors) < 0.15


def test_one_wild_run_does_not_carry_the_fit_away() -> None:
    runs = made_runs(noise=0.01)
    wild = [LawRun(runs[7].num_weights, runs[7].bits, runs[7].num_tokens, 20 * runs[7].loss), *runs]
    assert largest(log_errors(fit_loss_law(wild), runs)) < 0.1


def test_one_size_has_no_exponents_of_size() -> None:
    law = fit_loss_law(made_runs(sizes=(4e5,)))
    assert law.tau == law.psi == 0
    assert largest(log_errors(law, made_runs(sizes=(4e5,)))) < 1e-3


def test_the_published_form_has_no_size_in_its_floor() -> None:
    law = fit_loss_law(made_runs(), size_in_floor=False)
    assert law.tau == 0
    assert law.psi != 0


def test_tokens_for_a_loss_lead_to_it() -> None:
    n, b = 4e5, 3
    wanted = TRUE.loss(n, b, 7e4)
    assert TRUE.tokens_for(wanted, n, b) == pytest.approx(7e4)
    assert TRUE.tokens_for(TRUE.floor(n, b), n, b) is None


def test_held_out_groups_are_each_predicted_by_the_others() -> None:
    errors = held_out_errors(made_runs(), lambda run: (run.num_weights, run.bits))
    assert len(errors) == 8
    assert all(len(group) == 5 for group in errors.values())
    # Within the widths; 2 and 6 bits are extrapolated.
    assert all(largest(group) < 0.1 for (_, bits), group in errors.items() if bits in (3, 4))


def test_the_interval_of_a_bootstrap_holds_the_truth() -> None:
    runs = made_runs(noise=0.02)
    law = fit_loss_law(runs)
    low, high = percentile_interval([each.omega for each in bootstrap_laws(runs, law, 10)])
    assert low < high
    assert low - 0.05 < TRUE.omega < high + 0.05


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (made_runs()[:3], "runs = 3"),
        ([run for run in made_runs() if run.bits == 4], "widths = 1"),
        ([run for run in made_runs() if run.num_tokens == 1e4], "lengths = 1"),
    ],
)
def test_what_does_not_determine_a_law_is_refused(runs: list[LawRun], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message} is not possible"):
        fit_loss_law(runs)


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_a_loss_that_is_none_is_refused(loss: float) -> None:
    with pytest.raises(ConfigError, match="loss = "):
        LawRun(1e6, 4, 1e4, loss)
