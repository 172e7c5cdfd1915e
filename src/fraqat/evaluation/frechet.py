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

    Numerics: float64. The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is
        symmetric, so no imaginary part has to be cut off.
    """
    for name, value in (("features", features), ("reference", reference)):
        if value.ndim != 2 or len(value) < 2:
            raise config_error(name, tuple(value.shape), allowed="[N, D] with N >= 2", fix="evaluate more images")
    if features.shape[1] != reference.shape[1]:
        raise config_error(
            "features", tuple(features.shape), allowed=f"{reference.shape[1]} features", fix="use the same extractor"
        )
    mean_1, mean_2 = features.double().mean(0), reference.double().mean(0)
    cov_1, cov_2 = torch.cov(features.double().T), torch.cov(reference.double().T)
    root_1 = _symmetric_root(cov_1)
    product = root_1 @ cov_2 @ root_1
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root
    return max(0.0, float(distance))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
