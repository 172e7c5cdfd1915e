"""The rank of low-rank branches while they are trained: components leave for the weight until none is left."""

from __future__ import annotations

from torch import nn

from fraqat.distill.log import RunLog
from fraqat.nn import QuantizedLayer, fold_components_, quantized_layers, remove_spent_branches_

RANK_EVENT = "rank"


class RankDecay:
    """Folds components of branches into weights when their time has come.

    How many are left is a function of the step alone, and which ones have left is in the student's state, so that a run
    which was interrupted goes on alike. Every process calls every method together with the others.

    Args:
        student: With branches, some or all of which decay; without, nothing happens.
        total_steps: Of the run.
    """

    def __init__(self, student: nn.Module, total_steps: int):
        self._student, self._total_steps = student, total_steps
        self._layers: list[QuantizedLayer] = []
        self._left: list[int] = []
        for _, layer in quantized_layers(student):
            if layer.branch is not None and layer.branch.spec.rank_schedule.decays:
                self._layers.append(layer)
                self._left.append(layer.branch.num_active)

    def enter_(self, step: int, log: RunLog) -> bool:
        """Call it before a step, which counts from 0. Whether weights have changed."""
        num_folded = 0
        for number, layer in enumerate(self._layers):
            assert layer.branch is not None
            wanted = layer.branch.spec.rank_schedule.rank_at(layer.branch.up.shape[1], step, self._total_steps)
            if wanted < self._left[number]:
                num_folded += fold_components_(layer, wanted)
                self._left[number] = wanted
        if num_folded:
            log.write_event(RANK_EVENT, step, num_folded=num_folded, num_left=sum(self._left), largest=max(self._left))
        return num_folded > 0

    def reload_(self) -> None:
        """Call it when the student's state was loaded."""
        for number, layer in enumerate(self._layers):
            assert layer.branch is not None
            layer.branch.renew_()
            self._left[number] = layer.branch.num_active

    def finish_(self) -> None:
        """Call it when training has ended: what is left is a plain quantized student."""
        remove_spent_branches_(self._student)
