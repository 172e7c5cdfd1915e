"""Which width comes next: the state of an automatic schedule while it is being made."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fraqat.distill.workers import ALONE, Workers
from fraqat.schedules import AutomaticSpec, Schedule, Stage


class StageChooser:
    """The stages of a run, of which an automatic schedule chooses each when the one before ends.

    Everything follows from the training losses and from losses over widths, which are the same in a run that was interrupted,
    so that its stages are too. In several processes the first one decides, and the others are told.

    Args:
        schedule: As `ScheduleSpec.resolve` gives it; one that is not automatic stays as it is.
        workers: Call every method together.
    """

    def __init__(self, schedule: Schedule, workers: Workers = ALONE):
        self.schedule = schedule
        self._workers = workers
        self._losses: list[float] = []

    @property
    def candidates(self) -> tuple[float, ...]:
        """The present width and the narrower ones, falling."""
        present = self.schedule.stages[-1].bits
        return tuple(bits for bits in self.schedule.choices if bits <= present)

    def wants_losses(self, num_steps: int, loss: float) -> bool:
        """Notes the loss of a step, and says whether the stage ends with it.

        Args:
            num_steps: Steps that are finished.
            loss: Training loss of the last of them.
        """
        spec, stage = self.schedule.automatic, self.schedule.stages[-1]
        if spec is None or self.schedule.is_decided or num_steps >= self.schedule.total_steps:
            return False
        self._losses.append(loss)
        is_over = stage.index == 0 or self._is_ramp_spent(spec, num_steps) or self._is_flat(spec)
        return bool(self._workers.gather([is_over])[0][0])

    def _is_flat(self, spec: AutomaticSpec) -> bool:
        window = max(2, round(spec.window_share * self.schedule.total_steps))
        if len(self._losses) < 2 * window:
            return False
        before, now = self._losses[-2 * window : -window], self._losses[-window:]
        return statistics.fmean(now) > (1 - spec.gain) * statistics.fmean(before)

    def choose(self, num_steps: int, losses: Mapping[float, float]) -> str:
        """Ends the stage and begins the next one, and says so.

        At the narrowest width whose loss is at most `rise` times that of the present one, or the next narrower one where none
        is; at the target where the ramp's share of the steps is spent.

        Args:
            num_steps: Steps that are finished.
            losses: Of the same batch, all its parts, at each of `candidates`.
        """
        spec, (present, *narrower) = self.schedule.automatic, self.candidates
        assert spec is not None and narrower
        if self._is_ramp_spent(spec, num_steps):
            bits = narrower[-1]
        else:
            near = [bits for bits in narrower if losses[bits] <= spec.rise * losses[present]]
            bits = min(near, default=narrower[0])
        bits = self._workers.gather([bits])[0][0]
        self.schedule = self.schedule.narrowed(num_steps, bits)
        self._losses = []
        tried = ", ".join(f"{width:g} bits {loss:.3g}" for width, loss in losses.items())
        return f"after step {num_steps}: {bits:g} bits next; loss at {tried}"

    def _is_ramp_spent(self, spec: AutomaticSpec, num_steps: int) -> bool:
        """The last step trains at the target in any case."""
        total = self.schedule.total_steps
        return num_steps >= min(spec.ramp_share * total, total - 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the stages so far and the losses of the last one."""
        stages = [[stage.bits, stage.first_step, stage.num_steps] for stage in self.schedule.stages]
        return {"stages": stages, "losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undoes `state_dict`; stages that were not chosen here are those of the schedule anyway."""
        if self.schedule.automatic is not None:
            stages = tuple(Stage(i, *values) for i, values in enumerate(state["stages"]))
            self.schedule = replace(self.schedule, stages=stages)
        self._losses = list(state["losses"])
