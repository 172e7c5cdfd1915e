"""Maximum mean discrepancy between two sets of features: KID and CMMD, whose estimates are unbiased for few samples.

KID: Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401. CMMD: Jayasumana et al., "Rethinking FID", arXiv 2401.09603.
The estimators: Gretton et al., "A kernel two-sample test", JMLR 2012.

Shape suffixes: R replicates, N and M samples of the two sets, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fraqat.errors import config_error
from fraqat.evaluation.frechet import check_features

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Rows [N, D] and [M, D] -> k of every pair, [N, M]."""

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
_CHUNK_ROWS = 1024


def polynomial_kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """KID's (x . y / D + 1)^3, [N, M]."""
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def gaussian_kernel(x_ND: Tensor, y_MD: Tensor, *, sigma: float) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)), [N, M]."""
    squares = x_ND.square().sum(1)[:, None] + y_MD.square().sum(1)[None] - 2 * x_ND @ y_MD.T
    return torch.exp(-squares.clamp(min=0) / (2 * sigma**2))


cmmd_kernel: Kernel = partial(gaussian_kernel, sigma=CMMD_SIGMA)
"""CMMD's kernel, for embeddings of length 1."""


def unit_rows(features: Tensor) -> Tensor:
    """Rows divided by their lengths, float64 [N, D], as CMMD takes CLIP's embeddings."""
    rows = features.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def squared_mmd(
    features: Tensor, reference: Tensor, kernel: Kernel, *, paired: bool = False, biased: bool = False
) -> float:
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y): squared MMD of the distributions behind two sets.

    Args:
        features: [N, D].
        reference: [M, D].
        kernel: k.
        paired: Rows of equal index depend on each other, as images of one prompt and seed do (N = M): pairs (x_i, y_i) are
            left out of the last mean too (Gretton et al., Eq. 4), without which the estimate is too small. 0 for equal sets.
        biased: Keep pairs of a sample with itself in all means (Gretton et al., Eq. 5): too large by order 1 / N, never
            negative.

    Returns:
        The estimate. Unbiased ones can be negative.

    Raises:
        ConfigError: Fewer than two samples, different numbers of features, or paired sets of different sizes.
    """
    check_features(features, reference)
    if biased:
        x, y = features.double(), reference.double()
        return float(_mean(kernel, x, x) + _mean(kernel, y, y) - 2 * _mean(kernel, x, y))
    once_N, once_M = (torch.ones(1, len(rows), dtype=torch.float64) for rows in (features, reference))
    return float(squared_mmd_replicates(features, reference, kernel, once_N, once_M, paired=paired)[0])


def squared_mmd_replicates(
    features: Tensor, reference: Tensor, kernel: Kernel, counts_RN: Tensor, counts_RM: Tensor, *, paired: bool
) -> Tensor:
    """Unbiased `squared_mmd` of R sets in which every row is there as often as its count says.

    Args:
        features: [N, D].
        reference: [M, D].
        kernel: k; computed for 1024 rows at a time, in float64.
        counts_RN, counts_RM: 0 or more; equal where `paired`.
        paired: As `squared_mmd`.

    Returns:
        [R]; NaN where a set holds one sample only, again and again.

    Raises:
        ConfigError: Paired sets of different sizes.
    """
    if paired and len(features) != len(reference):
        raise config_error(
            "features, reference",
            (len(features), len(reference)),
            allowed="equal numbers of paired samples",
            fix="pass paired=False",
        )
    x, y = features.double().cpu(), reference.double().cpu()
    within = _mean_of_others(kernel, x, x, counts_RN) + _mean_of_others(kernel, y, y, counts_RM)
    if paired:
        return within - 2 * _mean_of_others(kernel, x, y, counts_RN)
    across = _weighted_sum(kernel, x, y, counts_RN, counts_RM) / (counts_RN.sum(1) * counts_RM.sum(1))
    return within - 2 * across


def kernel_distance(
    features: Tensor,
    reference: Tensor,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    paired: bool = False,
) -> float:
    """KID: mean over random subsets of the unbiased squared MMD with `polynomial_kernel` (arXiv 1801.01401, section 4).

    Args:
        features: [N, D], Inception's for KID.
        reference: [M, D].
        num_subsets: Subsets, drawn without replacement.
        subset_size: Samples of each set in a subset. Where neither set has more samples, all are taken, once.
        seed: Of the subsets.
        paired: As `squared_mmd`; a subset then holds the same rows of both.

    Returns:
        The estimate, not multiplied by 1000 as papers often show it. Unbiased, so it can be negative.

    Raises:
        ConfigError: As `squared_mmd`; a subset of fewer than two samples, or none.
    """
    check_features(features, reference)
    for name, value, least in (("num_subsets", num_subsets, 1), ("subset_size", subset_size, 2)):
        if value < least:
            raise config_error(name, value, allowed=f"{least} or more", fix="use more")
    if max(len(features), len(reference)) <= subset_size:
        return squared_mmd(features, reference, polynomial_kernel, paired=paired)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(num_subsets):
        rows = torch.randperm(len(features), generator=generator)[:subset_size]
        others = rows if paired else torch.randperm(len(reference), generator=generator)[:subset_size]
        total += squared_mmd(features[rows], reference[others], polynomial_kernel, paired=paired)
    return total / num_subsets


def cmmd(features: Tensor, reference: Tensor, *, paired: bool = False, biased: bool = False) -> float:
    """CMMD: 1000 times the squared MMD of CLIP embeddings of length 1 with a Gaussian kernel of sigma 10.

    Args:
        features: [N, D] image embeddings of CLIP, of any length (divided by it here).
        reference: [M, D].
        paired: As `squared_mmd`.
        biased: False is the estimator of the paper's text; True that of its published code, which is larger by up to 20 / N
            + 20 / M.

    Raises:
        ConfigError: As `squared_mmd`.
    """
    check_features(features, reference)
    return CMMD_SCALE * squared_mmd(
        unit_rows(features), unit_rows(reference), cmmd_kernel, paired=paired, biased=biased
    )


def _mean(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    ones = (torch.ones(1, len(rows), dtype=torch.float64, device=rows.device) for rows in (x, y))
    return _weighted_sum(kernel, x, y, *ones)[0] / (len(x) * len(y))


def _weighted_sum(kernel: Kernel, x: Tensor, y: Tensor, counts_x: Tensor, counts_y: Tensor) -> Tensor:
    """Sum of count_i count_j k(x_i, y_j) over all pairs, [R]."""
    total = torch.zeros(len(counts_x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        total += ((counts_x[:, rows] @ kernel(x[rows], y)) * counts_y).sum(1)
    return total


def _mean_of_others(kernel: Kernel, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Mean of k(x_i, y_j) over pairs with i other than j, [R]."""
    own = torch.cat([kernel(x[i : i + 1], y[i : i + 1])[0] for i in range(len(x))])
    squares = counts.square()
    return (_weighted_sum(kernel, x, y, counts, counts) - squares @ own) / (counts.sum(1).square() - squares.sum(1))
