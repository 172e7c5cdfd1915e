"""Tables of layers as points of plots."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fraqat.table import Table

OTHER_FAMILY = "other"
_NO_FAMILY = ("", "-", "None")
_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)(?=\.|$)")


class PlacedLayer(Protocol):
    """What a plot over layers has to know of each."""

    @property
    def position(self) -> int:
        """Place in the model."""
        ...

    @property
    def name(self) -> str:
        """Qualified name."""
        ...

    @property
    def family(self) -> str:
        """Layer family, `other` for none."""
        ...


@dataclass(frozen=True)
class LayerMark:
    """One layer of a plot with an open and a filled mark.

    Args:
        position: Place in the model.
        name: Qualified name.
        family: Layer family, `other` for none.
        open_value, filled_value: Values of the two marks; None for none.
    """

    position: int
    name: str
    family: str
    open_value: float | None
    filled_value: float | None


@dataclass(frozen=True)
class LayerPoint:
    """One layer of the SQNR plot.

    Args:
        position: Row in the layers table.
        name: Qualified name.
        family: Layer family, `other` for none.
        weight_db: Signal to quantization noise of the weight, in dB; None when not known or infinite.
        output_db: The same for the layer's output.
    """

    position: int
    name: str
    family: str
    weight_db: float | None
    output_db: float | None

    @property
    def rank_db(self) -> float:
        """The value that layers are compared by: SQNR of the output, of the weight where no output was measured."""
        known = [value for value in (self.output_db, self.weight_db) if value is not None]
        return known[0] if known else math.inf


@dataclass(frozen=True)
class Block:
    """Neighbouring layers that share their name up to its first number.

    Args:
        number: That number.
        first: Position of the first layer.
        last: Position of the last layer.
    """

    number: str
    first: int
    last: int


def layer_points(layers: Table) -> tuple[LayerPoint, ...]:
    """The layers that have a finite SQNR of weight or output.

    Args:
        layers: A table whose columns may be `layer`, `family`, `weight SQNR dB` and `output SQNR dB`, in any case and with
            spaces or underscores.

    Returns:
        Points in the order of the rows.
    """
    columns = [name.lower().replace("_", " ") for name in layers.columns]
    index = {key: _find(columns, *words) for key, words in _COLUMN_WORDS.items()}

    def value(row: Any, key: str) -> Any:
        place = index[key]
        return None if place is None else row[place]

    points: list[LayerPoint] = []
    for position, row in enumerate(layers.rows):
        weight_db, output_db = _finite(value(row, "weight")), _finite(value(row, "output"))
        if weight_db is None and output_db is None:
            continue
        name = str(value(row, "layer") or f"layer {position}")
        points.append(LayerPoint(position, name, family_label(value(row, "family")), weight_db, output_db))
    return tuple(points)


def layer_marks(
    layers: Table, open_column: str, filled_column: str, *, place_column: str = ""
) -> tuple[LayerMark, ...]:
    """Two columns of a table of layers as marks, in model order.

    Args:
        layers: A table with the columns `layer`, `family` and these.
        open_column, filled_column: Columns of the values; what is no finite number becomes None.
        place_column: Column of the place in the model; empty where rows are in model order.

    Raises:
        ValueError: A column is missing.
    """
    places = [layers.columns.index(name) for name in ("layer", "family", open_column, filled_column)]
    place = layers.columns.index(place_column) if place_column else None
    marks: list[LayerMark] = []
    for index, row in enumerate(layers.rows):
        name, family, open_value, filled_value = (row[i] for i in places)
        position = index if place is None else int(row[place])
        marks.append(LayerMark(position, str(name), family_label(family), _finite(open_value), _finite(filled_value)))
    return tuple(sorted(marks, key=lambda mark: mark.position))


def family_label(family: Any) -> str:
    """A family as legends show it."""
    return OTHER_FAMILY if str(family) in _NO_FAMILY else str(family)


def families_of(points: Sequence[PlacedLayer]) -> tuple[str, ...]:
    """Families in the order in which they first occur, `other` last."""
    names = list(dict.fromkeys(point.family for point in points))
    return tuple(sorted(names, key=lambda name: name == OTHER_FAMILY))


def blocks_of(points: Sequence[PlacedLayer]) -> tuple[Block, ...]:
    """Runs of layers that belong to one numbered block; layers outside any block are left out."""
    blocks: list[Block] = []
    last_key: str | None = None
    for point in points:
        match = _BLOCK.match(point.name)
        key = match[0] if match else None
        if match and key == last_key:
            blocks[-1] = Block(match[1], blocks[-1].first, point.position)
        elif match:
            blocks.append(Block(match[1], point.position, point.position))
        last_key = key
    return tuple(blocks)


def lowest_points(points: tuple[LayerPoint, ...], num_points: int = 3) -> tuple[LayerPoint, ...]:
    """The layers with the lowest SQNR of the output; of the weight when no output was measured at all."""
    measured = [point for point in points if point.output_db is not None]
    return tuple(sorted(measured or points, key=lambda point: point.rank_db)[:num_points])


_COLUMN_WORDS = {"layer": ("layer",), "family": ("family",), "weight": ("weight", "sqnr"), "output": ("output", "sqnr")}


def _find(columns: list[str], *words: str) -> int | None:
    return next((place for place, name in enumerate(columns) if all(word in name for word in words)), None)


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
