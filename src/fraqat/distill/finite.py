"""Looks for NaN and infinity in what training computes; all processes stop where one has found some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from fraqat.distill.diagnose import first_non_finite_parameter, first_non_finite_place
from fraqat.distill.gradients import BatchLosses
from fraqat.distill.parallel import TrainedModels
from fraqat.distill.precision import autocast
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, Prediction
from fraqat.distill.workers import Workers
from fraqat.schedules import Stage

Fail = Callable[[Stage, str, str], NoReturn]
"""Stage, where it shows first, what it is."""


class FiniteChecks:
    """What is looked at in every step; every process calls every method together with the others.

    Args:
        models: As they are called.
        teacher, student: As they are held.
        spec: Precision and clipping.
        workers: The processes.
        predict: The outputs of one of the two.
        fail: Raises the error.
    """

    def __init__(
        self,
        models: TrainedModels,
        teacher: nn.Module,
        student: nn.Module,
        spec: TrainSpec,
        workers: Workers,
        predict: Callable[[nn.Module, Batch], Prediction],
        fail: Fail,
    ):
        self._models, self._teacher, self._student = models, teacher, student
        self._spec, self._workers, self._predict, self._fail = spec, workers, predict, fail

    def check_losses(self, stage: Stage, batch: BatchLosses) -> None:
        """Of the parts of a batch."""
        bad = batch.first_bad
        if bad is not None:
            places = self._workers.gather_text(self._first_bad_place(batch.suspect))
            first = bad // (len(batch.losses) // self._workers.num)
            self._fail(stage, places[first], f"the loss is {batch.losses[bad]}")

    def clip_gradient_(self, stage: Stage, parameters: Sequence[nn.Parameter]) -> float:
        """Clips the gradient of a batch as the recipe says, and gives the norm that it had."""
        parameters = [p for p in parameters if p.grad is not None]
        norm = self._models.total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            self._fail(stage, f"the gradient of {self._bad_parameter()}", "the gradient is not finite")
        if self._spec.clip_norm is not None:
            clip_grads_with_norm_(parameters, self._spec.clip_norm, norm)
        return norm.item()

    def check_weights(self, stage: Stage) -> None:
        """Of the student, before they are saved."""
        name = self._bad_parameter()
        if name is not None:
            self._fail(stage, f"the parameter {name}", "a weight is not finite after the update")

    def _bad_parameter(self) -> str | None:
        names = self._workers.gather_text(first_non_finite_parameter(self._student) or "")
        return next(filter(None, names), None)

    def _first_bad_place(self, inputs: Batch) -> str:
        models = {"teacher": self._teacher, "student": self._student}
        device = next(self._student.parameters()).device
        with autocast(self._spec.autocast, device.type):
            place = first_non_finite_place(models, lambda model: self._predict(model, inputs))
        self._models.let_go_()
        return place
