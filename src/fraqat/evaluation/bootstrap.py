"""95 % bootstrap intervals of metrics, over samples (Efron 1979; percentile method).

A replicate draws as many samples as there are, with replacement. It is kept as counts: how often each sample was drawn, which
is all that a mean, a median, a ratio or a distance of distributions needs. What is measured in pairs (a student's and the
original's image of the same prompt and seed) is drawn in pairs.

Shape suffixes: R replicates, N samples, M samples of the other set, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fraqat.errors import check_seed, config_error
from fraqat.evaluation.frechet import check_features, frechet_distance, weighted_frechet_distance
from fraqat.evaluation.mmd import Kernel, squared_mmd_replicates
from fraqat.nn import STRICT_KEYS

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Ends of a 95 % interval, in the unit of the metric."""

    low: float
    high: float


@dataclass(frozen=True)
class BootstrapSpec:
    """How the intervals are found.

    Args:
        num_replicates: Resamplings of means, medians, ratios, KID and CMMD; 0 gives no intervals.
        num_frechet: Resamplings of a Frechet distance, each of which takes singular values of a matrix as large as samples or
            features; 0 gives no intervals of it.
        seed: Of the drawing.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    num_replicates: int = 1000
    num_frechet: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_replicates", "num_frechet"):
            value = getattr(self, name)
            if value < 0 or 0 < value < 40:
                raise config_error(
                    f"evaluation.bootstrap.{name}",
                    value,
                    allowed="0, or 40 or more: fewer say nothing about the outer 2.5 %",
                    fix="use 200 or more",
                )
        check_seed("evaluation.bootstrap.seed", self.seed)


def resample_counts(num_samples: int, num_replicates: int, seed: int) -> Tensor:
    """How often each sample is drawn in each replicate.

    Args:
        num_samples: N.
        num_replicates: R.
        seed: Equal seeds draw equally, on every device.

    Returns:
        float64 counts [R, N]; every row sums to N.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn_RN = torch.randint(num_samples, (num_replicates, num_samples), generator=generator)
    counts_RN = torch.zeros(num_replicates, num_samples, dtype=torch.float64)
    return counts_RN.scatter_add_(1, drawn_RN, torch.ones_like(drawn_RN, dtype=torch.float64))


def percentile_interval(replicates_R: Tensor) -> Interval:
    """The central 95 % of finite replicates [R] (linear between order statistics).

    Raises:
        ConfigError: No replicate is finite.
    """
    finite = replicates_R[replicates_R.isfinite()].double()
    if not len(finite):
        raise config_error("replicates", "none finite", allowed="a finite one", fix="measure on more samples")
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(finite, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def mean_interval(values: Sequence[float] | Tensor, spec: BootstrapSpec) -> Interval | None:
    """Interval of the mean of N values; None where the spec asks for none."""
    values_N = _column("values", values)
    return ratio_interval(values_N, torch.ones_like(values_N), spec)


def ratio_interval(
    numerators: Sequence[float] | Tensor, denominators: Sequence[float] | Tensor, spec: BootstrapSpec
) -> Interval | None:
    """Interval of sum(numerators) / sum(denominators), as of errors per word or nats per token over N texts.

    Args:
        numerators: [N].
        denominators: [N], 0 or more. Replicates where they sum to 0 are left out.
        spec: Of the drawing.

    Raises:
        ConfigError: Not two columns of the same length, 1 or more.
    """
    top_N, bottom_N = _column("numerators", numerators), _column("denominators", denominators)
    if len(top_N) != len(bottom_N):
        raise config_error("denominators", len(bottom_N), allowed=f"{len(top_N)} values", fix="pass one per numerator")
    if not spec.num_replicates:
        return None
    counts_RN = resample_counts(len(top_N), spec.num_replicates, spec.seed)
    return percentile_interval((counts_RN @ top_N) / (counts_RN @ bottom_N))


def median_interval(values: Sequence[float] | Tensor, spec: BootstrapSpec) -> Interval | None:
    """Interval of the median of N values (the mean of the two middle ones for an even N)."""
    values_N = _column("values", values)
    if not spec.num_replicates:
        return None
    ordered_N, order_N = values_N.sort()
    ranks_RN = resample_counts(len(values_N), spec.num_replicates, spec.seed)[:, order_N].cumsum(1)
    middles = torch.tensor([[(len(values_N) - 1) // 2 + 1.0, len(values_N) // 2 + 1.0]], dtype=torch.float64)
    places = torch.searchsorted(ranks_RN, middles.expand(len(ranks_RN), 2).contiguous())
    return percentile_interval(ordered_N[places].mean(1))


def frechet_interval(features: Tensor, reference: Tensor, spec: BootstrapSpec, *, paired: bool) -> Interval | None:
    """Interval of `frechet_distance`, moved so that its replicates' median is the distance itself.

    A replicate holds about 63 % different samples, and the Frechet distance is biased upwards for few samples: replicates
    lie above the distance, often all of them. Their spread says how uncertain the distance is, their place does not, so the
    percentiles are shifted by (distance - median of the replicates), and cut off at 0. The bias of the distance itself, which
    depends on N, M and D, stays in it.

    Args:
        features: [N, D].
        reference: [M, D].
        spec: Of the drawing; `num_frechet` replicates.
        paired: Whether rows of equal index belong together and are drawn together (N = M).

    Raises:
        ConfigError: As `frechet_distance`; paired sets of different sizes.
    """
    check_features(features, reference)
    counts_RN, counts_RM = _both_counts(features, reference, spec.num_frechet, spec.seed, paired)
    if not spec.num_frechet:
        return None
    x, y = features.double(), reference.double()
    replicates = [weighted_frechet_distance(x, y, w, v) for w, v in zip(counts_RN, counts_RM, strict=True)]
    replicates_R = torch.tensor(replicates, dtype=torch.float64)
    shift = frechet_distance(features, reference) - float(replicates_R.quantile(0.5))
    low, high = percentile_interval(replicates_R)
    return Interval(max(0.0, low + shift), high + shift)


def mmd_interval(
    features: Tensor, reference: Tensor, kernel: Kernel, spec: BootstrapSpec, *, paired: bool
) -> Interval | None:
    """Interval of the unbiased squared MMD over all samples.

    Pairs of copies of one sample are left out of a replicate, as the estimate leaves out pairs of a sample with itself:
    without this, every replicate would be too large by about (mean of k(x, x) - mean of k(x, x')) / N.

    Args:
        features: [N, D].
        reference: [M, D].
        kernel: Such as `polynomial_kernel`.
        spec: Of the drawing.
        paired: As `squared_mmd`.
    """
    check_features(features, reference)
    counts_RN, counts_RM = _both_counts(features, reference, spec.num_replicates, spec.seed, paired)
    if not spec.num_replicates:
        return None
    return percentile_interval(squared_mmd_replicates(features, reference, kernel, counts_RN, counts_RM, paired=paired))


def _both_counts(
    features: Tensor, reference: Tensor, num_replicates: int, seed: int, paired: bool
) -> tuple[Tensor, Tensor]:
    counts_RN = resample_counts(len(features), num_replicates, seed)
    if not paired:
        return counts_RN, resample_counts(len(reference), num_replicates, seed + 1)
    if len(features) != len(reference):
        raise config_error(
            "features, reference",
            (len(features), len(reference)),
            allowed="equal numbers of paired samples",
            fix="pair them",
        )
    return counts_RN, counts_RN


def _column(name: str, values: Sequence[float] | Tensor) -> Tensor:
    column = torch.as_tensor(values, dtype=torch.float64).cpu()
    if column.ndim != 1 or not len(column):
        raise config_error(name, tuple(column.shape), allowed="[N] with N >= 1", fix="pass one value per sample")
    return column
