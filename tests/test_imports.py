"""Which file of the package needs which: what import-linter does not see, as it looks at packages and not at types alone."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fraqat

SOURCE = Path(fraqat.__file__).parent


def module_name(path: Path) -> str:
    return ".".join(("fraqat", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imported_by(path: Path, names: set[str]) -> set[str]:
    """Modules that a file names in any import: at its head, for types alone, or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & names
            found |= inner or {node.module} & names
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
    return found - {module_name(path)}


def test_no_two_files_need_each_other_not_even_for_types() -> None:
    paths = {module_name(path): path for path in SOURCE.rglob("*.py")}
    graph = {name: imported_by(path, set(paths)) for name, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"these files need each other: {' <- '.join(error.args[1])}") from None
