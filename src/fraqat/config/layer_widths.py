"""The recipe's section `quantization.layer_widths`: a width for every layer, chosen at a given average size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fraqat.analysis.layer_widths import LayerChoices, WidthChoice, choose_layer_widths
from fraqat.errors import ConfigError, config_error
from fraqat.nn import STRICT_KEYS

SECTION = "quantization.layer_widths"
KIND = "layer-widths"
RISE_PREFIX = "rise at "
_MEASURE = f"measure with `fraqat analyze RECIPE --what {KIND} --out FOLDER` and pass FOLDER/{KIND}.json"


@dataclass(frozen=True)
class ChosenWidths:
    """The answer, kept in the recipe so that a run needs no table.

    Args:
        average_bits, widths: What it was chosen for; where the section says otherwise, the table is read again.
        bits: Layer -> width.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    average_bits: float
    widths: tuple[float, ...]
    bits: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class LayerWidthsSpec:
    """Widths by layer, of least summed rise of the loss at a given average.

    Args:
        average_bits: Largest average over the weights of all quantized layers, of their codes alone.
        table: `layer-widths.json` of `fraqat analyze --what layer-widths`; read when the recipe is.
        widths: Those of the table that layers may have; empty takes all of them.
        chosen: Filled in from the table; nothing that a person writes.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    average_bits: float
    table: str
    widths: tuple[float, ...] = ()
    chosen: ChosenWidths | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.average_bits) and self.average_bits > 0):
            raise config_error(f"{SECTION}.average_bits", self.average_bits, allowed="a positive number", fix="use 4")
        if len(set(self.widths)) < len(self.widths):
            raise config_error(
                f"{SECTION}.widths", list(self.widths), allowed="different widths", fix="name each width once"
            )

    @property
    def bits(self) -> Mapping[str, float]:
        """Layer -> width."""
        return self.chosen.bits if self.chosen is not None else {}


def with_chosen_widths(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a recipe with `chosen` filled in, from the table, unless it answers the section already.

    Raises:
        ConfigError: The table cannot be read, lacks a width, or has no such average.
    """
    quantization: Any = values.get("quantization")
    section: Any = quantization.get("layer_widths") if isinstance(quantization, dict) else None
    if not isinstance(section, dict) or not {"average_bits", "table"} <= set(section) or _is_answered(section):
        return values  # what is missing, the schema says
    spec = _spec_of(section)
    choice = choose_from_table(spec)
    chosen = {"average_bits": spec.average_bits, "widths": list(spec.widths), "bits": choice.bits}
    return {**values, "quantization": {**quantization, "layer_widths": {**section, "chosen": chosen}}}


def choose_from_table(spec: LayerWidthsSpec) -> WidthChoice:
    """The widths of least summed rise for a section, from its table.

    Raises:
        ConfigError: See `with_chosen_widths`.
    """
    layers = read_layer_choices(Path(spec.table))
    if spec.widths:
        layers = tuple(_limited(layer, spec) for layer in layers)
    try:
        return choose_layer_widths(layers, spec.average_bits)
    except ConfigError as error:
        raise ConfigError(f"{SECTION}: {error}") from None


def read_layer_choices(path: Path) -> tuple[LayerChoices, ...]:
    """The layers of a file of `fraqat analyze --what layer-widths`.

    Raises:
        ConfigError: It is missing, or no such file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["kind"] != KIND:
            raise ValueError(f"it is an analysis of {values['kind']}")
        return tuple(_layer_choices(row) for row in values["tables"][0]["rows"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        shown = f"{path} ({error.strerror if isinstance(error, OSError) else error})"
        raise config_error(f"{SECTION}.table", shown, allowed=f"an analysis of {KIND}", fix=_MEASURE) from None


def rise_column(bits: float) -> str:
    """Heading of a column of rises."""
    return f"{RISE_PREFIX}{bits:g}"


def _layer_choices(row: Mapping[str, Any]) -> LayerChoices:
    rises = {
        float(name.removeprefix(RISE_PREFIX)): float(rise)
        for name, rise in row.items()
        if name.startswith(RISE_PREFIX) and rise is not None
    }
    return LayerChoices(row["layer"], int(row["weights"]), rises)


def _limited(layer: LayerChoices, spec: LayerWidthsSpec) -> LayerChoices:
    """A layer with the widths of the section; one with a single width has it by a rule, and keeps it."""
    if len(layer.rises) == 1:
        return layer
    missing = [bits for bits in spec.widths if bits not in layer.rises]
    if missing:
        raise config_error(
            f"{SECTION}.widths",
            missing[0],
            allowed=f"widths of the table: {', '.join(f'{b:g}' for b in sorted(layer.rises))}",
            fix="leave it out, or measure it with --bits",
        )
    return LayerChoices(layer.name, layer.num_weights, {bits: layer.rises[bits] for bits in spec.widths})


def _spec_of(section: Mapping[str, Any]) -> LayerWidthsSpec:
    try:
        return LayerWidthsSpec(
            float(section["average_bits"]), str(section["table"]), tuple(float(b) for b in section.get("widths") or ())
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise config_error(
            SECTION, dict(section), allowed="average_bits and widths as numbers, table as a path", fix="correct it"
        ) from None


def _is_answered(section: Mapping[str, Any]) -> bool:
    chosen = section.get("chosen")
    if not isinstance(chosen, Mapping):
        return False
    widths = list(section.get("widths") or ())
    return chosen.get("average_bits") == section["average_bits"] and list(chosen.get("widths") or ()) == widths
