"""Noise levels drawn where the student errs most, with losses weighted so that the expected gradient stays what it was.

The idea is that of importance sampling by the loss of each timestep: Improved DDPM (arXiv 2102.09672, section 3.3) draws
timesteps in proportion to the root of the loss' second moment. Here the distance is a squared error whose gradient is in
proportion to the error, so levels are drawn in proportion to the root of the mean squared error.

Shape suffixes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fraqat.distill.task import LOSS_WEIGHT, TIMESTEP_BIN, Batch, DistillTask, TimestepTask
from fraqat.errors import CheckpointError, config_error
from fraqat.nn import STRICT_KEYS

Weighting = Literal["importance", "none"]
_FIELD = "train.timestep_importance"


@dataclass(frozen=True)
class TimestepImportanceSpec:
    """Draws noise levels by the student's error.

    Args:
        bins: Parts of equal share into which the distribution of noise levels is cut, from the least noise to the most. Inside
            a part levels are drawn as before.
        momentum: Of the running mean of a part's squared error, over the steps that drew from it.
        floor: Share of all draws that follow the distribution itself; no loss is weighted by more than 1 / floor.
        weighting: `importance`: a loss counts base probability / drawn probability times, which leaves the expected gradient
            what it was. `none`: it counts once, and levels with a large error count more than the distribution says.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    bins: int = 16
    momentum: float = 0.9
    floor: float = 0.2
    weighting: Weighting = "importance"

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise config_error(f"{_FIELD}.bins", self.bins, allowed="2 or more", fix="use 16")
        if not 0 <= self.momentum < 1:
            raise config_error(f"{_FIELD}.momentum", self.momentum, allowed="[0, 1)", fix="use 0.9")
        if not 0 < self.floor <= 1:
            raise config_error(f"{_FIELD}.floor", self.floor, allowed="more than 0, at most 1", fix="use 0.2")
        if self.weighting not in get_args(Weighting):
            names = ", ".join(get_args(Weighting))
            raise config_error(f"{_FIELD}.weighting", self.weighting, allowed=names, fix="choose one of these")


class TimestepImportance:
    """The running means, and draws that follow them; the same in every process.

    Until every part has been drawn from, draws follow the distribution itself. The shares of a step are those of the means
    before it, however often its parts are drawn.

    Args:
        spec: Parts, momentum, floor.
    """

    def __init__(self, spec: TimestepImportanceSpec):
        self.spec = spec
        self._means: list[float | None] = [None] * spec.bins
        self._step: int | None = None
        self._shares: list[float] = []

    @property
    def shares(self) -> list[float]:
        """Probability of every part in the next step: (1 - floor) r / sum(r) + floor / bins for roots r of the means."""
        spec = self.spec
        roots = [math.sqrt(mean) for mean in self._means if mean is not None]
        total = sum(roots)
        if len(roots) < spec.bins or total == 0:
            return [1 / spec.bins] * spec.bins
        return [(1 - spec.floor) * root / total + spec.floor / spec.bins for root in roots]

    def draw(self, step: int, num: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Places in the distribution of noise levels, and what the samples' losses are weighted by.

        Args:
            step: Number of finished steps.
            num: N.
            generator: Gives two numbers for each.

        Returns:
            Places in [0, 1], [N] float64, uniform inside their part; and the columns `LOSS_WEIGHT` [N] float32 and
            `TIMESTEP_BIN` [N] int64 of a batch.
        """
        if step != self._step:
            self._step, self._shares = step, self.shares
        shares = torch.tensor(self._shares, dtype=torch.float64)
        ends = shares.cumsum(0)
        where_N = torch.rand(num, generator=generator, dtype=torch.float64) * ends[-1]
        bin_N = torch.searchsorted(ends, where_N, right=True).clamp(max=self.spec.bins - 1)
        place_N = (bin_N + torch.rand(num, generator=generator, dtype=torch.float64)) / self.spec.bins
        return place_N, {LOSS_WEIGHT: self._weights(shares)[bin_N], TIMESTEP_BIN: bin_N}

    def sums(self, error_N: Tensor, inputs: Batch) -> list[float]:
        """Summed squared error of every part, and how many samples it is of: twice `bins` numbers.

        Args:
            error_N: Squared error of each sample.
            inputs: With the column `TIMESTEP_BIN`.
        """
        bin_N = inputs[TIMESTEP_BIN].cpu()
        sums = torch.zeros(2, self.spec.bins, dtype=torch.float64)  # on the host: in order, so that bits repeat
        sums[0].index_add_(0, bin_N, error_N.detach().cpu().double())
        sums[1].index_add_(0, bin_N, torch.ones(len(bin_N), dtype=torch.float64))
        return sums.flatten().tolist()

    def update_(self, sums: Sequence[Sequence[float]]) -> None:
        """Takes a step into the running means.

        Args:
            sums: What `sums` gave for every part of the batch, in their order; the same in every process.
        """
        spec = self.spec
        for number, before in enumerate(self._means):
            count = sum(row[spec.bins + number] for row in sums)
            if count:
                mean = sum(row[number] for row in sums) / count
                self._means[number] = mean if before is None else spec.momentum * before + (1 - spec.momentum) * mean

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"means": list(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undoes `state_dict`."""
        self._means, self._step = list(state["means"]), None

    def _weights(self, shares: Tensor) -> Tensor:
        if self.spec.weighting == "none":
            return torch.ones(self.spec.bins)
        return (1 / (self.spec.bins * shares)).float()


def make_importance(
    task: DistillTask, spec: TimestepImportanceSpec | Literal["auto"] | None, *, is_recorded: bool = False
) -> TimestepImportance | None:
    """The means that a recipe asks for.

    Args:
        task: Of the training.
        spec: Of `TrainSpec.timestep_importance`.
        is_recorded: The teacher's outputs were computed before training, so noise levels cannot follow it.

    Raises:
        ConfigError: The task draws no noise levels.
    """
    draws_levels = isinstance(task, TimestepTask) and task.draws_noise_levels
    if spec == "auto":
        return TimestepImportance(TimestepImportanceSpec()) if draws_levels and not is_recorded else None
    if spec is None:
        return None
    if not draws_levels:
        raise config_error(
            _FIELD,
            "set",
            allowed=f"null or auto for {type(task).__name__}, which draws no noise levels",
            fix=f"remove {_FIELD}",
        )
    return TimestepImportance(spec)


def importance_phrase(
    task: DistillTask, spec: TimestepImportanceSpec | Literal["auto"] | None, *, is_recorded: bool = False
) -> str | None:
    """How noise levels are drawn, where a recipe asks for anything and there are levels.

    Args:
        task, spec, is_recorded: See `make_importance`.
    """
    if spec is None or not isinstance(task, TimestepTask):
        return None
    importance = make_importance(task, spec, is_recorded=is_recorded)
    if importance is not None:
        weighted = "weighted back" if importance.spec.weighting == "importance" else "not weighted back"
        return f"noise levels are drawn by the student's error, in {importance.spec.bins} parts, with losses {weighted}"
    if not task.draws_noise_levels:
        return "noise levels are those of the sampling paths, not drawn by the student's error"
    return "noise levels are not drawn by the student's error, which recorded outputs of the teacher cannot follow"


def go_on_drawing_(importance: TimestepImportance | None, state: Mapping[str, Any] | None) -> None:
    """Takes up the means of a checkpoint.

    Args:
        importance: Of the training; None: the task draws noise levels.
        state: What a checkpoint has of it; None of a training without.

    Raises:
        CheckpointError: One of them has means and the other none.
    """
    if (importance is None) != (state is None):
        before, now = (
            ("by the task", "by the student's error") if state is None else ("by the student's error", "by the task")
        )
        raise CheckpointError(
            f"the checkpoint is of a training whose noise levels are drawn {before}; they are drawn {now} now. Fix: set "
            f"{_FIELD} as it was (auto is null with train.teacher.outputs: recorded), or choose a new folder."
        )
    if importance is not None and state is not None:
        importance.load_state_dict(state)
