"""What watches single steps: code flips and the profiler."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from torch import nn

from fraqat.distill.code_flips import CodeFlipLog
from fraqat.distill.log import RunLog, StepRecord
from fraqat.distill.profiling import StepProfiler
from fraqat.distill.spec import TrainSpec


class StepHooks:
    """Use it as a context around the training loop, and call both methods around every step.

    Args:
        model: The student.
        spec: What is watched.
        log: Of the run.
    """

    def __init__(self, model: nn.Module, spec: TrainSpec, log: RunLog):
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
