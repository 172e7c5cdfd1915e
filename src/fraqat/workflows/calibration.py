"""The student as training begins with it: smoothing, branches and static ranges found on calibration data."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from torch import nn

from fraqat.config import Recipe
from fraqat.distill import Batch
from fraqat.nn import calibrate_, initialize_branches_
from fraqat.workflows.progress import Progress
from fraqat.workflows.sessions import Session


def calibrated_student(session: Session[Any], recipe: Recipe, progress: Progress) -> nn.Module:
    """A new student at its final width, with everything set that is measured before training.

    Args:
        session: Models and data.
        recipe: The session's own, or one that shares model and data with it.
        progress: Told what was calibrated.
    """
    student, _ = session.new_student(recipe)
    _initialize_branches_(session, recipe, student, progress)
    predict = partial(cast(Any, session.task).predict, student)
    if num_calibrated := calibrate_(student, predict, _calibration_batches(session, recipe)):
        progress.say(f"{recipe.label}: static activation ranges of {num_calibrated} layers calibrated")
    return student


def _calibration_batches(session: Session[Any], recipe: Recipe) -> Iterator[Batch]:
    """A generator, so that nothing is encoded for a student without static activations."""
    yield from session.task.calibration_batches(recipe.train.calibration_samples, recipe.train.batch_size)


def _initialize_branches_(session: Session[Any], recipe: Recipe, student: nn.Module, progress: Progress) -> None:
    smoothing, num_samples = recipe.quantization.smoothing, recipe.train.calibration_samples
    if recipe.quantization.branch is None and smoothing is None:
        return
    # An average over the sampler's steps needs them one by one; a larger batch holds samples of several.
    has_momentum = smoothing is not None and smoothing.momentum is not None
    batches = session.task.calibration_batches(num_samples, 1 if has_momentum else recipe.train.batch_size)
    fits = initialize_branches_(student, partial(cast(Any, session.task).predict, student), batches)
    if fits:
        before, after = (
            statistics.median(getattr(fit, name) for fit in fits.values()) for name in ("plain_sqnr_db", "sqnr_db")
        )
        progress.say(
            f"{recipe.label}: smoothing and branches of {len(fits)} layers set from {num_samples} samples; median SQNR of "
            f"their outputs {before:.1f} -> {after:.1f} dB"
        )
