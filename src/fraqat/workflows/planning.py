"""`fraqat plan`: what a recipe will need, before anything is downloaded or rented."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fraqat.analysis import PilotRun, fit_pilot, pilot_table
from fraqat.config import Recipe
from fraqat.distill import describe_difference
from fraqat.errors import config_error
from fraqat.planning import Plan, PlanOptions, Workload, compute_optimal, find_device, plan_training
from fraqat.table import Table
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import open_session
from fraqat.workflows.training import resolve_schedule, with_absolute_paths

_GIB = 2**30
_PILOT_NOTE = (
    "on small PixArts the loss of runs 2 and 4 times as long as the longest of three pilots was wrong by 12 and 20 % in the "
    "median, 28 and 97 % at most, and the steps came out too few (docs/results/loss_law.md)"
)


@dataclass(frozen=True)
class ComputeQuestions:
    """What `fraqat plan` is asked about the length of a run and its width; see `fraqat.planning.compute_optimal`.

    Args:
        pretraining_tokens: That the original model was trained on: predicts the best share and length of the run.
        memory_budget_gib: For the exported model: chooses a width.
        pilots: Folders of finished short runs of the same recipe: predict the loss of the planned length.
        target_loss: Held-out distillation loss to reach: predicts the length that it needs from the pilots.

    Raises:
        ConfigError: Numbers that are not positive, or a target without pilots.
    """

    pretraining_tokens: float | None = None
    memory_budget_gib: float | None = None
    pilots: tuple[Path, ...] = ()
    target_loss: float | None = None

    def __post_init__(self) -> None:
        options = {
            "--pretraining-tokens": self.pretraining_tokens,
            "--memory-budget": self.memory_budget_gib,
            "--target-loss": self.target_loss,
        }
        for option, value in options.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise config_error(option, value, allowed="a positive number", fix=f"correct {option}, or leave it out")
        if self.target_loss is not None and not self.pilots:
            raise config_error(
                "--target-loss",
                self.target_loss,
                allowed="a loss where pilots are given",
                fix="train two short runs of this recipe and pass --pilot RUN for each",
            )

    @property
    def asks_for_the_law(self) -> bool:
        """Whether the law of compute-optimal training is asked."""
        return self.pretraining_tokens is not None or self.memory_budget_gib is not None


def plan(recipe: Recipe, device: str, options: PlanOptions | None = None) -> Plan:
    """Plans a recipe from its model's configuration; neither weights nor data are read.

    Args:
        recipe: What would be trained.
        device: A name in `fraqat.planning.DEVICES`, or `this-cpu` to measure this machine.
        options: Number of devices, sharding, what is traded for memory.

    Raises:
        ConfigError: The recipe trains nothing, its length is not known, or the batch cannot be divided.
        ModelError: The model's configuration cannot be had.
    """
    found, total_steps = find_device(device), _total_steps(recipe)
    return plan_training(
        _workload(recipe), recipe.train, total_steps, found, options, num_held_out=recipe.num_validation
    )


def plan_tables(
    recipe: Recipe, device: str, options: PlanOptions | None = None, questions: ComputeQuestions | None = None
) -> list[Table]:
    """What `fraqat plan` prints: the plan, and an answer to each question.

    Args:
        recipe, device, options: See `plan`.
        questions: About length and width; None asks nothing.

    Raises:
        ConfigError: See `plan`, `fraqat.planning.compute_optimal` and `fraqat.analysis.fit_pilot`; pilots of another recipe.
        ModelError: See `plan`; a pilot that is no finished run.
    """
    questions = questions or ComputeQuestions()
    found, total_steps = find_device(device), _total_steps(recipe)
    pilots = [_read_pilot(recipe, path) for path in questions.pilots]
    law = fit_pilot(pilots) if pilots else None
    workload = _workload(recipe)
    made = plan_training(workload, recipe.train, total_steps, found, options, num_held_out=recipe.num_validation)
    tables = [made.to_table()]
    if questions.asks_for_the_law:
        budget = questions.memory_budget_gib
        tables.append(
            compute_optimal(
                workload,
                recipe.train.batch_size,
                total_steps,
                pretraining_tokens=questions.pretraining_tokens,
                memory_budget_bytes=None if budget is None else round(budget * _GIB),
            ).to_table()
        )
    if law is not None:
        tables.append(pilot_table(pilots, law, total_steps, questions.target_loss, _PILOT_NOTE))
    return tables


def _workload(recipe: Recipe) -> Workload:
    return open_session(recipe).workload(recipe)


def _total_steps(recipe: Recipe) -> int:
    num_train = recipe.num_train
    if num_train is None and recipe.train.epochs is not None:
        raise config_error(
            "data.num_train", None, allowed="a number, for a plan of epochs", fix="set data.num_train, or train.steps"
        )
    schedule = resolve_schedule(recipe, max(1, (num_train or recipe.train.batch_size) // recipe.train.batch_size))
    if schedule is None:
        raise config_error("train.steps", 0, allowed="1 or more, for a plan", fix="plan a recipe that trains")
    return schedule.total_steps


def _read_pilot(recipe: Recipe, folder: Path) -> PilotRun:
    """A finished run of the same recipe but for its length."""
    run = RunFolder.open(folder)
    difference = describe_difference(_without_length(run.recipe()), _without_length(with_absolute_paths(recipe)))
    if difference:
        raise config_error(
            "--pilot",
            str(folder),
            allowed=f"runs of this recipe that differ in train.steps alone ({difference})",
            fix="pass the same --set as the pilot had, or train it again",
        )
    result = run.read_json(run.result_path)
    return PilotRun(result["num_steps"], result["validation_loss"])


def _without_length(recipe: Recipe) -> dict[str, Any]:
    values = recipe.fingerprint()
    for name in ("steps", "epochs"):
        del values["train"][name]
    return values
