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
_SECTIONS = ("dataclass_type", "model_type")
_MOST_PLACES = 3


def explain_problems(error: ValidationError, recipe_type: type[BaseModel]) -> str:
    """One line per problem: the field, what is wrong, what is allowed, the fix."""
    schema = recipe_type.model_json_schema()
    lines: list[str] = []
    by_place: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for number, problem in enumerate(error.errors()):
        place = _choice_place(problem["loc"], schema)
        by_place.setdefault((number,) if place is None else place, []).append(dict(problem))
    for place, problems in by_place.items():
        if _choice_place(problems[0]["loc"], schema) is None:
            lines.append(_explain(problems[0], recipe_type))
        else:
            lines += _explain_choice(place, problems, recipe_type)
    return "\n".join(lines)


def _choice_place(location: tuple[Any, ...], schema: dict[str, Any]) -> tuple[Any, ...] | None:
    """Place of the field on the way to a problem that may be of several kinds, such as a number or a word.

    pydantic tries all kinds there, has a problem with each, and names the kind in the location behind the place.
    """
    node = schema
    for number, part in enumerate(location):
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        if sum(option.get("type") != "null" for option in node.get("anyOf", [])) > 1:
            return location[: number + 1]
        node = _section(node, schema)
    return None


def _explain_choice(place: tuple[Any, ...], problems: list[dict[str, Any]], recipe_type: type[BaseModel]) -> list[str]:
    """Lines for a field of several kinds: of what is wrong inside of a section, else of what all kinds together allow."""
    num = len(place)
    inside = [p for p in problems if len(p["loc"]) > num + 1 or isinstance(p.get("ctx", {}).get("error"), ConfigError)]
    if inside:
        return [_explain(p | {"loc": (*place, *p["loc"][num + 1 :])}, recipe_type) for p in inside]
    kinds = [
        p["ctx"]["expected"].replace("'", "") if p["type"] == "literal_error" else _wanted(p) or p["msg"]
        for p in problems
    ]
    path, value = ".".join(map(str, place)), json.dumps(problems[0].get("input"), default=str)[:80]
    return [f"{path} = {value} is not possible: allowed is {' or '.join(kinds)}. Fix: correct {path}."]


def _wanted(problem: dict[str, Any]) -> str | None:
    return next((words for kind, words in _WANTED.items() if problem["type"].startswith(kind)), None)


def _explain(problem: dict[str, Any], recipe_type: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "recipe"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return _with_path(str(cause), problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(recipe_type, problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        is_in_list = any(isinstance(part, int) for part in problem["loc"])
        elsewhere = [] if is_in_list else _places_of(recipe_type, str(problem["loc"][-1]))
        fix = f"did you mean {close[0]!r}?" if close else "remove it"
        if elsewhere:
            fix = f"did you mean {' or '.join(elsewhere[:_MOST_PLACES])}?"
        return f"{path}: unknown key: allowed is {', '.join(known)}. Fix: {fix}"
    value = problem.get("input")
    if problem["type"] in ("literal_error", "enum"):
        return str(choice_error(path, value, re.findall(r"'([^']*)'", problem["ctx"]["expected"])))
    if problem["type"] in ("missing", "missing_argument"):
        return f"{path} is missing. Fix: set {path}."
    wanted = _wanted(problem)
    what = f"allowed is {wanted}" if wanted else problem["msg"]
    if problem["type"] in _SECTIONS and (fields := _known_keys(recipe_type, problem["loc"])):
        value = json.dumps(value, default=str)[:80]
        return f"{path} = {value} is not possible: {what}: {', '.join(fields)}. Fix: set {path}.{fields[0]} or another one."
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
    node: dict[str, Any] = schema
    for part in location:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        node = _section(node, schema)
    return list(node.get("properties", {}))


def _places_of(recipe_type: type[BaseModel], key: str) -> list[str]:
    """Where the recipe has a key of this name, on the first level of sections that has one."""
    schema = recipe_type.model_json_schema()
    level: list[tuple[str, dict[str, Any]]] = [("", schema)]
    while level:
        inner = [(f"{path}{name}", node) for path, nodes in level for name, node in nodes.get("properties", {}).items()]
        if found := [path for path, _ in inner if path.rpartition(".")[2] == key]:
            return found
        level = [(f"{path}.", _section(node, schema)) for path, node in inner]
    return []


def _section(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The section that a node of the schema refers to, or the node itself."""
    reference = next((option["$ref"] for option in (node, *node.get("anyOf", [])) if "$ref" in option), None)
    return schema["$defs"][reference.split("/")[-1]] if reference else node
