"""What `fraqat compare` found: records of runs, tables over seeds, and the page."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fraqat.analysis.intervals import SeedMean, mean_over_seeds, ratio_over_seeds
from fraqat.config import ORIGINAL, Recipe
from fraqat.distill import read_log
from fraqat.table import Table
from fraqat.workflows.reporting import SAMPLE_KINDS
from fraqat.workflows.runs import environment
from fraqat.workflows.sessions import QualityColumn

REFERENCE = "vanilla-qat"
"""The method that ratios are taken to, where it is compared; else the first one."""


@dataclass(frozen=True)
class RunRecord:
    """One trained student.

    Args:
        method, rate, seed: Which; a method that does not train has no rate.
        choice_loss: Distillation loss on the half of the held-out data that chooses learning rates.
        test_loss: The same on the other half, which decides nothing. Both are None where training diverged.
        num_steps, train_s: Optimizer steps, and their seconds.
        quality: Values of the evaluation's columns, empty where they were not measured.
        measured_with: The recipe's settings of evaluation and sampler at that time.
    """

    method: str
    rate: float | None
    seed: int
    choice_loss: float | None
    test_loss: float | None
    num_steps: int
    train_s: float
    quality: dict[str, float | None] = field(default_factory=dict[str, float | None])
    measured_with: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class MethodResult:
    """What the seeds of a method gave at its best rate."""

    method: str
    rate: float | None
    tried: dict[float, float | None]
    records: tuple[RunRecord, ...]

    @property
    def losses(self) -> list[float]:
        """Test losses of the seeds."""
        return [record.test_loss for record in self.records if record.test_loss is not None]

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest of several that were tried."""
        return len(self.tried) > 1 and self.rate in (min(self.tried), max(self.tried))


@dataclass(frozen=True)
class Comparison:
    """All methods of one comparison.

    Attributes:
        recipe: What was compared on.
        results: In the order of the methods.
        columns: Of the measured quality.
    """

    recipe: Recipe
    results: tuple[MethodResult, ...]
    columns: tuple[QualityColumn, ...] = ()

    @property
    def reference(self) -> MethodResult:
        """The method that ratios are taken to."""
        return next((r for r in self.results if r.method == REFERENCE), self.results[0])

    def to_table(self) -> Table:
        """One row for each method: mean, 95 % interval and ratio to the reference."""
        titles = [column.title for column in self.columns]
        columns = ("method", "best rate", "seeds", "loss", "low", "high", "ratio", "ratio low", "ratio high", *titles)
        rows = tuple(self._row(result) for result in self.results)
        return Table(f"Methods on {self.recipe.name}", columns, rows, self._notes())

    def rates_table(self) -> Table:
        """The loss of every method at every rate, on the half of the held-out data that chooses."""
        rates = sorted({rate for result in self.results for rate in result.tried})
        rows = tuple((r.method, *(r.tried.get(rate) for rate in rates)) for r in self.results if r.tried)
        note = (
            f"Distillation loss on the half of the held-out data that chooses, seed {self.recipe.train.seed}; "
            "none where training diverged."
        )
        return Table("Learning rates", ("method", *(f"{rate:g}" for rate in rates)), rows, (note,))

    def to_json(self) -> dict[str, Any]:
        """Every record, the tables, the recipe and the machine."""
        return {
            "recipe": self.recipe.to_values(),
            "reference": self.reference.method,
            "table": self.to_table().to_json(),
            "rates": self.rates_table().to_json(),
            "methods": [dataclasses.asdict(result) for result in self.results],
            "environment": environment(),
        }

    def loss_interval(self, result: MethodResult) -> SeedMean:
        """Mean of the test loss over seeds."""
        return mean_over_seeds(result.losses)

    def ratio(self, result: MethodResult) -> SeedMean:
        """Test loss over the reference's, seed by seed; a method without training has one value against every seed."""
        losses, base = result.losses, self.reference.losses
        count = max(len(losses), len(base))
        return ratio_over_seeds(*(values * count if len(values) == 1 else values for values in (losses, base)))

    def quality_ratio(self, result: MethodResult, key: str) -> SeedMean | None:
        """A measured value over the reference's, seed by seed; None where either lacks it for a seed or it is not positive.

        Args:
            result: Of a method that trains.
            key: Of a column, as `frechet`.
        """
        values, base = ([record.quality.get(key) for record in r.records] for r in (result, self.reference))
        positive = [[value for value in found if value is not None and value > 0] for found in (values, base)]
        if not base or any(len(found) != len(base) for found in (values, *positive)):
            return None
        return ratio_over_seeds(*positive)

    def _row(self, result: MethodResult) -> tuple[Any, ...]:
        loss = self.loss_interval(result)
        ratio = SeedMean(1.0, None, None) if result is self.reference else self.ratio(result)
        quality = [_mean_quality(result.records, column) for column in self.columns]
        ends = (loss.mean, loss.low, loss.high, ratio.mean, ratio.low, ratio.high)
        return (result.method, result.rate, len(result.records), *ends, *quality)

    def _notes(self) -> tuple[str, ...]:
        steps = max(record.num_steps for result in self.results for record in result.records)
        notes = [
            f"Distillation loss on the half of the held-out data that chose nothing; {steps} steps of batch "
            f"{self.recipe.train.batch_size} for the methods that train; mean over seeds, low and high of its 95 % interval "
            f"(Student's t). Ratio: geometric mean of the seeds' ratios to {self.reference.method}. Methods that train had the "
            "same data, noise, seeds and steps, and each its own best learning rate of the same grid."
        ]
        edge = [result.method for result in self.results if result.is_at_edge]
        if edge:
            notes.append(
                f"Best at an end of the learning rates tried, so a wider grid may be better: {', '.join(edge)}."
            )
        return tuple(notes)


def run_name(rate: float | None, seed: int) -> str:
    """Folder of a run below its method's."""
    return f"{'no-training' if rate is None else f'rate-{rate!r}'}/seed-{seed}"


def comparison_page(comparison: Comparison, folder: Path, prompts: tuple[str, ...]) -> str:
    """The HTML page of a comparison in its folder; `prompts` are those of the samples."""
    from fraqat.report import ComparisonData, MeanInterval, render_comparison

    others = [result for result in comparison.results if result is not comparison.reference]
    ratios = [(result.method, comparison.ratio(result)) for result in others]
    return render_comparison(
        ComparisonData(
            title=f"Methods on {comparison.recipe.name}",
            summary=_summary(comparison),
            results=comparison.to_table(),
            rates=comparison.rates_table(),
            reference=comparison.reference.method,
            ratios=tuple(
                MeanInterval(n, r.mean, r.low, r.high) for n, r in ratios if r.low is not None and r.high is not None
            ),
            curves=tuple(curve for result in comparison.results if (curve := _curve(folder, result)).points),
            samples=_samples(comparison, folder, prompts),
            settings=comparison.recipe.to_yaml(),
            versions=Table("Versions", ("part", "version"), tuple(environment().items())),
        )
    )


def _summary(comparison: Comparison) -> str:
    best = min(comparison.results, key=lambda result: comparison.loss_interval(result).mean)
    if best is comparison.reference:
        return f"{best.method} has the lowest held-out distillation loss of {len(comparison.results)} methods."
    ratio = comparison.ratio(best)
    interval = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return (
        f"{best.method} has the lowest held-out distillation loss: {ratio.mean:.3f}{interval} times that of "
        f"{comparison.reference.method}, over {_count(len(best.records), 'seed')}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _folder_of(folder: Path, result: MethodResult) -> Path:
    record = result.records[0]
    return folder / result.method / run_name(record.rate, record.seed)


def _curve(folder: Path, result: MethodResult) -> Any:
    from fraqat.report import NamedCurve

    events = read_log(_folder_of(folder, result))
    return NamedCurve(result.method, tuple((e["step"], e["loss"]) for e in events if e["event"] == "validation"))


def _samples(comparison: Comparison, folder: Path, prompts: tuple[str, ...]) -> Any:
    from fraqat.report import SampleKind, SampleRow, Samples

    places = {result.method: _folder_of(folder, result) / "samples" for result in comparison.results}
    found = {
        name: sorted(place.glob("[0-9]*.*"))
        for name, place in {ORIGINAL: folder / ORIGINAL / "samples", **places}.items()
    }
    if not prompts or not all(found.values()):
        return None
    rows = tuple(SampleRow(name, tuple(path.read_bytes() for path in paths)) for name, paths in found.items())
    kind = SAMPLE_KINDS[next(iter(found.values()))[0].suffix]
    return Samples(SampleKind(kind), prompts, rows)


def _mean_quality(records: Sequence[RunRecord], column: QualityColumn) -> float | None:
    values = [value for record in records if (value := record.quality.get(column.key)) is not None]
    return column.factor * statistics.fmean(values) if values else None
