"""Turns what pydantic found wrong with a recipe into the house's error texts."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from fraqat.errors import ConfigError


def explain_problems(error: ValidationError, recipe_type: type[BaseModel]) -> str:
    """One line per problem: the field, what is wrong, what is allowed, the fix."""
    return "\n".join(_explain(dict(problem), recipe_type) for problem in error.errors())


def _explain(problem: dict[str, Any], recipe_type: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "recipe"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return f"{path}: {cause}"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(recipe_type, problem["loc"][:-1]), n=1)
        known = ", ".join(_known_keys(recipe_type, problem["loc"][:-1]))
        fix = f"did you mean {close[0]!r}?" if close else "remove it"
        return f"{path}: unknown key: allowed is {known}. Fix: {fix}"
    shown = json.dumps(problem.get("input"), default=str)
    return f"{path} = {shown[:80]} is not possible: {problem['msg']}. Fix: correct {path}."


def _known_keys(recipe_type: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys that the recipe allows at a place, found in its JSON schema."""
    schema = recipe_type.model_json_schema()
    definitions = schema.get("$defs", {})
    node: dict[str, Any] = schema
    for part in location:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        options = [node, *node.get("anyOf", [])]
        reference = next((option["$ref"] for option in options if "$ref" in option), None)
        node = definitions[reference.split("/")[-1]] if reference else node
    return list(node.get("properties", {}))
