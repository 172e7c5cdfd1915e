"""What `fraqat verify` found, and whether the bounds of the target hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fraqat.export import Bound, StepsApart
from fraqat.table import Table

WEIGHT_SQNR_DB = 100.0
"""Least ratio of a weight to what scales in the file add to it."""
_NARROW_BITS = 8


@dataclasses.dataclass
class Error:
    """Squares of a signal and of its error, summed over what was compared."""

    signal: float = 0.0
    error: float = 0.0
    largest: float = 0.0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Takes one comparison in; both of the same shape."""
        difference = (found.double() - wanted.double()).abs()
        self.signal += float(wanted.double().square().sum())
        self.error += float(difference.square().sum())
        largest = float(difference.max())
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)

    @property
    def sqnr_db(self) -> float:
        """Signal over error in dB; infinite where nothing differs, minus infinity where nothing is right."""
        if not math.isfinite(self.error):
            return -math.inf
        if self.error == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.error) if self.signal else -math.inf


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One layer: integers in the file, and its output for the same input."""

    name: str
    num_differing_codes: int | None
    error: Error | None = None
    weight_error: Error | None = None
    steps: StepsApart | None = None

    def holds(self, bound: Bound) -> bool:
        """Whether the layer is what was trained."""
        if self.num_differing_codes != 0:
            return False
        if self.steps is not None and bound.steps is not None and self.steps.bits == _NARROW_BITS:
            is_near = self.steps.largest <= bound.steps
        else:
            is_near = True
        has_scales = self.weight_error is None or self.weight_error.sqnr_db >= WEIGHT_SQNR_DB
        return is_near and has_scales and (self.error is None or self.error.sqnr_db >= bound.layer_sqnr_db)


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was found.

    Args:
        summary: Checks of the whole export with their bounds.
        layers: One row per layer.
        holds: Whether every bound holds.
        first_difference: The first layer, in the order of the model, that breaks its bound; empty if none.
        samples: Picture, text or sound of the student and of the export for the same prompt, where one was asked for.
    """

    summary: Table
    layers: Table
    holds: bool
    first_difference: str
    samples: tuple[Path, ...] = ()


def judge(layers: list[LayerCheck], whole: Mapping[str, Error], bound: Bound, target: str) -> Verified:
    """Holds what was found against the bounds.

    Args:
        layers: In the order of the model.
        whole: Outputs of the parts by name.
        bound: Of the target.
        target: Its name.
    """
    broken = [check.name for check in layers if not check.holds(bound)]
    holds = not broken and all(error.sqnr_db >= bound.sqnr_db for error in whole.values())
    first = broken[0] if broken else ""
    notes = (f"Bounds: {bound.reason}.", f"First layer that breaks its bound: {first or 'none'}.")
    title = f"{target} against the trained student: {'holds' if holds else 'DOES NOT HOLD'}"
    rows = (*_layer_checks(layers, bound), *_output_checks(whole, bound))
    summary = Table(title, ("check", "found", "bound"), rows, notes)
    return Verified(summary, _layer_table(layers, target), holds, first)


def _layer_table(layers: list[LayerCheck], target: str) -> Table:
    rows = tuple(
        (
            check.name,
            check.num_differing_codes,
            _number(check.error.sqnr_db) if check.error else None,
            _finite(check.error.largest) if check.error else None,
            check.steps.largest if check.steps else None,
        )
        for check in layers
    )
    columns = ("layer", "codes that differ", "SQNR, dB", "largest error", "steps")
    return Table(f"Layers of {target}, each with the input that it got there", columns, rows)


def _layer_checks(layers: list[LayerCheck], bound: Bound) -> list[tuple[Any, ...]]:
    outputs = [check.error.sqnr_db for check in layers if check.error is not None]
    weights = [check.weight_error.sqnr_db for check in layers if check.weight_error is not None]
    num_present = sum(check.num_differing_codes is not None for check in layers)
    rows: list[tuple[Any, ...]] = [
        ("layers whose codes are in the file", num_present, len(layers)),
        ("codes that differ", sum(check.num_differing_codes or 0 for check in layers), 0),
        ("layers whose output was compared", len(outputs), None),
    ]
    if weights:
        rows.append(("least SQNR of a weight, scales included, dB", _number(min(weights)), WEIGHT_SQNR_DB))
    if outputs:
        rows.append(("least SQNR of a layer, dB", _number(min(outputs)), _number(bound.layer_sqnr_db)))
    steps = [check.steps for check in layers if check.steps is not None]
    for bits in sorted({item.bits for item in steps}):
        largest = max(item.largest for item in steps if item.bits == bits)
        limit = bound.steps if bits == _NARROW_BITS else None
        rows.append((f"largest difference of a {bits}-bit layer output, steps", largest, limit))
    return rows


def _output_checks(whole: Mapping[str, Error], bound: Bound) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for name, error in whole.items():
        rows.append((f"SQNR of {name}, dB", _number(error.sqnr_db), _number(bound.sqnr_db)))
        rows.append((f"largest error of {name}", _finite(error.largest), None))
    return rows


def _number(value: float | None) -> Any:
    """Infinity as text, which JSON has no number for."""
    if value is None:
        return None
    return round(value, 1) if math.isfinite(value) else ("exact" if value > 0 else "no signal")


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else "not finite"
