"""What follows a loss that is NaN or infinite: stop, or go back to a checkpoint, at the same rate or a lower one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fraqat.distill.log import REWIND_EVENT as REWIND_EVENT
from fraqat.distill.watch_spec import NonFiniteSpec
from fraqat.errors import NonFiniteLossError

_NUM_TRIES = {"rewind": 1, "lower_rate": 2}
"""Rewinds to a checkpoint before an older one is taken. Computing the same again tells at once; a rate may fall twice."""


class Recovery:
    """Decides after every failure, and remembers how often.

    A run that fails again before it has come further than at the failure before may have been broken already when the newest
    checkpoint was written: it goes back to an older one, as far as there are some.

    Attributes:
        before: Step of the checkpoint that was written too late, where an older one is to be taken; None: the newest.
        rate_factor: By which every learning rate is multiplied.
        num_rewinds: So far.
        pending: Fields of the `rewind` event that the log does not have yet.

    Args:
        spec: What to do.
    """

    def __init__(self, spec: NonFiniteSpec):
        self.spec = spec
        self.rate_factor = 1.0
        self.num_rewinds = 0
        self.pending: dict[str, Any] | None = None
        self.before: int | None = None
        self._failed_steps: list[int] = []
        self._reached: list[int] = []
        self._num_tries = 0

    @property
    def wants_first_checkpoint(self) -> bool:
        """Whether the state before the first step is needed, to go back to."""
        return self.spec.action != "stop"

    def after_failure(self, error: NonFiniteLossError, step: int, saved: Sequence[int]) -> None:
        """Returns if training should go on from a checkpoint, the newest or one older than `before`.

        Args:
            error: What was found.
            step: At which it was found: number of finished steps.
            saved: Steps of all checkpoints, rising.

        Raises:
            NonFiniteLossError: Training should stop; the message says why.
        """
        if self.spec.action == "stop" or not saved:
            raise error
        if self.num_rewinds >= self.spec.max_rewinds:
            raise NonFiniteLossError(
                f"{error} It happened after {self.num_rewinds} rewinds too (train.on_non_finite.max_rewinds)."
            ) from error
        is_again = bool(self._failed_steps) and step <= self._failed_steps[-1]
        newest = self._reached[-1] if is_again else saved[-1]
        self._num_tries = self._num_tries + 1 if is_again else 0
        older = [other for other in saved if other < newest]
        is_too_late = self._num_tries >= _NUM_TRIES[self.spec.action]
        if self.spec.action == "lower_rate" and newest == step:  # no step between them that a lower rate would change
            is_too_late = True
        if is_too_late and not older and self.spec.action == "rewind" and step in self._failed_steps:
            places = " and ".join(f"step {place}" for place in dict.fromkeys(self._reached))
            raise NonFiniteLossError(
                f"{error} It came again at the same step after a rewind to {places}, so it is no passing fault of the machine. "
                "train.on_non_finite: {action: lower_rate} goes on at a lower rate; run the same command with it."
            ) from error
        self.before = newest if is_too_late and older else None
        if self.before is not None:
            self._num_tries = 0
        self._reached.append(older[-1] if self.before is not None else saved[-1])
        self._failed_steps.append(step)
        self.num_rewinds += 1
        if self.spec.action == "lower_rate":
            self.rate_factor *= self.spec.rate_factor
        self.pending = {
            "failed_step": step,
            "rate_factor": self.rate_factor,
            "passed_over": self.before,
            "reason": str(error).split(". ")[0],
        }

    def describe(self) -> str:
        """Where the run goes on, in words."""
        if self.before is None:
            return "Going back to the newest checkpoint (train.on_non_finite)."
        return (
            f"Going back to a checkpoint before that of step {self.before}, which may have been written after the fault "
            "(train.on_non_finite)."
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"rate_factor": self.rate_factor, "num_rewinds": self.num_rewinds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what a checkpoint knows; it may be older than this object, whose own rewinds count too."""
        self.rate_factor = min(self.rate_factor, state["rate_factor"])
        self.num_rewinds = max(self.num_rewinds, state["num_rewinds"])
