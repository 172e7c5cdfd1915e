"""What watches single steps: code flips, shares of noise levels, and the profiler."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from torch import nn

from fraqat.distill.code_flips import CodeFlipLog
from fraqat.distill.importance import TimestepImportance
from fraqat.distill.log import RunLog, StepRecord
from fraqat.distill.profiling import StepProfiler
from fraqat.distill.spec import TrainSpec

TIMESTEPS_EVENT = "timesteps"


class StepHooks:
    """Use it as a context around the training loop, and call both methods around every step.

    Args:
        model: The student.
        spec: What is watched.
        log: Of the run.
        importance: Its shares are logged every `validate_every` steps.
    """

    def __init__(self, model: nn.Module, spec: TrainSpec, log: RunLog, importance: TimestepImportance | None = None):
        self._importance, self._every, self._log = importance, spec.validate_every, log
        self._flips = CodeFlipLog(model, spec, log)
        self._profiler = StepProfiler(spec.profile if log.writes else None, log.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.stop()

    def before_step(self, step: int) -> None:
        """Once the width is set. `step` counts from 0."""
        self._flips.before_step(step)
        self._profiler.before_step(step)

    def after_step(self, record: StepRecord) -> None:
        """After the step is logged."""
        self._profiler.after_step(record.step)
        self._flips.after_step(record)
        num_done = record.step + 1
        if self._importance is not None and (num_done % self._every == 0 or num_done == record.total_steps):
            shares = {f"{number:02d}": share for number, share in enumerate(self._importance.shares)}
            self._log.write_shares(TIMESTEPS_EVENT, record.step, shares)
