"""`fraqat export` and `fraqat generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqat.config import load_recipe
from fraqat.errors import ModelError, OutputError, check_seed, config_error
from fraqat.export import FloatDtype, PackedSize, write_packed
from fraqat.files import atomic_file
from fraqat.nn import packed_codes, quantized_layers
from fraqat.table import Table
from fraqat.tasks import SamplerSpec
from fraqat.workflows.images import to_png
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.session import PackedSession, Session

FORMATS = ("packed",)
RECIPE_FILE = "recipe.yaml"


def export(
    run: RunFolder,
    export_format: str,
    progress: Progress,
    *,
    float_dtype: FloatDtype = "float32",
    overwrite: bool = False,
    session: Session | None = None,
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
    session = session or Session(recipe)
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
    sampler_changes: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Samples images from a run or from a packed export.

    Args:
        source: Run folder or export folder.
        prompts: One image each.
        out: A PNG file for one prompt, else a folder for `000.png`, `001.png`, ...
        progress: Told how many images are done.
        seed: Seed of the first image.
        sampler_changes: Fields of `SamplerSpec` instead of the recipe's.
        overwrite: Replace images that are there.

    Returns:
        The files written.
    """
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise config_error(
            "prompt", list(prompts), allowed="at least one text that is not empty", fix="pass --prompt TEXT"
        )
    check_seed("seed", seed)
    is_single = len(prompts) == 1 and out.suffix.lower() == ".png"
    if not is_single and out.suffix:
        raise config_error("out", str(out), allowed="NAME.png for one prompt, a folder for more", fix="correct --out")
    paths = [out] if is_single else [out / f"{i:03d}.png" for i in range(len(prompts))]
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise OutputError(f"{existing[0]} exists already. Fix: choose another --out or pass --overwrite.")
    images = _sample(source, prompts, seed, sampler_changes or {}, progress)
    for path, image in zip(paths, images, strict=True):
        with atomic_file(path) as temporary:
            temporary.write_bytes(to_png(image))
    return paths


def _sample(source: Path, prompts: tuple[str, ...], seed: int, changes: dict[str, Any], progress: Progress) -> Tensor:
    if not (source / RECIPE_FILE).is_file():
        raise ModelError(
            f"{source} is neither a run nor an export. Fix: pass a folder of `fraqat train` or `fraqat export`."
        )
    recipe = load_recipe(str(source / RECIPE_FILE))
    values = {name: value for name, value in changes.items() if value is not None}
    sampler = SamplerSpec(**{**recipe.to_values()["sampler"], **values})
    recipe = recipe.model_copy(update={"sampler": sampler})
    settings: dict[str, Any] = {
        "seed": seed,
        "batch_size": recipe.evaluation.batch_size,
        "on_done": lambda num_done: progress.count("sampling", num_done, len(prompts)),
    }
    if (source / "manifest.json").is_file():
        return PackedSession(source).sample(prompts, sampler, **settings)
    run = RunFolder.open(source)
    run.methods()
    session = Session(recipe)
    student = session.load_student(recipe, run.student_path)
    return session.sample(student, prompts, **settings)


def check_packed(run: RunFolder, session: Session | None = None) -> Table:
    """Compares the packed export of a run with the trained student, on held-out inputs.

    Returns:
        Differing codes (the bound is 0) and the largest difference of the outputs (the bound is 0 on the same machine: both
        multiply the same scales with the same codes).
    """
    recipe = run.recipe()
    session = session or Session(recipe)
    student = session.load_student(recipe, run.student_path)
    packed = PackedSession(run.export_path("packed")).transformer
    codes = packed_codes(packed)
    differing = sum(
        int((layer.weight_quantizer.codes(layer.weight)[0] != codes[name]).sum())
        for name, layer in quantized_layers(student)
    )
    batch = session.task.validation_batches(recipe.train.batch_size)[0]
    inputs = session.task.make_inputs(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (session.task.predict(model, inputs) for model in (student, packed))
    rows = (
        ("codes that differ", differing, 0),
        ("largest output difference", float((expected - found).abs().max()), 0.0),
        ("largest output", float(expected.abs().max()), None),
    )
    return Table("Packed file against the trained student", ("check", "found", "bound"), rows)
