"""The length that a quality needs, predicted from a few short runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from fraqat.errors import config_error
from fraqat.table import Table


@dataclass(frozen=True)
class PilotRun:
    """A finished short run.

    Args:
        num_steps: Optimizer steps, 1 or more.
        loss: Held-out distillation loss at its end, greater than 0.
    """

    num_steps: int
    loss: float

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise config_error("num_steps", self.num_steps, allowed="1 or more", fix="pass runs that train")
        if not (math.isfinite(self.loss) and self.loss > 0):
            raise config_error("loss", self.loss, allowed="a positive number", fix="pass runs that did not diverge")


@dataclass(frozen=True)
class PilotLaw:
    """L = floor + factor / steps^omega: the loss law of one model at one width.

    Args:
        factor: What a run of one step has above the floor.
        omega: Exponent, greater than 0.
        floor: Loss that no length goes below; 0 where the pilots show none.
        omegas: Exponents of every two runs of different lengths without a floor, in rising order: how sure `omega` is.
        centre: ln steps and ln loss in the middle of the pilots.
    """

    factor: float
    omega: float
    floor: float
    omegas: tuple[float, ...]
    centre: tuple[float, float]

    def loss(self, num_steps: float) -> float:
        """Predicted held-out loss of a finished run of so many steps."""
        return self.floor + self.factor * num_steps**-self.omega

    def steps_for(self, loss: float) -> float:
        """Steps of a run that ends at a loss; infinity at the floor and below."""
        return (self.factor / (loss - self.floor)) ** (1 / self.omega) if loss > self.floor else math.inf

    def loss_range(self, num_steps: float) -> tuple[float, float]:
        """The lowest and the highest of the law's own loss and those with the exponents of two pilots and no floor."""
        log_steps, log_loss = self.centre
        ends = [math.exp(log_loss - omega * (math.log(num_steps) - log_steps)) for omega in self.omegas]
        return min(*ends, self.loss(num_steps)), max(*ends, self.loss(num_steps))

    def steps_range(self, loss: float) -> tuple[float, float]:
        """The same of the steps; infinity where two pilots did not fall."""
        log_steps, log_loss = self.centre
        gap = log_loss - math.log(loss)
        ends = [math.exp(log_steps + gap / omega) if omega > 0 else math.inf for omega in self.omegas]
        return min(*ends, self.steps_for(loss)), max(*ends, self.steps_for(loss))


def fit_pilot(runs: Sequence[PilotRun]) -> PilotLaw:
    """A line through ln (loss - floor) over ln steps.

    Its slope is the median of those of every two runs (Theil and Sen), its offset that of all offsets. With three or more
    lengths the floor is the one, of 400 between 0 and the lowest loss, that brings the line nearest to all losses in their
    logarithms; with two it is 0.

    Args:
        runs: Of the same recipe but for its length, with two or more different lengths. Every run has its own whole schedule
            of the learning rate: a loss on the way of a longer run is another quantity.

    Raises:
        ConfigError: One length alone, or a loss that does not fall with the length.
    """
    lengths = sorted({run.num_steps for run in runs})
    if len(lengths) < 2:
        raise config_error(
            "--pilot", lengths, allowed="runs of two or more different lengths", fix="train one with twice the steps"
        )
    omegas, omega, offset = _line(runs, 0.0)
    if omega <= 0:
        raise config_error(
            "--pilot",
            [run.loss for run in runs],
            allowed="losses that fall with the number of steps",
            fix="lower train.learning_rate.peak, or make the pilots longer",
        )
    log_steps = statistics.fmean(math.log(run.num_steps) for run in runs)
    centre = (log_steps, offset - omega * log_steps)
    lowest = min(run.loss for run in runs)
    floors = [lowest * share / _NUM_FLOORS for share in range(_NUM_FLOORS)] if len(lengths) > 2 else [0.0]
    laws = [_with_floor(runs, floor, tuple(omegas), centre) for floor in floors]
    return min((law for law in laws if law is not None), key=lambda law: _distance(law, runs))


_NUM_FLOORS = 400


def _with_floor(
    runs: Sequence[PilotRun], floor: float, omegas: tuple[float, ...], centre: tuple[float, float]
) -> PilotLaw | None:
    _, omega, offset = _line(runs, floor)
    return PilotLaw(math.exp(offset), omega, floor, omegas, centre) if omega > 0 else None


def _line(runs: Sequence[PilotRun], floor: float) -> tuple[list[float], float, float]:
    """Exponents of every two runs, rising, their median, and the logarithm of the factor."""
    points = [(math.log(run.num_steps), math.log(run.loss - floor)) for run in runs]
    omegas = sorted(-(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0])
    omega = statistics.median(omegas)
    return omegas, omega, statistics.median(log_loss + omega * log_steps for log_steps, log_loss in points)


def _distance(law: PilotLaw, runs: Sequence[PilotRun]) -> float:
    """Sum of squares in ln loss, rounded so that of equal laws the one with the lowest floor is taken."""
    return round(sum(math.log(law.loss(run.num_steps) / run.loss) ** 2 for run in runs), 12)


def pilot_table(runs: Sequence[PilotRun], law: PilotLaw, num_steps: int, target_loss: float | None, note: str) -> Table:
    """Pilots, the loss that the planned length is predicted to reach, and the length that a loss needs.

    Args:
        runs: The pilots.
        law: Fitted to them.
        num_steps: Of the planned run.
        target_loss: None leaves the last row out.
        note: How wrong such predictions were.
    """
    rows: list[tuple[object, ...]] = [("pilot", run.num_steps, run.loss, None, None) for run in runs]
    rows.append(("planned run", num_steps, law.loss(num_steps), *law.loss_range(num_steps)))
    floor = f"{law.floor:.4g} + " if law.floor else ""
    notes = [
        f"loss = {floor}{law.factor:.4g} / steps^{law.omega:.3g}; low and high: exponents of two pilots alone",
        note,
    ]
    if target_loss is not None:
        low, high = law.steps_range(target_loss)
        needed = law.steps_for(target_loss)
        rows.append(("steps for the loss", round(needed) if math.isfinite(needed) else None, target_loss, None, None))
        bounds = f"{low:.0f} to {high:.0f}" if math.isfinite(high) else f"{low:.0f} or more"
        notes.insert(1, f"steps for {target_loss:g}: {bounds} with the exponents of two pilots alone")
        longest = max(run.num_steps for run in runs)
        if math.isinf(needed):
            notes.append(f"by these pilots no length comes below {law.floor:.4g} at this width")
        elif needed > 10 * longest:
            notes.append(
                f"more than 10 times the longest pilot ({longest} steps): train a longer one before you rely on it"
            )
    columns = ("what", "steps", "held-out loss", "low", "high")
    return Table("Pilot", columns, tuple(rows), tuple(notes))
