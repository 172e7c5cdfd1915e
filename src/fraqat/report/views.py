"""Tables and legends as the templates of a page need them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fraqat.report.axes import MARKERS
from fraqat.report.svg import series_variable
from fraqat.table import Table, format_value

_MAX_DECIMALS = 4
_PLACEHOLDERS = ("", "-", "–", "n/a")


def table_view(
    table: Table, heading: str, main_label: str | None = None, detail_suffix: str | None = None
) -> dict[str, Any]:
    """A table as the template needs it. The title is left out where it only repeats the section's heading.

    A column whose title ends in `detail_suffix` is shown in small type under the values of the column before.
    """
    values = [tuple(row) for row in table.rows]
    columns = list(zip(*values, strict=True)) if values else [()] * len(table.columns)
    is_number = [_is_number_column(column) for column in columns]
    cells = list(zip(*map(_column_texts, columns), strict=True))
    is_detail = [detail_suffix is not None and title.endswith(detail_suffix) for title in table.columns]
    own = [i for i, is_one in enumerate(is_detail) if i == 0 or not is_one]

    def joined(texts: Sequence[str]) -> list[tuple[str, bool, str]]:
        ends = [*own[1:], len(texts)]
        below = [[t for t in texts[i + 1 : end] if t not in _PLACEHOLDERS] for i, end in zip(own, ends, strict=True)]
        return [(texts[i], is_number[i], " ".join(details)) for i, details in zip(own, below, strict=True)]

    return {
        "label": table.title or heading,
        "title": "" if table.title.strip().casefold() == heading.casefold() else table.title,
        "columns": joined([_head(title, detail_suffix) for title in table.columns]),
        "rows": [
            {
                "cells": joined(texts),
                "is_main": main_label is not None and texts[0] == main_label,
            }
            for texts in cells
        ],
        "notes": table.notes,
    }


def _head(title: str, detail_suffix: str | None) -> str:
    """A column's title, of a detail the suffix alone: what it belongs to stands above."""
    return title if not detail_suffix or not title.endswith(detail_suffix) else detail_suffix.lstrip(", ")


def _is_number_column(values: Sequence[Any]) -> bool:
    """Whether a column holds numbers and, besides them, only gaps."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    num_gaps = sum(value is None or value in _PLACEHOLDERS for value in values)
    return bool(numbers) and len(numbers) + num_gaps == len(values)


def _column_texts(values: Sequence[Any]) -> list[str]:
    """A column as people read it. Floats get the same number of decimals, as many as any of them needs for four digits."""
    texts = [format_value(value) for value in values]
    is_float = [isinstance(value, float) and math.isfinite(value) for value in values]
    decimals = [
        len(text.partition(".")[2]) for text, is_one in zip(texts, is_float, strict=True) if is_one and "e" not in text
    ]
    if len(decimals) < sum(is_float) or max(decimals, default=0) > _MAX_DECIMALS:
        return texts  # too wide a range for one number of decimals
    places = max(decimals, default=0)
    aligned = zip(values, texts, is_float, strict=True)
    return [f"{value:.{places}f}" if is_one else text for value, text, is_one in aligned]


def key_view(index: int, label: str, detail: str = "") -> dict[str, str]:
    """One line of a legend: the colour and mark of curve or family `index`, its name, and a detail."""
    marker = MARKERS[index % len(MARKERS)]
    return {"color": series_variable(index), "path": _KEY_PATHS[marker], "label": label, "detail": detail}


_KEY_PATHS = {
    "o": "M9 3.5a3.5 3.5 0 1 0 .01 0z",
    "s": "M5.7 3.7h6.6v6.6h-6.6z",
    "D": "M9 2.5l4.5 4.5-4.5 4.5-4.5-4.5z",
    "^": "M9 3l4.2 7.4h-8.4z",
    "v": "M9 11l4.2-7.4h-8.4z",
    "P": "M7.5 2.7h3v2.8h2.8v3h-2.8v2.8h-3v-2.8h-2.8v-3h2.8z",
}
"""The plots' markers as paths in a box of 18 x 14."""
