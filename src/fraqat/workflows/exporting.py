"""`fraqat export` and `fraqat generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fraqat.config import load_recipe, load_values, merged
from fraqat.errors import ModelError, OutputError, check_seed, config_error
from fraqat.export import FloatDtype, PackedSize, write_packed
from fraqat.files import atomic_file
from fraqat.nn import packed_codes, quantized_layers
from fraqat.table import Table
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import Session, open_session

FORMATS = ("packed",)
RECIPE_FILE = "recipe.yaml"


def export(
    run: RunFolder,
    export_format: str,
    progress: Progress,
    *,
    float_dtype: FloatDtype = "float32",
    overwrite: bool = False,
    session: Session[Any] | None = None,
) -> tuple[Path, PackedSize]:
    """Writes the student of a finished run for a target.

    Args:
        run: A finished run.
        export_format: One of `FORMATS`.
        progress: Told what happens.
        float_dtype: Precision of everything that is not quantized.
        overwrite: Replace an export that is there.
        session: Models and data of the run's recipe, if they are loaded already.

    Returns:
        The folder written and its size.
    """
    if export_format not in FORMATS:
        raise config_error("format", export_format, allowed=", ".join(FORMATS), fix="use packed")
    run.methods()
    recipe = run.recipe()
    session = session or open_session(recipe)
    student = session.load_student(recipe, run.student_path)
    folder = run.export_path(export_format)
    size = write_packed(
        student,
        session.description(),
        folder,
        float_dtype=float_dtype,
        extra_files={RECIPE_FILE: recipe.to_yaml()},
        overwrite=overwrite,
    )
    progress.say(f"{folder}: {size.num_file_bytes / 1e6:.2f} MB, {size.bits_per_weight:.3f} bits per quantized weight")
    return folder, size


def generate(
    source: Path,
    prompts: tuple[str, ...],
    out: Path,
    progress: Progress,
    *,
    seed: int = 0,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Makes images, texts or speech with the student of a run or of a packed export.

    Args:
        source: Run folder or export folder.
        prompts: One file each.
        out: A file for one prompt (PNG, TXT or WAV, as the recipe's task makes), else a folder for `000.png`, `001.png`, ...
        progress: Told how many are done.
        seed: Seed of the first one.
        changes: Section of the recipe -> fields to use instead of its own; None values are left out.
        overwrite: Replace files that are there.

    Returns:
        The files written.
    """
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise config_error(
            "prompt", list(prompts), allowed="at least one text that is not empty", fix="pass --prompt TEXT"
        )
    check_seed("seed", seed)
    session, load = _open_source(source, changes or {})
    suffix = session.sample_suffix
    is_single = len(prompts) == 1 and out.suffix.lower() == suffix
    if not is_single and out.suffix:
        raise config_error(
            "out", str(out), allowed=f"NAME{suffix} for one prompt, a folder for more", fix="correct --out"
        )
    paths = [out] if is_single else [out / f"{i:03d}{suffix}" for i in range(len(prompts))]
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise OutputError(f"{existing[0]} exists already. Fix: choose another --out or pass --overwrite.")
    files = session.generate(
        load(), prompts, seed=seed, on_done=lambda num_done: progress.count("sampling", num_done, len(prompts))
    )
    for path, content in zip(paths, files, strict=True):
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    return paths


def _open_source(
    source: Path, changes: Mapping[str, Mapping[str, Any]]
) -> tuple[Session[Any], Callable[[], nn.Module]]:
    """The session of a run or export, with changes of its recipe, and what loads its student."""
    if not (source / RECIPE_FILE).is_file():
        raise ModelError(
            f"{source} is neither a run nor an export. Fix: pass a folder of `fraqat train` or `fraqat export`."
        )
    recipe = load_recipe(str(source / RECIPE_FILE))
    given = {name: {k: v for k, v in fields.items() if v is not None} for name, fields in changes.items()}
    values = recipe.to_values()
    foreign = [name for name, fields in given.items() if fields and name not in values]
    if foreign:
        raise config_error(
            foreign[0], given[foreign[0]], allowed=f"settings of a {recipe.task} recipe", fix="leave the option out"
        )
    session = open_session(load_values(merged(values, {name: fields for name, fields in given.items() if fields})))
    if (source / "manifest.json").is_file():
        return session, lambda: session.load_packed(source)
    run = RunFolder.open(source)
    run.methods()
    return session, lambda: session.load_student(recipe, run.student_path)


def check_packed(run: RunFolder, session: Session[Any] | None = None) -> Table:
    """Compares the packed export of a run with the trained student, on held-out inputs.

    Returns:
        Differing codes (the bound is 0) and the largest difference of the outputs (the bound is 0 on the same machine: both
        multiply the same scales with the same codes).
    """
    recipe = run.recipe()
    session = session or open_session(recipe)
    student = session.load_student(recipe, run.student_path)
    packed = session.load_packed(run.export_path("packed"))
    codes = packed_codes(packed)
    differing = sum(
        int((layer.weight_quantizer.codes(layer.weight)[0] != codes[name]).sum())
        for name, layer in quantized_layers(student)
    )
    batch = session.task.validation_batches(recipe.train.batch_size)[0]
    inputs = session.task.make_inputs(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (session.task.predict(model, inputs) for model in (student, packed))
    differences = [float((expected[name] - found[name]).abs().max()) for name in expected]
    rows = (
        ("codes that differ", differing, 0),
        ("largest output difference", max(differences), 0.0),
        ("largest output", max(float(tensor.abs().max()) for tensor in expected.values()), None),
    )
    return Table("Packed file against the trained student", ("check", "found", "bound"), rows)
