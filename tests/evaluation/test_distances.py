"""Laws of the distances of distributions, against double loops, SciPy and torchmetrics."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from fraqat.errors import ConfigError
from fraqat.evaluation import cmmd, frechet_distance, kernel_distance
from fraqat.evaluation.mmd import cmmd_kernel, gaussian_kernel, polynomial_kernel, squared_mmd


def sets(num: int, others: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    x = torch.randn(num, width, generator=generator, dtype=torch.float64) @ mixing
    y = 1.3 * torch.randn(others, width, generator=generator, dtype=torch.float64) @ mixing + 0.2
    return x, y


def polynomial(x: Tensor, y: Tensor) -> float:
    return (float((x * y).sum()) / len(x) + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> float:
    return math.exp(-float((x - y).square().sum()) / (2 * 10**2))


def double_loop(x: Tensor, y: Tensor, kernel, *, paired: bool, biased: bool) -> float:
    def mean(left: Tensor, right: Tensor, without_own: bool) -> float:
        pairs = product(range(len(left)), range(len(right)))
        found = [kernel(left[i], right[j]) for i, j in pairs if not (without_own and i == j)]
        return sum(found) / len(found)

    return mean(x, x, not biased) + mean(y, y, not biased) - 2 * mean(x, y, paired and not biased)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num", "paired"), [(9, False), (13, False), (13, True)])
def test_kid_and_cmmd_equal_a_double_loop(num: int, paired: bool, biased: bool) -> None:
    x, y = sets(num, 13, 6)
    wanted = double_loop(x, y, polynomial, paired=paired, biased=biased)
    assert squared_mmd(x, y, polynomial_kernel, paired=paired, biased=biased) == pytest.approx(wanted, rel=1e-9)
    if not biased:
        assert kernel_distance(x, y, paired=paired) == pytest.approx(wanted, rel=1e-9)
    unit_x, unit_y = (rows / rows.norm(dim=1, keepdim=True) for rows in (x, y))
    wanted = 1000 * double_loop(unit_x, unit_y, gaussian, paired=paired, biased=biased)
    assert cmmd(x, y, paired=paired, biased=biased) == pytest.approx(wanted, rel=1e-6)


def test_kernels_are_those_of_the_papers() -> None:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    assert float(polynomial_kernel(x, y)) == pytest.approx((1 / 2 + 1) ** 3)
    assert float(gaussian_kernel(x, y, sigma=2)) == pytest.approx(math.exp(-13 / 8))
    assert float(cmmd_kernel(x, y)) == pytest.approx(math.exp(-13 / 200))


def test_more_rows_than_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sets(50, 50, 4)
    whole = [squared_mmd(x, y, polynomial_kernel, paired=paired) for paired in (False, True)]
    monkeypatch.setattr("fraqat.evaluation.mmd._CHUNK_ROWS", 7)
    assert [squared_mmd(x, y, polynomial_kernel, paired=p) for p in (False, True)] == pytest.approx(whole, rel=1e-9)


def test_unbiased_estimates_of_equal_distributions_have_mean_zero_and_biased_ones_do_not() -> None:
    drawn = [torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(300)]
    found = {b: [squared_mmd(x, y, polynomial_kernel, biased=b) for x, y in drawn] for b in (False, True)}
    error = float(np.std(found[False])) / math.sqrt(300)
    assert abs(np.mean(found[False])) < 3 * error
    assert np.mean(found[True]) > 10 * error


def test_a_model_has_no_distance_from_itself_in_pairs_and_a_negative_one_without() -> None:
    x, _ = sets(20, 20, 6)
    assert kernel_distance(x, x, paired=True) == pytest.approx(0, abs=1e-12)
    assert cmmd(x, x, paired=True) == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, x) < -1e-3


def test_cmmd_takes_no_notice_of_lengths() -> None:
    x, y = sets(10, 12, 5)
    assert cmmd(3 * x, y * torch.rand(12, 1).add(0.5)) == pytest.approx(cmmd(x, y), rel=1e-6)


def test_subsets_of_kid_agree_with_all_samples_and_repeat() -> None:
    x, y = sets(400, 300, 4)
    whole = kernel_distance(x, y, subset_size=400)
    some = kernel_distance(x, y, num_subsets=200, subset_size=100, seed=1)
    assert some == pytest.approx(whole, rel=0.1)
    assert some != whole
    assert some == kernel_distance(x, y, num_subsets=200, subset_size=100, seed=1)
    assert some != kernel_distance(x, y, num_subsets=200, subset_size=100, seed=2)


def test_bad_sets_are_refused() -> None:
    x, y = sets(6, 5, 3)
    with pytest.raises(ConfigError, match="equal numbers of paired samples"):
        kernel_distance(x, y, paired=True)
    with pytest.raises(ConfigError, match="N >= 2"):
        cmmd(x[:1], y)
    with pytest.raises(ConfigError, match="3 features"):
        kernel_distance(x[:, :2], y)
    with pytest.raises(ConfigError, match="subset_size = 1"):
        kernel_distance(x, y, subset_size=1)
    with pytest.raises(ConfigError, match="num_subsets = 0"):
        kernel_distance(x, y, num_subsets=0)


def regularized_reference(x: np.ndarray, y: np.ndarray) -> float:
    """pytorch-fid's formula: SciPy's root of the product."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(c1 @ c2)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(np.real(root)))


@pytest.mark.parametrize(("num", "others", "width"), [(300, 280, 48), (200, 60, 32), (100, 40, 64), (40, 50, 64)])
def test_frechet_equals_scipys_formula(num: int, others: int, width: int) -> None:
    x, y = sets(num, others, width)
    assert frechet_distance(x, y) == pytest.approx(regularized_reference(x.numpy(), y.numpy()), rel=1e-3)


@pytest.mark.parametrize(("num", "others", "width"), [(300, 280, 48), (40, 50, 64)])
def test_frechet_equals_torchmetrics(num: int, others: int, width: int) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = sets(num, others, width)
    wanted = fid._compute_fid(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert frechet_distance(x, y) == pytest.approx(float(wanted), rel=1e-3)


def test_both_ways_to_the_frechet_distance_agree() -> None:
    x, y = sets(64, 64, 64)  # as many features as samples: singular values
    padded = frechet_distance(x, y)
    one_more = frechet_distance(x[:, :63], y[:, :63])  # fewer: eigenvalues
    direct = regularized_reference(x[:, :63].numpy(), y[:, :63].numpy())
    assert one_more == pytest.approx(direct, rel=1e-6)
    assert padded == pytest.approx(regularized_reference(x.numpy(), y.numpy()), rel=1e-3)
