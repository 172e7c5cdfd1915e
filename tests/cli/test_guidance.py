"""What guidance and noise levels a run has is said at its start; what cannot be is refused before data are encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import SHORT_ARGUMENTS

from fraqat.distill import Distiller
from fraqat.errors import OutputError

pytestmark = pytest.mark.xdist_group("cli")

ODD = ("--set", "train.batch_size=6", "--set", "train.accumulation=2", "--set", "train.guidance_scale=auto")
REFUSED = (
    "train.batch_size / train.accumulation = 3 is not possible: allowed is an even number with train.guidance_scale"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRAQAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_odd_part_of_a_batch_is_refused_before_data_are_encoded(fraqat, tmp_path: Path, cache: Path) -> None:
    done = fraqat("train", "color-digits", "--out", tmp_path / "run", *SHORT_ARGUMENTS, *ODD)
    assert done.code == 2
    assert REFUSED in done.err
    assert not cache.exists()


def test_a_dry_run_refuses_it_too(fraqat) -> None:
    done = fraqat("train", "color-digits", "--dry-run", *SHORT_ARGUMENTS, *ODD)
    assert done.code == 2
    assert REFUSED in done.err


def test_it_is_refused_before_a_baseline_is_trained(fraqat, tmp_path: Path, cache: Path) -> None:
    single = "baselines={single: {train: {guidance_scale: null}}}"
    arguments = (*SHORT_ARGUMENTS, *ODD, "--set", single, "--baselines")
    done = fraqat("train", "color-digits", "--out", tmp_path / "run", *arguments)
    assert done.code == 2
    assert REFUSED in done.err
    assert not cache.exists() and not (tmp_path / "run" / "baselines").exists()


def test_a_transformer_without_a_second_prediction_takes_odd_parts(fraqat) -> None:
    assert fraqat("train", "flux-schnell-tiny", "--dry-run", *ODD).code == 0


def test_a_run_says_what_it_learns_and_how_levels_are_drawn(
    fraqat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(distiller: Distiller) -> None:
        raise OutputError("the test ends here")

    monkeypatch.setattr(Distiller, "run", stop)
    automatic = ("--set", "train.guidance_scale=auto", "--set", "train.timestep_importance=auto")
    guidance = ("--set", "sampler.guidance_scale=3.0")
    done = fraqat("train", "color-digits", "--out", tmp_path / "run", *SHORT_ARGUMENTS, *automatic, *guidance)
    assert done.code == OutputError.exit_code
    assert "what guidance by 3 makes of two outputs is learned" in done.err
    assert "noise levels are drawn by the student's error, in 16 parts, with losses weighted back" in done.err
