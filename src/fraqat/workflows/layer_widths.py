"""Widths by layer: what `fraqat analyze --what layer-widths` measures, and what `fraqat plan` shows of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from fraqat.analysis import LayerChoices, choose_layer_widths, layer_width_rises
from fraqat.baselines import CalibrationLoss
from fraqat.config import Recipe, rise_column
from fraqat.errors import config_error
from fraqat.nn import LayerFamilies
from fraqat.numerics import Grid
from fraqat.table import Table, format_value
from fraqat.workflows.progress import Progress
from fraqat.workflows.sessions import Session, open_session

DEFAULT_WIDTHS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


def layer_width_tables(
    session: Session[Any], recipe: Recipe, student: nn.Module, widths: tuple[float, ...], progress: Progress
) -> list[Table]:
    """The rise of the loss with each layer alone at each width, and what averages of whole bits would give.

    Args:
        session: Models and data.
        recipe: Of the session; layers whose width a rule sets keep it.
        student: As training begins with it, on the floating-point path.
        widths: In bits.
        progress: Told how many layers are done.
    """
    names = [row.name for row in session.layers(recipe).quantized]
    pinned = {row.name for row in session.layers(recipe).quantized if _is_pinned(recipe, row.spec)}
    found = layer_width_rises(
        student,
        widths,
        CalibrationLoss(session.task, session.teacher, student, recipe.train),
        pinned=pinned.__contains__,
        on_layer=lambda done: progress.count("layers", done, len(names)),
    )
    return [_rises_table(recipe, found, session.families), _averages_table(found)]


def check_one_width(recipe: Recipe) -> None:
    """Refuses to measure a recipe whose widths are chosen already.

    Raises:
        ConfigError: It has `layer_widths`.
    """
    if recipe.quantization.layer_widths is not None:
        raise config_error(
            "quantization.layer_widths",
            "set",
            allowed="null, to measure what it is chosen from",
            fix="pass --set quantization.layer_widths=null",
        )


def chosen_widths_table(recipe: Recipe) -> Table | None:
    """The widths that a recipe's layers have, family rules and table considered; None where all layers share one."""
    spec = recipe.quantization.layer_widths
    if spec is None:
        return None
    rows = open_session(recipe).layers(recipe).quantized
    sizes = {row.name: _size(row.shape) for row in rows}
    rooms = {row.name: Grid(row.spec.weight.bits).storage_bits for row in rows if row.spec is not None}
    total = sum(sizes.values())
    average = sum(sizes[name] * rooms[name] for name in sizes) / total
    cells = tuple((row.name, row.family, sizes[row.name], row.spec.weight.bits) for row in rows if row.spec is not None)
    note = f"Average {average:.4g} bits over {total:,} weights; at most {spec.average_bits:g} were asked for."
    return Table("Layer widths", ("layer", "family", "weights", "bits"), cells, (note,))


def _is_pinned(recipe: Recipe, spec: Any) -> bool:
    return spec.weight.bits != recipe.quantization.weight.bits


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _rises_table(recipe: Recipe, found: tuple[LayerChoices, ...], families: LayerFamilies) -> Table:
    widths = sorted({bits for layer in found for bits in layer.rises})
    rows = tuple(
        (layer.name, families.family_of(layer.name), layer.num_weights, *(layer.rises.get(bits) for bits in widths))
        for layer in found
    )
    columns = ("layer", "family", "weights", *map(rise_column, widths))
    notes = (
        f"Rise of the distillation loss on {recipe.train.batch_size} training samples with the weights of one layer alone at "
        "so many bits, inputs and all other weights in floating point, without training. A layer with a single value has its "
        "width by a rule.",
    )
    return Table(f"Widths of the layers of {recipe.name}", columns, rows, notes)


def _averages_table(found: tuple[LayerChoices, ...]) -> Table:
    """One row for each width that all free layers could have: everything at that width, and the best mix of the same size."""
    free = [layer for layer in found if len(layer.rises) > 1]
    rows: list[tuple[Any, ...]] = []
    for bits in sorted(free[0].rises if free else ()):
        uniform = [next(iter(layer.rises.values())) if len(layer.rises) == 1 else layer.rises[bits] for layer in found]
        widths = [next(iter(layer.rises)) if len(layer.rises) == 1 else bits for layer in found]
        sizes = [layer.num_weights for layer in found]
        average = sum(n * Grid(b).storage_bits for n, b in zip(sizes, widths, strict=True)) / sum(sizes)
        choice = choose_layer_widths(found, average)
        counts = {b: sum(w == b for w in choice.bits.values()) for b in sorted(set(choice.bits.values()))}
        mix = ", ".join(f"{count} at {format_value(b)}" for b, count in counts.items())
        rows.append((bits, average, sum(uniform), choice.rise, choice.average_bits, mix))
    columns = ("bits", "average", "sum of rises, all alike", "sum of rises, mixed", "average, mixed", "layers")
    note = (
        "Mixed: widths of least sum at the same average of code bits. A sum is the rise of the whole model only where errors "
        "of layers add up."
    )
    return Table("Mixed widths of the same size", columns, tuple(rows), (note,))
