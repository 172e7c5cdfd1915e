"""What a report shows, as plain values. Nothing here knows about HTML or plots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fraqat.errors import config_error
from fraqat.report.samples import Samples
from fraqat.table import Table


@dataclass(frozen=True)
class StageSpan:
    """One bit width and the optimizer steps [first_step, first_step + num_steps) that train at it."""

    bits: float
    first_step: int
    num_steps: int

    @property
    def end_step(self) -> int:
        """First step after the stage."""
        return self.first_step + self.num_steps


@dataclass(frozen=True)
class LossCurve:
    """The losses of one training run.

    Values that are not finite or not positive are kept here and left out of the plot, whose axis is logarithmic.

    Args:
        label: Name of the method.
        steps: Optimizer steps, counted from 0, ascending.
        losses: Training loss of each of `steps`.
        validation: (finished steps, held-out loss), ascending.
        stages: The bit widths that were trained, in order; empty when not known.

    Raises:
        ConfigError: `steps` and `losses` of different lengths.
    """

    label: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...] = ()
    stages: tuple[StageSpan, ...] = ()

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise config_error(
                f"losses of curve {self.label!r}",
                f"{len(self.losses)} values",
                allowed=f"one value for each of the {len(self.steps)} steps",
                fix="pass steps and losses of the same length",
            )


@dataclass(frozen=True)
class NamedCurve:
    """Points of one run or one setting, for a plot of several.

    Args:
        label: Name, shown in the legend.
        points: (x, y) with ascending x: finished optimizer steps and held-out losses, for example. Values that are not
            finite, or not positive on a logarithmic axis, are kept here and left out of the plot.
        stages: The bit widths of the run, in order; empty when not known.

    Raises:
        ConfigError: x does not ascend.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    stages: tuple[StageSpan, ...] = ()

    def __post_init__(self) -> None:
        x = [place for place, _ in self.points]
        if any(second <= first for first, second in pairwise(x)):
            raise config_error(f"points of curve {self.label!r}", x, allowed="ascending x", fix="sort the points")


@dataclass(frozen=True)
class MeanInterval:
    """A mean over runs and the interval that holds it.

    Args:
        label: Name of the method.
        mean: The mean.
        low, high: Ends of the interval, for example of 95 %; low <= mean <= high.

    Raises:
        ConfigError: A value is not finite, or the mean lies outside the interval.
    """

    label: str
    mean: float
    low: float
    high: float

    def __post_init__(self) -> None:
        values = (self.low, self.mean, self.high)
        if not all(math.isfinite(value) for value in values) or not self.low <= self.mean <= self.high:
            raise config_error(
                f"interval of {self.label!r}",
                values,
                allowed="finite numbers with low <= mean <= high",
                fix="pass low, mean and high in this order, and leave out methods without an interval",
            )


AnalysisKind = Literal["bits", "outliers", "sensitivity", "layer-widths"]
"""What `fraqat analyze` measures."""


@dataclass(frozen=True)
class Analysis:
    """One analysis of a model: its tables, of which known columns are drawn (`fraqat.report.analysis_views`).

    Args:
        kind: What was measured.
        tables: As `fraqat.workflows.analyzing` makes them, the main one first.
    """

    kind: AnalysisKind
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class ReportData:
    """Everything that one page shows.

    Args:
        title: Heading of the page.
        summary: The result in one sentence.
        quality: One row per model: original, dynamic, vanilla QAT, FraQAT. The row whose first value is the label of the
            first curve is set in bold.
        samples: What the models made of the same prompts, the original first; None when nothing was kept.
        curves: Training runs, the main method first; its stages are marked with their bits. Empty without training.
        layers: One row per layer in model order. Columns `layer`, `family`, `weight SQNR dB` and `output SQNR dB` feed the
            plot (each is optional); all columns are listed.
        sizes: Bytes on disk and in memory.
        settings: The resolved recipe as YAML text.
        versions: Software and hardware.
        code_flips: Share of the weight codes that changed since the record before, in %, over finished steps: all layers
            first, then every family. Empty where it was not recorded.
        analyses: What `fraqat analyze` found about the model.
    """

    title: str
    summary: str
    quality: Table
    samples: Samples | None
    curves: tuple[LossCurve, ...]
    layers: Table
    sizes: Table
    settings: str
    versions: Table
    code_flips: tuple[NamedCurve, ...] = ()
    analyses: tuple[Analysis, ...] = ()
