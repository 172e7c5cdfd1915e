"""Trials of a loss that is infinite or a gradient that is NaN; each says what became of the run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from fault_child import POISONS, Settings
from fault_lab import BROKEN, EQUAL, Lab, Outcome, kill
from fraqat.distill import read_log


def _poisoned(lab: Lab, first_step: int = 0, **changes: Any) -> tuple[Settings, str]:
    """A run that a NaN or an infinity meets at a random step, and which of the two."""
    poison = lab.random.choice(POISONS)
    step = lab.random.randrange(first_step, 60)
    return lab.settings(lab.new_folder(), nan_at=step, poison=poison, **changes), poison


def nan_once(lab: Lab) -> Outcome:
    """It does not come again, `rewind`: back to the newest checkpoint, in the same process."""
    settings, poison = _poisoned(lab, train={"on_non_finite": {"action": "rewind"}})
    return _with_text(lab.judge(settings), poison)


def nan_once_stop(lab: Lab) -> Outcome:
    """The same with `stop`."""
    settings, _ = _poisoned(lab, first_step=1)
    return _stopped(lab, settings, "Fix:")


def nan_always(lab: Lab) -> Outcome:
    """It comes again at the same step, `rewind`: it stops, and nothing is lost."""
    settings, _ = _poisoned(lab, nan_times=99, train={"on_non_finite": {"action": "rewind"}})
    return _stopped(lab, settings, "came again at the same step", "It happened after 3 rewinds too")


def _stopped(lab: Lab, settings: Settings, *words: str) -> Outcome:
    said = lab.expect_stop(settings, 5, *words)
    return said if isinstance(said, Outcome) else lab.judge(dataclasses.replace(settings, nan_at=None), said)


_LOWER_RATE = {"on_non_finite": {"action": "lower_rate", "rate_factor": 0.6}}


def _too_high(lab: Lab) -> dict[str, Any]:
    """A run that is not finite as long as its rate is above two thirds of its peak."""
    step, poison = lab.random.randrange(60), lab.random.choice(POISONS)
    return {"nan_at": step, "poison": poison, "blow_up_over": 2e-3, "train": _LOWER_RATE}


def blown_up(lab: Lab) -> Outcome:
    """`lower_rate`: it goes back once, ends at the lower rate, and a second run ends with the same weights."""
    changes = _too_high(lab)
    settings = lab.settings(lab.new_folder(), **changes)
    found = lab.judge(settings, **changes)
    return _with_factors(found, settings)


def blown_up_and_killed(lab: Lab) -> Outcome:
    """The same with kill -9 at a random moment: the lower rate is in the checkpoint, or it is lowered again."""
    changes = _too_high(lab)
    _, span = lab.reference(**changes)
    settings = lab.settings(lab.new_folder(), **changes)
    pid = lab.start(settings)
    time.sleep(lab.random.uniform(0.0, span))
    kill(pid)
    found = lab.judge(settings, **changes)
    return _with_factors(found, settings, num_starts=2)


def _with_factors(found: Outcome, settings: Settings, num_starts: int = 1) -> Outcome:
    if found.kind != EQUAL:
        return found
    factors = [event["rate_factor"] for event in read_log(Path(settings.folder)) if event["event"] == "rewind"]
    if set(factors) != {0.6} or len(factors) > num_starts:
        return Outcome(BROKEN, f"rewinds to {factors} times the rate instead of 0.6, once in each process")
    return _with_text(found, str(settings.poison))


def _with_text(found: Outcome, text: str) -> Outcome:
    return dataclasses.replace(found, text=text) if found.kind == EQUAL else found
