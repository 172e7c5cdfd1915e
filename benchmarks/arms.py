"""Arms of an ablation on several tiny teachers, each at its own best learning rate, remembered as JSON lines."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fraqat import __version__
from fraqat.analysis.intervals import SeedMean, ratio_over_seeds
from fraqat.config import Recipe, load_recipe
from fraqat.distill import Distiller, validation_loss
from fraqat.workflows import Session, SilentProgress, open_session, resolve_schedule
from fraqat.workflows.calibration import calibrated_student
from fraqat.workflows.comparing import held_out_half

_QUIET = (
    "baselines={}",
    "train.tensorboard=false",
    "train.validate_every=1000000",
    "train.checkpoint_every=1000000",
)


@dataclass(frozen=True)
class Ablation:
    """What is compared, on which teachers.

    Args:
        name: Of the records.
        families: Tiny recipes without `-tiny`.
        arms: Name -> settings of a recipe; the first is the reference of ratios.
        settings: Of all arms.
        rates: Every arm is tried at each; its best on one half of the held-out data, over all seeds, is compared on the other.
        seeds: Of every arm and rate, in this order: the first ones at all rates come first.
        path: JSON lines; what is there is not done again.
    """

    name: str
    families: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    settings: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    path: Path

    def run(self) -> None:
        """All rates with the first seed, then the other seeds at each arm's best rate."""
        for rate in self.rates:
            for family in self.families:
                for arm in self.arms:
                    self._record(family, arm, rate, self.seeds[0])
        for seed in self.seeds[1:]:
            for family in self.families:
                for arm in self.arms:
                    self._record(family, arm, self.best_rate(family, arm), seed)

    def records(self) -> list[dict[str, Any]]:
        """What has been measured."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [record for record in map(json.loads, lines) if record["benchmark"] == self.name]

    def best_rate(self, family: str, arm: str) -> float:
        """With the first seed, on the half that chooses."""
        tried = [r for r in self.records() if (r["family"], r["arm"], r["seed"]) == (family, arm, self.seeds[0])]
        return min(tried, key=lambda record: record["choice_loss"])["rate"]

    def losses(self, family: str, arm: str) -> dict[int, float]:
        """Seed -> loss on the half that chose nothing, at the best rate."""
        rate = self.best_rate(family, arm)
        found = [r for r in self.records() if (r["family"], r["arm"], r["rate"]) == (family, arm, rate)]
        return {record["seed"]: record["test_loss"] for record in found}

    def ratio(self, family: str, arm: str, reference: str) -> SeedMean:
        """Of an arm's losses to another's, seed by seed."""
        mine, other = self.losses(family, arm), self.losses(family, reference)
        seeds = sorted(mine.keys() & other.keys())
        return ratio_over_seeds([mine[seed] for seed in seeds], [other[seed] for seed in seeds])

    def table(self) -> str:
        """Losses, best rates and ratios to the first arm, as Markdown."""
        lines = ["| family | arm | best rate | seeds | loss | ratio |", "| --- | --- | --- | --- | --- | --- |"]
        reference = next(iter(self.arms))
        for family in self.families:
            for arm in self.arms:
                losses = list(self.losses(family, arm).values())
                ratio = self.ratio(family, arm, reference)
                ends = "" if ratio.low is None or arm == reference else f" ({ratio.low:.2f} to {ratio.high:.2f})"
                mean = sum(losses) / len(losses)
                rate = f"{self.best_rate(family, arm):g}"
                lines.append(f"| {family} | {arm} | {rate} | {len(losses)} | {mean:.3g} | {ratio.mean:.3f}{ends} |")
        return "\n".join(lines)

    def _record(self, family: str, arm: str, rate: float, seed: int) -> None:
        key = {"family": family, "arm": arm, "rate": rate, "seed": seed}
        if any(all(record[name] == value for name, value in key.items()) for record in self.records()):
            return
        changes = (f"train.learning_rate.peak={rate}", f"train.seed={seed}")
        recipe = load_recipe(f"{family}-tiny", (*_QUIET, *self.settings, *self.arms[arm], *changes))
        losses = _train(_session(family, (*_QUIET, *self.settings)), recipe)
        versions = {"fraqat": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        record = {"benchmark": self.name, **key, "steps": recipe.train.steps, **losses, **versions}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        print(family, arm, rate, seed, record["test_loss"], flush=True)


@cache
def _session(family: str, settings: Sequence[str]) -> Session[Any]:
    return open_session(load_recipe(f"{family}-tiny", tuple(settings)))


def _train(session: Session[Any], recipe: Recipe) -> dict[str, float]:
    student = calibrated_student(session, recipe, SilentProgress())
    schedule = resolve_schedule(recipe, session.task.steps_per_epoch(recipe.train.batch_size))
    if schedule is not None:
        with tempfile.TemporaryDirectory() as folder:
            Distiller(session.task, session.teacher, student, schedule, recipe.train, Path(folder)).run()
    halves = [held_out_half(session.task, recipe.train.batch_size, half) for half in (0, 1)]
    losses = [validation_loss(session.task, session.teacher, student, recipe.train, half) for half in halves]
    return {"choice_loss": losses[0], "test_loss": losses[1]}
