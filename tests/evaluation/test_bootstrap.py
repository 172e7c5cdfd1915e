"""Laws of the bootstrap intervals: against NumPy's resamplings, by their coverage, and for pairs."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from fraqat.errors import ConfigError
from fraqat.evaluation.bootstrap import (
    BootstrapSpec,
    frechet_interval,
    mean_interval,
    median_interval,
    mmd_interval,
    percentile_interval,
    ratio_interval,
    resample_counts,
)
from fraqat.evaluation.frechet import frechet_distance, weighted_frechet_distance
from fraqat.evaluation.language import LanguageRows
from fraqat.evaluation.mmd import polynomial_kernel, squared_mmd
from fraqat.evaluation.speech import SpeechRows

SPEC = BootstrapSpec(num_replicates=400, num_frechet=100, seed=3)


def drawn_rows(counts: torch.Tensor) -> torch.Tensor:
    """The rows that a replicate holds, as often as it holds them."""
    return torch.repeat_interleave(torch.arange(len(counts)), counts.long())


def values(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def test_every_replicate_draws_as_many_as_there_are_and_equal_seeds_draw_equally() -> None:
    counts = resample_counts(7, 50, seed=1)
    assert counts.sum(1).tolist() == [7.0] * 50
    assert torch.equal(counts, resample_counts(7, 50, seed=1))
    assert not torch.equal(counts, resample_counts(7, 50, seed=2))
    assert float((resample_counts(200, 50, seed=0) > 0).double().mean()) == pytest.approx(1 - math.exp(-1), abs=0.01)


@pytest.mark.parametrize("num", [1, 2, 9, 10])
def test_mean_and_median_intervals_equal_those_of_the_drawn_samples(num: int) -> None:
    sample = values(num)
    rows = [sample[drawn_rows(counts)].numpy() for counts in resample_counts(num, 400, seed=3)]
    for interval, statistic in ((mean_interval, np.mean), (median_interval, np.median)):
        low, high = np.percentile([statistic(row) for row in rows], [2.5, 97.5])
        found = interval(sample, SPEC)
        assert found is not None
        assert found == pytest.approx((low, high), rel=1e-12)


def test_ratio_interval_draws_numerator_and_denominator_together() -> None:
    lengths = torch.tensor([3.0, 10.0, 4.0, 8.0, 5.0])
    low, high = ratio_interval(0.25 * lengths, lengths, SPEC) or (0, 0)
    assert (low, high) == pytest.approx((0.25, 0.25))
    low, high = ratio_interval([0, 1, 0, 4, 0], lengths, SPEC) or (0, 0)
    assert low < 5 / 30 < high


def test_intervals_of_means_cover_the_mean_in_about_95_of_100_cases() -> None:
    covered = 0
    for seed in range(300):
        sample = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        low, high = mean_interval(sample, BootstrapSpec(num_replicates=300, seed=seed)) or (0, 0)
        covered += low <= 0 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_a_weighted_frechet_distance_is_that_of_the_drawn_rows() -> None:
    for width in (5, 90):  # fewer and more features than samples
        x, y = torch.randn(40, width).double(), torch.randn(30, width).double() + 0.5
        w, v = resample_counts(40, 1, seed=0)[0], resample_counts(30, 1, seed=1)[0]
        wanted = frechet_distance(x[drawn_rows(w)], y[drawn_rows(v)])
        assert weighted_frechet_distance(x, y, w, v) == pytest.approx(wanted, rel=1e-7)


def test_replicates_of_the_frechet_distance_lie_above_it_and_the_interval_around_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(80, 16, generator=generator).double() for _ in range(2))
    distance = frechet_distance(x, y)
    counts = resample_counts(80, 100, seed=3)
    others = resample_counts(80, 100, seed=4)
    replicates = [weighted_frechet_distance(x, y, w, v) for w, v in zip(counts, others, strict=True)]
    assert min(replicates) > distance  # the bias that the shift takes out
    low, high = frechet_interval(x, y, SPEC, paired=False) or (0, 0)
    assert low < distance < high
    assert high - low == pytest.approx(np.subtract(*np.percentile(replicates, [97.5, 2.5])), rel=1e-9)


def test_pairs_are_drawn_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator) * torch.rand(60, 1, generator=generator).exp()
    y = x + 0.01 * torch.randn(60, 4, generator=generator)
    width = {}
    for paired in (True, False):
        low, high = frechet_interval(x, y, SPEC, paired=paired) or (0, 0)
        width[paired] = high - low
    assert width[True] < 0.1 * width[False]
    with pytest.raises(ConfigError, match="equal numbers of paired samples"):
        frechet_interval(x, y[:50], SPEC, paired=True)


@pytest.mark.parametrize("paired", [True, False])
def test_mmd_intervals_lie_around_the_unbiased_estimate(paired: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 4, generator=generator)
    y = torch.randn(100, 4, generator=generator) + 0.7
    estimate = squared_mmd(x, y, polynomial_kernel, paired=paired)
    interval = mmd_interval(x, y, polynomial_kernel, SPEC, paired=paired)
    assert interval is not None
    assert interval.low < estimate < interval.high
    assert (interval.low + interval.high) / 2 == pytest.approx(estimate, abs=0.25 * (interval.high - interval.low))


def test_two_samples_give_finite_intervals() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for paired in (True, False):
        found = (*(mmd_interval(x, y, polynomial_kernel, SPEC, paired=paired) or ()),)
        found += (*(frechet_interval(x, y, SPEC, paired=paired) or ()),)
        assert len(found) == 4
        assert all(map(math.isfinite, found))


def test_no_replicates_give_no_intervals() -> None:
    none = BootstrapSpec(num_replicates=0, num_frechet=0)
    x = torch.randn(5, 2)
    assert mean_interval([1.0, 2.0], none) is None
    assert median_interval([1.0, 2.0], none) is None
    assert frechet_interval(x, x, none, paired=True) is None
    assert mmd_interval(x, x, polynomial_kernel, none, paired=True) is None


def test_bad_settings_and_columns_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.bootstrap\.num_replicates = 5 .* 40 or more"):
        BootstrapSpec(num_replicates=5)
    with pytest.raises(ConfigError, match=r"evaluation\.bootstrap\.num_frechet = -1"):
        BootstrapSpec(num_frechet=-1)
    with pytest.raises(ConfigError, match=r"evaluation\.bootstrap\.seed = -1"):
        BootstrapSpec(seed=-1)
    with pytest.raises(ConfigError, match="one value per sample"):
        mean_interval([], SPEC)
    with pytest.raises(ConfigError, match="denominators = 1"):
        ratio_interval([1.0, 2.0], [1.0], SPEC)
    with pytest.raises(ConfigError, match="none finite"):
        percentile_interval(torch.tensor([math.nan]))


def test_language_intervals_are_of_rows() -> None:
    tokens = torch.tensor([4.0, 10.0, 6.0, 8.0])
    rows = LanguageRows(tokens, 2 * tokens, tokens * torch.tensor([1.0, 3.0, 2.0, 2.0]), 0 * tokens, tokens / 2)
    found, quality = rows.intervals(SPEC), rows.quality()
    assert found["teacher_perplexity"] == pytest.approx((math.exp(2), math.exp(2)))
    assert found["student_perplexity"].low < quality.student_perplexity < found["student_perplexity"].high
    assert found["student_perplexity"].high <= math.exp(3) + 1e-9
    assert found["kl"] == (0, 0)
    assert found["top1_agreement"] == pytest.approx((0.5, 0.5))
    assert rows.intervals(BootstrapSpec(num_replicates=0)) == {}


def test_speech_intervals_are_of_utterances() -> None:
    rows = SpeechRows((1.0, 2.0, 6.0), (2.0,) * 3, (0.1, 0.0, 0.2), word_errors=((0, 3), (2, 4), (1, 3)))
    found, quality = rows.intervals(SPEC), rows.quality()
    assert set(found) == {
        "mel_cepstral_distortion_db",
        "log_spectral_distance_db",
        "length_difference",
        "word_error_rate",
    }
    assert quality.word_error_rate == pytest.approx(0.3)
    assert quality.character_error_rate is None
    assert quality.mel_cepstral_distortion_db == statistics.mean((1.0, 2.0, 6.0))
    assert 0 <= found["word_error_rate"].low < 0.3 < found["word_error_rate"].high <= 0.5
    assert found["log_spectral_distance_db"] == pytest.approx((2.0, 2.0))
