"""Reads recipes: YAML files, the ones that come with the package, and changes from the command line."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fraqat.config.problems import explain_problems
from fraqat.config.recipe import Recipe
from fraqat.config.tasks import DEFAULT_TASK, RECIPE_TYPES
from fraqat.errors import ConfigError, choice_error, config_error


def load_recipe(source: str, settings: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        source: Path of a YAML file, or the name of a recipe that comes with the package.
        settings: `dotted.key=value` changes, the value in YAML.

    Raises:
        ConfigError: The file is missing or not YAML, or a field is unknown or impossible; all problems are listed.
    """
    values = _read_yaml(source)
    for setting in settings:
        _apply_setting(values, setting)
    return load_values(values)


def load_values(values: dict[str, Any]) -> Recipe:
    """Validates plain values; see `load_recipe`."""
    task = values.get("task", DEFAULT_TASK)
    if not isinstance(task, str) or task not in RECIPE_TYPES:
        raise choice_error("task", task, RECIPE_TYPES)
    recipe_type = RECIPE_TYPES[task]
    try:
        return recipe_type.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain_problems(error, recipe_type)) from None


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("fraqat") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read_yaml(source: str) -> dict[str, Any]:
    if source in recipe_names():
        text = (resources.files("fraqat") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(source)
        if not path.is_file():
            raise choice_error("recipe", source, recipe_names(), besides="a YAML file, or one of ")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {source} cannot be read: {error}. Fix: pass a YAML text file.") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {source} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise config_error("recipe", source, allowed="a mapping of sections", fix="start from a recipe of the package")
    return values


def _apply_setting(values: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise config_error("--set", setting, allowed="dotted.key=value", fix="write for example train.steps=100")
    place: Any = values
    for part in parts[:-1]:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
            continue
        if not isinstance(place, dict):
            raise config_error("--set", setting, allowed="a key that exists in the recipe", fix=f"check {part!r}")
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise config_error("--set", setting, allowed="a value in YAML", fix="quote it") from None
    last = parts[-1]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise config_error("--set", setting, allowed="a key that exists in the recipe", fix=f"check {last!r}")
