"""A table of results: rows as data first, then as text or JSON. Nothing here needs more than the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fraqat.printable import printable


@dataclass(frozen=True)
class Table:
    """Named columns and rows of plain values.

    Args:
        title: One line above the table.
        columns: Column headings, also the keys of `to_json`.
        rows: One sequence of values per row, as long as `columns`.
        notes: Lines below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Sequence[Any], ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The table for machines: title, a list of row objects, notes."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}

    def to_cells(self) -> list[list[str]]:
        """Every value as people read it."""
        return [[format_value(value) for value in row] for row in self.rows]

    def widths(self) -> list[int]:
        """Characters that each column needs."""
        cells = [list(self.columns), *self.to_cells()]
        return [max(len(row[i]) for row in cells) for i in range(len(self.columns))]

    def transposed(self) -> Table:
        """Columns as rows: for a table of few rows that is wider than the place it is shown in."""
        head, *rest = zip(*([self.columns, *self.to_cells()]), strict=True)
        return Table(self.title, tuple(head), tuple(rest), self.notes)

    def __str__(self) -> str:
        cells = [[printable(column, "") for column in self.columns], *self.to_cells()]
        widths = self.widths()
        is_number = [all(isinstance(row[i], int | float | None) for row in self.rows) for i in range(len(widths))]

        def line(row: list[str]) -> str:
            padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, is_number, strict=True))
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        title, *notes = (printable(text) for text in (self.title, *self.notes))
        return "\n".join([title, line(cells[0]), rule, *map(line, cells[1:]), *notes])


def format_value(value: Any) -> str:
    """Numbers to four significant digits, True and False as yes and no, None as a dash, text in one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value), "")
