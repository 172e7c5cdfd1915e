"""Laws of the distances between spoken spectrograms and of the error rates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fraqat.errors import ConfigError
from fraqat.evaluation.speech import (
    align,
    character_error_rate,
    edit_distance,
    from_waveforms,
    log_spectral_distance_db,
    mel_cepstral_distortion_db,
    speech_quality,
    word_error_rate,
)


def speech(num_frames: int = 20, seed: int = 0) -> Tensor:
    """A log10-mel spectrogram that changes slowly."""
    steps = torch.randn(num_frames, 80, generator=torch.Generator().manual_seed(seed))
    return steps.cumsum(0) * 0.3 - 2


def cosine(order: int) -> Tensor:
    """The shape of cepstrum `order` over the 80 bands, as natural logarithm."""
    return torch.cos(math.pi * order * (torch.arange(80) + 0.5) / 80)


@pytest.mark.parametrize("distance", [mel_cepstral_distortion_db, log_spectral_distance_db])
@pytest.mark.parametrize("aligned", [True, False])
def test_equal_speech_has_no_distance(distance, aligned: bool) -> None:
    assert distance(speech(), speech(), aligned=aligned) == 0


@pytest.mark.parametrize("distance", [mel_cepstral_distortion_db, log_spectral_distance_db])
@pytest.mark.parametrize("aligned", [True, False])
def test_distances_are_symmetric(distance, aligned: bool) -> None:
    there = distance(speech(seed=1), speech(seed=2), aligned=aligned)
    assert there > 1
    assert distance(speech(seed=2), speech(seed=1), aligned=aligned) == pytest.approx(there)


def test_ten_times_the_magnitude_is_20_db_and_no_cepstral_distortion() -> None:
    assert log_spectral_distance_db(speech() + 1, speech()) == pytest.approx(20, abs=1e-4)
    assert mel_cepstral_distortion_db(speech() + 1, speech()) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("order", [1, 5, 13])
def test_a_cosine_over_the_bands_distorts_by_its_root_mean_square(order: int) -> None:
    changed = speech() + 0.5 * cosine(order) / math.log(10)
    wanted_db = 10 / math.log(10) * math.sqrt(2) * 0.5
    assert mel_cepstral_distortion_db(changed, speech(), aligned=False) == pytest.approx(wanted_db, rel=1e-5)
    assert log_spectral_distance_db(changed, speech(), aligned=False) == pytest.approx(wanted_db, rel=1e-5)


def test_cepstra_above_the_count_do_not_matter() -> None:
    changed = speech() + 0.5 * cosine(14) / math.log(10)
    assert mel_cepstral_distortion_db(changed, speech(), aligned=False) == pytest.approx(0, abs=1e-4)
    assert mel_cepstral_distortion_db(changed, speech(), aligned=False, num_cepstra=14) > 2


def test_all_cepstra_and_the_loudness_make_up_the_log_spectral_distance() -> None:
    first, second = speech(1, seed=1), speech(1, seed=2)
    loudness_db = 20 * (first.mean() - second.mean())
    shape_db = mel_cepstral_distortion_db(first, second, num_cepstra=79)
    whole_db = log_spectral_distance_db(first, second)
    assert math.hypot(shape_db, float(loudness_db)) == pytest.approx(whole_db, rel=1e-4)


def test_alignment_undoes_a_stretch_in_time() -> None:
    stretched = speech().repeat_interleave(torch.tensor([1, 3, 2, 1] * 5), 0)
    assert len(stretched) == 35
    assert mel_cepstral_distortion_db(stretched, speech()) == 0
    assert log_spectral_distance_db(speech(), stretched) == 0


def test_alignment_never_raises_the_summed_cost() -> None:
    first, second = speech(12, 3), speech(12, 4)
    i, j = align(first, second)
    pairs = [mel_cepstral_distortion_db(first[a : a + 1], second[b : b + 1]) for a, b in zip(i, j, strict=True)]
    straight = [mel_cepstral_distortion_db(first[a : a + 1], second[a : a + 1]) for a in range(12)]
    assert sum(pairs) <= sum(straight) + 1e-6


@given(st.integers(1, 9), st.integers(1, 9))
def test_an_alignment_runs_from_corner_to_corner_in_single_steps(num_first: int, num_second: int) -> None:
    i, j = align(speech(num_first, 1), speech(num_second, 2))
    assert (int(i[0]), int(j[0])) == (0, 0)
    assert (int(i[-1]), int(j[-1])) == (num_first - 1, num_second - 1)
    steps = {(int(a), int(b)) for a, b in zip(i.diff(), j.diff(), strict=True)}
    assert steps <= {(0, 1), (1, 0), (1, 1)}


def test_different_lengths_need_alignment() -> None:
    with pytest.raises(ConfigError, match=r"frames of mel and reference = \(20, 21\).* aligned=True"):
        log_spectral_distance_db(speech(20), speech(21), aligned=False)
    with pytest.raises(ConfigError, match="shapes of mel and reference"):
        log_spectral_distance_db(speech(20), speech(20)[:, :40])


words = st.lists(st.sampled_from(["red", "two", "on"]), max_size=5)


@given(words, words, words)
def test_the_edit_distance_is_a_metric(a: list[str], b: list[str], c: list[str]) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_known_edit_distances() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3


def test_error_rates_count_over_all_words() -> None:
    heard, texts = ["draw red", "find blue two now"], ["draw red two", "find blue two"]
    assert word_error_rate(heard, texts) == pytest.approx(2 / 6)
    assert word_error_rate(texts, texts) == 0
    assert character_error_rate(["red  tow"], ["red two"]) == pytest.approx(2 / 7)
    with pytest.raises(ConfigError, match="numbers of heard and wanted texts"):
        word_error_rate(heard, texts[:1])


def test_quality_of_the_teachers_own_speech_is_perfect() -> None:
    mels = [speech(seed=1), speech(15, seed=2)]
    quality = speech_quality(mels, mels, ["a b", "c"], lambda mel: "a b" if len(mel) == 20 else "d")
    assert quality.num_utterances == 2
    assert quality.mel_cepstral_distortion_db == quality.log_spectral_distance_db == quality.length_difference == 0
    assert quality.word_error_rate == quality.teacher_word_error_rate == pytest.approx(1 / 3)
    assert quality.character_error_rate == pytest.approx(1 / 4)


def test_quality_sees_a_student_that_stops_early_and_distorts() -> None:
    teacher = [speech(20), speech(20, 1)]
    student = [speech(20)[:10], speech(20, 1) + 0.1 * torch.randn(20, 80)]
    quality = speech_quality(student, teacher)
    assert quality.length_difference == pytest.approx(0.25)
    assert quality.log_spectral_distance_db > 1
    assert quality.word_error_rate is None
    with pytest.raises(ConfigError, match=r"= \(2, 1, 1\)"):
        speech_quality(student, teacher[:1])


def test_a_recognizer_of_waveforms_hears_what_the_vocoder_says() -> None:
    recognizer = from_waveforms(lambda waveform: f"{len(waveform)} samples", lambda mel: mel.flatten())
    assert recognizer(speech(3)) == "240 samples"
