"""A few faults for real in every run of the suite; all of them with `-m faults`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fault_lab import BROKEN, EQUAL, STOPPED, Lab
from faults import FAULTS, run_fault

SHORT = (
    "kill -9 at a random moment",
    "kill -9 during a save",
    "SIGTERM",
    "newest checkpoint damaged",
    "not finite once, on_non_finite: rewind",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", SHORT)
def test_a_disturbed_run_ends_with_the_same_weights(lab: Lab, name: str) -> None:
    outcomes = run_fault(lab, name, 1)
    assert [outcome.kind for outcome in outcomes] == [EQUAL], outcomes


def test_a_file_that_grows_too_large_stops_a_run_with_a_message(lab: Lab) -> None:
    (found,) = run_fault(lab, "file larger than allowed (RLIMIT_FSIZE)", 1)
    assert found.kind == STOPPED, found
    assert "files saved earlier are untouched. Fix: raise the limit" in found.text


@pytest.mark.faults
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_survived(lab: Lab, name: str, pytestconfig: pytest.Config) -> None:
    outcomes = run_fault(lab, name, pytestconfig.getoption("--fault-trials"))
    assert not [outcome for outcome in outcomes if outcome.kind == BROKEN]
