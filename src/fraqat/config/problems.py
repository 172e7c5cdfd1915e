"""Turns what pydantic found wrong with a recipe into the house's error texts."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from fraqat.errors import ConfigError, choice_error

_WANTED = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_": "text",
    "tuple_": "a list",
    "list_": "a list",
    "dict_": "a mapping",
    "dataclass_type": "a section of fields",
    "model_type": "a section of fields",
}
"""What is allowed, by the beginning of pydantic's type of a problem."""


def explain_problems(error: ValidationError, recipe_type: type[BaseModel]) -> str:
    """One line per problem: the field, what is wrong, what is allowed, the fix."""
    return "\n".join(_explain(dict(problem), recipe_type) for problem in error.errors())


def _explain(problem: dict[str, Any], recipe_type: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "recipe"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return _with_path(str(cause), problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(recipe_type, problem["loc"][:-1]), n=1)
        known = ", ".join(_known_keys(recipe_type, problem["loc"][:-1]))
        fix = f"did you mean {close[0]!r}?" if close else "remove it"
        return f"{path}: unknown key: allowed is {known}. Fix: {fix}"
    value = problem.get("input")
    if problem["type"] in ("literal_error", "enum"):
        return str(choice_error(path, value, re.findall(r"'([^']*)'", problem["ctx"]["expected"])))
    if problem["type"] in ("missing", "missing_argument"):
        return f"{path} is missing. Fix: set {path}."
    wanted = next((words for kind, words in _WANTED.items() if problem["type"].startswith(kind)), None)
    what = f"allowed is {wanted}" if wanted else problem["msg"]
    return f"{path} = {json.dumps(value, default=str)[:80]} is not possible: {what}. Fix: correct {path}."


def _with_path(message: str, location: tuple[Any, ...]) -> str:
    """The message of a section's own check, whose field's name may begin with what the location ends with."""
    field = message.partition(" ")[0].split(".")
    for shared in range(min(len(field), len(location)), 0, -1):
        if field[:shared] == [str(part) for part in location[-shared:]]:
            return ".".join([*map(str, location[:-shared]), message])
    return f"{'.'.join(map(str, location))}: {message}" if location else message


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
