"""Frechet distance between two sets of features (FID when the features are Inception's; Heusel et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqat.errors import config_error


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the Gaussians fitted to two sets.

    Args:
        features: [N, D].
        reference: [M, D].

    Returns:
        The distance, 0 for equal sets. Biased upwards for few samples: compare only figures of the same N and M.

    Raises:
        ConfigError: Fewer than two samples, or different numbers of features.

    Numerics: float64. With centred rows A and B divided by the roots of N - 1 and M - 1 the covariances are A^T A and B^T B,
        and the trace of the root is the sum of the singular values of A B^T, which is exact also for fewer samples than
        features. With more samples it is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.
        In neither has an imaginary part to be cut off.
    """
    check_features(features, reference)
    x, y = features.double(), reference.double()
    return weighted_frechet_distance(x, y, x.new_ones(len(x)), y.new_ones(len(y)))


def weighted_frechet_distance(features: Tensor, reference: Tensor, counts_N: Tensor, counts_M: Tensor) -> float:
    """`frechet_distance` of sets in which every row is there as often as its count says.

    Args:
        features: float64 [N, D].
        reference: float64 [M, D].
        counts_N, counts_M: 0 or more, with a sum of 2 or more each.
    """
    mean_1, centred_1 = _centred(features, counts_N.to(features.device))
    mean_2, centred_2 = _centred(reference, counts_M.to(reference.device))
    traces = centred_1.square().sum() + centred_2.square().sum()
    distance = (mean_1 - mean_2).square().sum() + traces - 2 * _trace_root(centred_1, centred_2)
    return max(0.0, float(distance))


def check_features(features: Tensor, reference: Tensor) -> None:
    """Refuses what is no pair of feature sets.

    Raises:
        ConfigError: Fewer than two samples, or different numbers of features.
    """
    for name, value in (("features", features), ("reference", reference)):
        if value.ndim != 2 or len(value) < 2:
            raise config_error(name, tuple(value.shape), allowed="[N, D] with N >= 2", fix="evaluate more images")
    if features.shape[1] != reference.shape[1]:
        raise config_error(
            "features", tuple(features.shape), allowed=f"{reference.shape[1]} features", fix="use the same extractor"
        )


def _centred(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D], and the rows that are there, centred and scaled so that their Gram matrix is the covariance."""
    is_there = counts > 0
    rows, weights = features[is_there], counts[is_there].to(features.dtype)
    num = weights.sum()
    mean = (weights @ rows) / num
    return mean, (rows - mean) * (weights / (num - 1)).sqrt()[:, None]


def _trace_root(first: Tensor, second: Tensor) -> Tensor:
    """Trace of the root of the product of the covariances of `_centred` rows [N, D] and [M, D]."""
    if max(len(first), len(second)) <= first.shape[1]:
        return torch.linalg.svdvals(first @ second.T).sum()
    root = _symmetric_root(first.T @ first)
    product = root @ (second.T @ second) @ root
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
