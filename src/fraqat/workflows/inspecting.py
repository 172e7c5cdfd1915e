"""`fraqat inspect`: what a run, an export, a recipe or a model holds, as a table of layers."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fraqat.config import load_recipe, recipe_names
from fraqat.export import read_packed
from fraqat.nn import describe, granularity_label, spec_label
from fraqat.table import Table
from fraqat.tasks import ModelSpec
from fraqat.tasks.known import describe_model
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import families_of, resolve_source
from fraqat.workflows.training import layers


def inspect(source: str) -> Table:
    """The layers of whatever `source` names.

    Args:
        source: A run folder, an export folder, a recipe (name or YAML file), or a model (folder, hub id, `zoo:NAME`).

    Raises:
        ModelError, ConfigError: It is none of these, or damaged.
    """
    path = Path(source)
    if (path / "manifest.json").is_file():
        return _export_table(path)
    if (path / "recipe.yaml").is_file():
        return _run_table(RunFolder.open(path))
    if source in recipe_names() or path.suffix in (".yaml", ".yml"):
        return layers(load_recipe(source)).to_table()
    return _model_table(source)


def layers_table(run: RunFolder) -> Table:
    """Layers of a finished run with their SQNR."""
    rows = run.read_json(run.layers_path)
    columns = tuple(rows[0])
    notes = (
        "Weight SQNR: master weight against its quantized form. Output SQNR: the layer's output in the original against the "
        "student's, both running on the same held-out inputs; it holds the errors of all layers before.",
    )
    return Table("Layers", columns, tuple(tuple(row[c] for c in columns) for row in rows), notes)


def _run_table(run: RunFolder) -> Table:
    return layers_table(run) if run.layers_path.is_file() else layers(run.recipe()).to_table()


def _export_table(folder: Path) -> Table:
    packed = read_packed(folder)
    rows = tuple(
        (name, spec_label(spec), granularity_label(spec), *_storage(packed.tensors, name))
        for name, spec in packed.specs.items()
    )
    note = f"{packed.description.class_name} of {packed.description.base_pipeline}, {len(rows)} quantized layers"
    return Table("Packed layers", ("layer", "bits", "granularity", "bytes", "scales"), rows, (note,))


def _storage(tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    codes, scale = tensors[f"{name}.weight.codes"], tensors[f"{name}.weight.scale"]
    return codes.numel() * codes.element_size(), scale.numel()


def _model_table(source: str) -> Table:
    spec = resolve_source(ModelSpec(source))
    known = describe_model(spec.source, spec.revision)
    return describe(known.build(), families_of(known)).to_table()
