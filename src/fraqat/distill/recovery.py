"""What follows a loss that is NaN or infinite: stop, or go back to the newest checkpoint, at the same rate or a lower one."""

from __future__ import annotations

from typing import Any

from fraqat.distill.log import REWIND_EVENT as REWIND_EVENT
from fraqat.distill.watch_spec import NonFiniteSpec
from fraqat.errors import NonFiniteLossError


class Recovery:
    """Decides after every failure, and remembers how often.

    Attributes:
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
        self._failed_steps: list[int] = []

    @property
    def wants_first_checkpoint(self) -> bool:
        """Whether the state before the first step is needed, to go back to."""
        return self.spec.action != "stop"

    def after_failure(self, error: NonFiniteLossError, step: int) -> None:
        """Returns if training should go on from the newest checkpoint.

        Args:
            error: What was found.
            step: At which it was found.

        Raises:
            NonFiniteLossError: Training should stop; the message says why.
        """
        if self.spec.action == "stop":
            raise error
        if self.num_rewinds >= self.spec.max_rewinds:
            raise NonFiniteLossError(
                f"{error} It happened after {self.num_rewinds} rewinds too (train.on_non_finite.max_rewinds)."
            ) from error
        if self.spec.action == "rewind" and step in self._failed_steps:
            raise NonFiniteLossError(
                f"{error} It came again at the same step after a rewind, so it is no passing fault of the machine. "
                "train.on_non_finite: {action: lower_rate} goes on at a lower rate; run the same command with it."
            ) from error
        self._failed_steps.append(step)
        self.num_rewinds += 1
        if self.spec.action == "lower_rate":
            self.rate_factor *= self.spec.rate_factor
        self.pending = {"failed_step": step, "rate_factor": self.rate_factor, "reason": str(error).split(". ")[0]}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"rate_factor": self.rate_factor, "num_rewinds": self.num_rewinds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what a checkpoint knows; it may be older than this object, whose own rewinds count too."""
        self.rate_factor = min(self.rate_factor, state["rate_factor"])
        self.num_rewinds = max(self.num_rewinds, state["num_rewinds"])
