"""Predictions from short runs."""

from __future__ import annotations

import math

import pytest

from fraqat.analysis import PilotRun, fit_pilot, pilot_table
from fraqat.errors import ConfigError


def pilots(omega: float = 0.5, steps: tuple[int, ...] = (20, 40, 80)) -> list[PilotRun]:
    return [PilotRun(n, 0.1 * n**-omega) for n in steps]


def test_a_power_law_is_found_and_undone() -> None:
    law = fit_pilot(pilots())
    assert law.omega == pytest.approx(0.5)
    assert law.factor == pytest.approx(0.1)
    assert law.loss(320) == pytest.approx(0.1 * 320**-0.5)
    assert law.steps_for(law.loss(320)) == pytest.approx(320)
    assert law.loss_range(320) == pytest.approx((law.loss(320), law.loss(320)))


@pytest.mark.parametrize("steps", [(20, 40, 80), (10, 25, 70, 150)])
def test_a_floor_is_found(steps: tuple[int, ...]) -> None:
    law = fit_pilot([PilotRun(n, 0.004 + 0.1 * n**-0.8) for n in steps])
    assert law.floor == pytest.approx(0.004, rel=0.02)
    assert law.omega == pytest.approx(0.8, rel=0.02)
    assert law.loss(640) == pytest.approx(0.004 + 0.1 * 640**-0.8, rel=0.01)
    assert law.steps_for(law.loss(640)) == pytest.approx(640)
    assert law.steps_for(0.003) == law.steps_range(0.003)[1] == math.inf


def test_two_lengths_tell_of_no_floor() -> None:
    law = fit_pilot([PilotRun(20, 0.02), PilotRun(80, 0.0105)])
    assert law.floor == 0
    assert law.loss(20) == pytest.approx(0.02)


def test_a_loss_that_falls_ever_faster_has_no_floor() -> None:
    assert fit_pilot([PilotRun(20, 0.02), PilotRun(40, 0.015), PilotRun(80, 0.009)]).floor == 0


def test_ranges_hold_the_prediction_and_grow_with_disagreement() -> None:
    law = fit_pilot([PilotRun(20, 0.02), PilotRun(40, 0.015), PilotRun(80, 0.009)])
    low, high = law.loss_range(320)
    assert low < law.loss(320) < high
    few, many = law.steps_range(0.006)
    assert few < law.steps_for(0.006) < many
    bent = fit_pilot([PilotRun(20, 0.02), PilotRun(40, 0.013), PilotRun(80, 0.0105)])
    low, high = bent.loss_range(320)
    assert low < high == bent.loss(320)  # no two pilots know of a floor
    flat = fit_pilot([PilotRun(20, 0.02), PilotRun(40, 0.013), PilotRun(80, 0.0135), PilotRun(160, 0.008)])
    assert flat.steps_range(0.004)[1] == math.inf


def test_one_wild_pilot_of_many_does_not_carry_the_law_away() -> None:
    wild = [*pilots(steps=(20, 30, 40, 60, 80)), PilotRun(50, 0.5)]
    assert fit_pilot(wild).omega == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("runs", [[], [PilotRun(20, 0.1)], [PilotRun(20, 0.1), PilotRun(20, 0.2)]])
def test_one_length_is_refused(runs: list[PilotRun]) -> None:
    with pytest.raises(ConfigError, match=r"--pilot = .* two or more different lengths"):
        fit_pilot(runs)


def test_losses_that_rise_are_refused() -> None:
    with pytest.raises(ConfigError, match="fall with the number of steps"):
        fit_pilot([PilotRun(20, 0.1), PilotRun(40, 0.2)])


@pytest.mark.parametrize(("steps", "loss"), [(0, 0.1), (20, 0.0), (20, math.nan)])
def test_what_is_no_run_is_refused(steps: int, loss: float) -> None:
    with pytest.raises(ConfigError):
        PilotRun(steps, loss)


def test_the_table_names_a_long_reach() -> None:
    law = fit_pilot(pilots())
    near = pilot_table(pilots(), law, 200, law.loss(320), "note")
    far = pilot_table(pilots(), law, 200, law.loss(3200), "note")
    rows = {row["what"]: row for row in near.to_json()["rows"]}
    assert rows["planned run"]["steps"] == 200
    assert rows["steps for the loss"]["steps"] == 320
    assert "note" in near.notes
    assert not any("10 times" in note for note in near.notes)
    assert any("10 times the longest pilot" in note for note in far.notes)
    assert len(pilot_table(pilots(), law, 200, None, "note").rows) == 4


def test_the_table_names_a_loss_below_the_floor() -> None:
    runs = [PilotRun(n, 0.004 + 0.1 * n**-0.8) for n in (20, 40, 80)]
    table = pilot_table(runs, fit_pilot(runs), 200, 0.002, "note")
    assert table.to_json()["rows"][-1]["steps"] is None
    assert any("no length comes below 0.00" in note for note in table.notes)
