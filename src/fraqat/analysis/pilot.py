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
    """L = factor / steps^omega: for one model and one width the second term of the loss law, with its floor left out.

    Args:
        factor: Loss after one step.
        omega: Exponent, greater than 0.
        omegas: Exponents of every two runs of different lengths, in rising order: how sure `omega` is.
        centre: ln steps and ln loss in the middle of the pilots.
    """

    factor: float
    omega: float
    omegas: tuple[float, ...]
    centre: tuple[float, float]

    def loss(self, num_steps: float) -> float:
        """Predicted held-out loss of a finished run of so many steps."""
        return self.factor * num_steps**-self.omega

    def steps_for(self, loss: float) -> float:
        """Steps of a run that ends at a loss."""
        return (self.factor / loss) ** (1 / self.omega)

    def loss_range(self, num_steps: float) -> tuple[float, float]:
        """The loss with the steepest and the flattest exponent of two pilots."""
        log_steps, log_loss = self.centre
        ends = [math.exp(log_loss - omega * (math.log(num_steps) - log_steps)) for omega in self.omegas]
        return min(ends), max(ends)

    def steps_range(self, loss: float) -> tuple[float, float]:
        """The steps with the steepest and the flattest; infinity where two pilots did not fall."""
        log_steps, log_loss = self.centre
        gap = log_loss - math.log(loss)
        ends = [math.exp(log_steps + gap / omega) if omega > 0 else math.inf for omega in self.omegas]
        return min(ends), max(ends)


def fit_pilot(runs: Sequence[PilotRun]) -> PilotLaw:
    """A line through ln loss over ln steps: the median of the slopes of every two runs (Theil and Sen), and of the offsets.

    Args:
        runs: Of the same recipe but for its length, with two or more different lengths. Every run has its own whole schedule
            of the learning rate: a loss on the way of a longer run is another quantity.

    Raises:
        ConfigError: One length alone, or a loss that does not fall with the length.
    """
    points = [(math.log(run.num_steps), math.log(run.loss)) for run in runs]
    pairs = [(a, b) for a, b in combinations(points, 2) if a[0] != b[0]]
    if not pairs:
        lengths = sorted({run.num_steps for run in runs})
        raise config_error(
            "--pilot", lengths, allowed="runs of two or more different lengths", fix="train one with twice the steps"
        )
    omegas = sorted(-(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)
    omega = statistics.median(omegas)
    if omega <= 0:
        raise config_error(
            "--pilot",
            [run.loss for run in runs],
            allowed="losses that fall with the number of steps",
            fix="lower train.learning_rate.peak, or make the pilots longer",
        )
    offset = statistics.median(log_loss + omega * log_steps for log_steps, log_loss in points)
    log_steps = statistics.fmean(point[0] for point in points)
    return PilotLaw(math.exp(offset), omega, tuple(omegas), (log_steps, offset - omega * log_steps))


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
    notes = [f"loss = {law.factor:.4g} / steps^{law.omega:.3g}; low and high: exponents of two pilots alone", note]
    if target_loss is not None:
        low, high = law.steps_range(target_loss)
        rows.append(("steps for the loss", round(law.steps_for(target_loss)), target_loss, None, None))
        bounds = f"{low:.0f} to {high:.0f}" if math.isfinite(high) else f"{low:.0f} or more"
        notes.insert(1, f"steps for {target_loss:g}: {bounds} with the exponents of two pilots alone")
        longest = max(run.num_steps for run in runs)
        if law.steps_for(target_loss) > 10 * longest:
            notes.append(
                f"more than 10 times the longest pilot ({longest} steps): train a longer one before you rely on it"
            )
    columns = ("what", "steps", "held-out loss", "low", "high")
    return Table("Pilot", columns, tuple(rows), tuple(notes))
