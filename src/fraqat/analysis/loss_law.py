"""A law of the held-out distillation loss over model size, width and tokens, fitted to finished runs.

The form is that of compute-optimal QAT (arXiv 2509.22935), without its terms for training in full precision: a student that is
not quantized equals its teacher, so their loss is 0 here, and every run starts from a finished model.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fraqat.errors import config_error

HUBER_DELTA = 0.05
"""Residuals of the logarithm beyond this count linearly: about the spread of one run over seeds."""

_LN2 = math.log(2)
_MAX_STEPS = 60
_MOST_DAMPING = 1e12
_STARTS = ((1.5, 2.0, 0.2), (2.0, 1.0, 0.6), (1.0, 0.5, 0.1))
"""(kappa, chi, omega) that the fit begins from."""


@dataclass(frozen=True)
class LawRun:
    """What the law is fitted to: one finished run.

    Args:
        num_weights: N, quantized weights.
        bits: B, width at the end.
        num_tokens: D, tokens that it was trained on with quantization.
        loss: Held-out, greater than 0.
    """

    num_weights: float
    bits: float
    num_tokens: float
    loss: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise config_error(field.name, value, allowed="a positive number", fix="leave the run out")


@dataclass(frozen=True)
class LossLaw:
    """L = theta 2^(-kappa B) / N^tau + phi 2^(-chi B) / (N^psi S^omega), S = D / (N B / 8) tokens per byte of weights.

    The first term is what no training takes away, the second what training with quantization does. tau = 0 is the published
    form; in distillation every size has a teacher of its own, whose outputs the same error moves more or less.

    Args:
        log_theta, kappa, tau, log_phi, chi, psi, omega: Natural logarithms of the two factors, and the exponents.
    """

    log_theta: float
    kappa: float
    tau: float
    log_phi: float
    chi: float
    psi: float
    omega: float

    def loss(self, num_weights: float, bits: float, num_tokens: float) -> float:
        """Predicted held-out loss of a run."""
        log_s = math.log(8 * num_tokens / (num_weights * bits))
        trained = self.log_phi - self.chi * _LN2 * bits - self.psi * math.log(num_weights) - self.omega * log_s
        return self.floor(num_weights, bits) + math.exp(trained)

    def floor(self, num_weights: float, bits: float) -> float:
        """Predicted loss after endless training."""
        return math.exp(self.log_theta - self.kappa * _LN2 * bits - self.tau * math.log(num_weights))

    def tokens_for(self, loss: float, num_weights: float, bits: float) -> float | None:
        """Tokens after which a loss is reached; None if the floor lies above it."""
        left = loss - self.floor(num_weights, bits)
        if left <= 0:
            return None
        at_one = self.log_phi - self.chi * _LN2 * bits - self.psi * math.log(num_weights)
        return math.exp((at_one - math.log(left)) / self.omega) * num_weights * bits / 8


def fit_loss_law(runs: Sequence[LawRun], *, size_in_floor: bool = True, start: LossLaw | None = None) -> LossLaw:
    """The law with the least Huber loss of the logarithm's residuals, by damped Gauss-Newton steps from several starts.

    Logarithms of size and tokens and the width are centred at their means, so that factors and exponents are told apart; kappa,
    chi and omega are positive by their parametrization. With one size tau and psi are 0: nothing tells them from the factors.

    Args:
        runs: At least as many as free parameters, with two or more widths and two or more lengths.
        size_in_floor: Fit tau too.
        start: Begin from this law alone, as a bootstrap does.

    Raises:
        ConfigError: Too few runs, widths or lengths.
    """
    has_sizes = len({run.num_weights for run in runs}) > 1
    num_free = 5 + has_sizes * (1 + size_in_floor)
    enough = {
        "runs": (len(runs), num_free),
        "widths": (len({run.bits for run in runs}), 2),
        "lengths": (len({run.num_tokens for run in runs}), 2),
    }
    for name, (found, needed) in enough.items():
        if found < needed:
            raise config_error(name, found, allowed=f"{needed} or more to fit the law", fix="add runs")
    design = _Design.of(runs)
    free = torch.tensor([1, 1, has_sizes and size_in_floor, 1, 1, has_sizes, 1], dtype=torch.float64)
    starts = [design.start(*exponents) for exponents in _STARTS] if start is None else [design.packed(start)]
    return design.law(min((_minimized(design, first, free) for first in starts), key=lambda found: found[1])[0])


def log_errors(law: LossLaw, runs: Sequence[LawRun]) -> list[float]:
    """ln(predicted / measured) of every run."""
    return [math.log(law.loss(run.num_weights, run.bits, run.num_tokens) / run.loss) for run in runs]


def held_out_errors(
    runs: Sequence[LawRun], group: Callable[[LawRun], Hashable], *, size_in_floor: bool = True
) -> dict[Hashable, list[float]]:
    """ln(predicted / measured) of every group of runs by the law that was fitted to all others.

    Args:
        runs: See `fit_loss_law`, which must be possible without any one group.
        group: What a run belongs to, such as its width and size.
        size_in_floor: See `fit_loss_law`.
    """
    groups = dict.fromkeys(group(run) for run in runs)
    errors: dict[Hashable, list[float]] = {}
    for name in groups:
        law = fit_loss_law([run for run in runs if group(run) != name], size_in_floor=size_in_floor)
        errors[name] = log_errors(law, [run for run in runs if group(run) == name])
    return errors


def bootstrap_laws(
    runs: Sequence[LawRun], law: LossLaw, num_samples: int, *, size_in_floor: bool = True, seed: int = 0
) -> list[LossLaw]:
    """Laws fitted to runs drawn with replacement, each from the law of all runs on.

    Args:
        runs: What `law` was fitted to.
        law: See `fit_loss_law`.
        num_samples: Draws; those with too few different runs, widths or lengths are drawn again.
        size_in_floor: As in the fit of `law`.
        seed: Of the draws.
    """
    source = random.Random(seed)  # noqa: S311  # a resampling, not a secret
    laws: list[LossLaw] = []
    num_different = 5 + 2 * (len({run.num_weights for run in runs}) > 1)
    while len(laws) < num_samples:
        drawn = source.choices(runs, k=len(runs))
        kinds = [{run.num_weights for run in drawn}, {run.bits for run in drawn}, {run.num_tokens for run in drawn}]
        is_whole = len(kinds[0]) == len({run.num_weights for run in runs}) and min(map(len, kinds[1:])) > 1
        if is_whole and len(set(drawn)) >= num_different:
            laws.append(fit_loss_law(drawn, size_in_floor=size_in_floor, start=law))
    return laws


def percentile_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles."""
    ends = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


@dataclass(frozen=True)
class _Design:
    """Centred columns of the runs, one entry a run: width, ln N, ln S; and ln of the loss."""

    bits: Tensor
    log_n: Tensor
    log_s: Tensor
    log_loss: Tensor
    centre: tuple[float, float, float]

    @classmethod
    def of(cls, runs: Sequence[LawRun]) -> _Design:
        columns = torch.tensor(
            [
                (run.bits, math.log(run.num_weights), math.log(8 * run.num_tokens / run.num_weights / run.bits))
                for run in runs
            ],
            dtype=torch.float64,
        )
        mean = columns.mean(0)
        bits, log_n, log_s = (columns - mean).T
        log_loss = torch.tensor([math.log(run.loss) for run in runs], dtype=torch.float64)
        return cls(bits, log_n, log_s, log_loss, (float(mean[0]), float(mean[1]), float(mean[2])))

    def start(self, kappa: float, chi: float, omega: float) -> Tensor:
        """Half of the mean loss to each term."""
        half = float(self.log_loss.mean()) - _LN2
        return torch.tensor([half, math.log(kappa), 0, half, math.log(chi), 0, math.log(omega)], dtype=torch.float64)

    def packed(self, law: LossLaw) -> Tensor:
        """The law as centred parameters."""
        bits, log_n, log_s = self.centre
        floor = law.log_theta - law.kappa * _LN2 * bits - law.tau * log_n
        trained = law.log_phi - law.chi * _LN2 * bits - law.psi * log_n - law.omega * log_s
        logs = [math.log(max(value, 1e-12)) for value in (law.kappa, law.chi, law.omega)]
        return torch.tensor([floor, logs[0], law.tau, trained, logs[1], law.psi, logs[2]], dtype=torch.float64)

    def law(self, parameters: Tensor) -> LossLaw:
        """Undoes `packed`."""
        floor, log_kappa, tau, trained, log_chi, psi, log_omega = (float(value) for value in parameters)
        kappa, chi, omega = math.exp(log_kappa), math.exp(log_chi), math.exp(log_omega)
        bits, log_n, log_s = self.centre
        return LossLaw(
            log_theta=floor + kappa * _LN2 * bits + tau * log_n,
            kappa=kappa,
            tau=tau,
            log_phi=trained + chi * _LN2 * bits + psi * log_n + omega * log_s,
            chi=chi,
            psi=psi,
            omega=omega,
        )

    def residuals(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """ln(predicted / measured) [runs], and its derivatives [runs, parameters]."""
        floor, log_kappa, tau, trained, log_chi, psi, log_omega = parameters.unbind()
        by_kappa, by_chi = log_kappa.exp() * _LN2 * self.bits, log_chi.exp() * _LN2 * self.bits
        by_omega = log_omega.exp() * self.log_s
        first = floor - by_kappa - tau * self.log_n
        second = trained - by_chi - psi * self.log_n - by_omega
        share = torch.sigmoid(first - second)  # of the first term in the loss
        rest = 1 - share
        columns = (
            share,
            -share * by_kappa,
            -share * self.log_n,
            rest,
            -rest * by_chi,
            -rest * self.log_n,
            -rest * by_omega,
        )
        return torch.logaddexp(first, second) - self.log_loss, torch.stack(columns, 1)


def _minimized(design: _Design, first: Tensor, free: Tensor) -> tuple[Tensor, float]:
    """The parameters where damped Gauss-Newton steps end (Levenberg and Marquardt), and the Huber loss there.

    A residual beyond the threshold has the weight that makes its square count linearly. Parameters that are not free stay.
    """
    parameters, damping = first, 1e-2
    value = _huber(design.residuals(parameters)[0])
    for _ in range(_MAX_STEPS):
        residual, jacobian = design.residuals(parameters)
        jacobian = jacobian * free
        weighted = jacobian * (HUBER_DELTA / residual.abs().clamp_min(HUBER_DELTA))[:, None]
        curvature, gradient = weighted.T @ jacobian, weighted.T @ residual
        moved, new_value, has_moved = parameters, value, False
        while not has_moved and damping < _MOST_DAMPING:
            stiffness = torch.diag(curvature.diagonal() * damping + 1e-12)
            moved = parameters - torch.linalg.solve(curvature + stiffness, gradient)
            new_value = _huber(design.residuals(moved)[0])
            has_moved = new_value < value
            damping = damping / 5 if has_moved else damping * 4
        if not has_moved:
            break
        is_done = value - new_value < max(1e-7 * value, 1e-12)
        parameters, value = moved, new_value
        if is_done:
            break
    return parameters, value


def _huber(residual: Tensor) -> float:
    value = float(torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=HUBER_DELTA))
    return value if math.isfinite(value) else math.inf
