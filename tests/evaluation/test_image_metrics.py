"""Laws of the metrics, against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from fraqat.data.color_digits import compose, held_out_combinations
from fraqat.errors import ConfigError
from fraqat.evaluation import ColorDigitsJudge, frechet_distance, image_quality, paired_psnr_db
from fraqat.zoo import zoo_path


def reference_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The textbook formula with SciPy's matrix root."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(c1 @ c2)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(root)))


@given(seed=st.integers(0, 10_000), num=st.integers(30, 80), shift=st.floats(-2, 2), scale=st.floats(0.2, 3))
def test_frechet_equals_the_textbook_formula(seed: int, num: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 6, generator=generator, dtype=torch.float64)
    y = scale * torch.randn(num + 7, 6, generator=generator, dtype=torch.float64) + shift
    assert frechet_distance(x, y) == pytest.approx(reference_frechet(x.numpy(), y.numpy()), rel=1e-6, abs=1e-6)


def test_frechet_is_zero_for_equal_sets_and_symmetric() -> None:
    x, y = torch.randn(50, 8), torch.randn(40, 8) * 2
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))


def test_frechet_works_with_fewer_samples_than_features() -> None:
    x, y = torch.randn(10, 64), torch.randn(10, 64) + 1
    assert frechet_distance(x, y) > 30


def test_frechet_refuses_single_samples_and_other_features() -> None:
    with pytest.raises(ConfigError, match="N >= 2"):
        frechet_distance(torch.randn(1, 4), torch.randn(5, 4))
    with pytest.raises(ConfigError, match="4 features"):
        frechet_distance(torch.randn(5, 3), torch.randn(5, 4))


def test_psnr_of_a_known_error() -> None:
    reference = torch.full((2, 3, 4, 4), 0.5)
    noisy = reference.clone()
    noisy[1] += 0.1
    psnr = paired_psnr_db(noisy, reference)
    assert psnr[0] == 99.0
    assert psnr[1] == pytest.approx(20.0, abs=1e-4)


def test_adherence_sees_wrong_digits_and_wrong_colours() -> None:
    judge = ColorDigitsJudge(zoo_path("color-digits-classifier"))
    combinations = held_out_combinations()
    images = (compose(combinations, seed=3, split="test") + 1) / 2
    prompts = [item.prompt for item in combinations]
    right = image_quality(images, images, prompts, judge, judge)
    assert right.digit >= 0.9
    assert right.colors >= 0.98
    assert right.frechet == pytest.approx(0, abs=1e-6)
    wrong = image_quality(images, images, prompts[1:] + prompts[:1], judge, judge)
    assert wrong.digit < 0.3
    assert wrong.colors < 0.3
    recoloured = image_quality(images.flip(1), images, prompts, judge, judge)
    assert recoloured.frechet > 1
    assert recoloured.colors < 0.7
