"""`fraqat plan`: what a recipe will need, before anything is downloaded or rented."""

from __future__ import annotations

from fraqat.config import Recipe
from fraqat.errors import config_error
from fraqat.planning import Plan, PlanOptions, find_device, plan_training
from fraqat.workflows.sessions import open_session
from fraqat.workflows.training import resolve_schedule


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
    found = find_device(device)
    num_train = recipe.num_train
    if num_train is None and recipe.train.epochs is not None:
        raise config_error(
            "data.num_train", None, allowed="a number, for a plan of epochs", fix="set data.num_train, or train.steps"
        )
    schedule = resolve_schedule(recipe, max(1, (num_train or recipe.train.batch_size) // recipe.train.batch_size))
    if schedule is None:
        raise config_error("train.steps", 0, allowed="1 or more, for a plan", fix="plan a recipe that trains")
    return plan_training(open_session(recipe).workload(recipe), recipe.train, schedule.total_steps, found, options)
