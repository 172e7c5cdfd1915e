"""`fraqat evaluate`: the original, the baselines and the student on the same prompts and seeds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.config import Recipe
from fraqat.distill import validation_loss
from fraqat.errors import OutputError
from fraqat.evaluation import EvaluationSpec, image_quality
from fraqat.export import PackedSize, write_packed
from fraqat.files import atomic_folder, write_json_atomic
from fraqat.table import Table
from fraqat.workflows.images import to_png
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.session import Session, resolve_source

ORIGINAL = "original"
NUM_SHOWN = 8
_COLUMNS = (
    "model",
    "weights",
    "size, MB",
    "distillation loss",
    "Frechet",
    "PSNR, dB",
    "digit, %",
    "colours, %",
    "steps",
    "train, s",
)


def evaluate(run: RunFolder, progress: Progress, *, num_images: int | None = None, overwrite: bool = False) -> Table:
    """Samples images of every finished method, compares them with the original's, and writes `evaluation.json`.

    Args:
        run: A finished run.
        progress: Told what happens.
        num_images: Instead of the recipe's `evaluation.num_images`.
        overwrite: Replace an evaluation that is there.

    Returns:
        The table, original first.

    Raises:
        OutputError: There is an evaluation already.
        ModelError: The run is not finished.
    """
    if run.evaluation_path.exists() and not overwrite:
        raise OutputError(f"{run.evaluation_path} exists already. Fix: pass --overwrite to evaluate again.")
    recipe, methods = run.recipe(), run.methods()
    spec = recipe.evaluation
    if num_images is not None:
        spec = dataclasses.replace(spec, num_images=num_images)
    session = Session(recipe)
    prompts = session.held_out_prompts(spec.num_images)
    reference = _sample(session, session.teacher, prompts, spec, ORIGINAL, progress)
    models = [_original_row(session, reference, prompts)]
    pictures = {ORIGINAL: reference}
    for label, method in methods.items():
        student = session.load_student(method.recipe(), method.student_path)
        images = _sample(session, student, prompts, spec, label, progress)
        models.append(_method_row(session, label, method, student, images, reference, prompts))
        pictures[label] = images
    _write_images(run.images_path, {label: images[:NUM_SHOWN] for label, images in pictures.items()})
    evaluation = {
        "num_images": spec.num_images,
        "seed": spec.seed,
        "prompts": list(prompts[:NUM_SHOWN]),
        "models": models,
    }
    write_json_atomic(run.evaluation_path, evaluation)
    return quality_table(evaluation, recipe)


def quality_table(evaluation: dict[str, Any], recipe: Recipe) -> Table:
    """The table of `evaluation.json`."""
    rows = tuple(_cells(row) for row in evaluation["models"])
    sampler = recipe.sampler
    notes = (
        f"{evaluation['num_images']} images per model from held-out prompts, {sampler.num_steps} sampler steps, guidance "
        f"{sampler.guidance_scale:g}, the same prompt and seed in every model.",
        "Distillation loss: mean squared error to the original's output on held-out data. Frechet: distance to the original's "
        "images in the features of the colour-digits classifier. PSNR: median over pairs. Digit, colours: share of images that "
        "show what the prompt says, by the same classifier. Size: transformer file, everything in it.",
    )
    return Table(f"Quality of {recipe.name}", _COLUMNS, rows, notes)


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    quality = row["quality"]
    return (
        row["model"],
        row["weights"],
        round(row["num_file_bytes"] / 1e6, 2),
        row["validation_loss"],
        quality["frechet"],
        quality["psnr_db"],
        round(100 * quality["digit"], 1),
        round(100 * quality["colors"], 1),
        row["num_steps"],
        round(row["train_s"], 1) if row["train_s"] is not None else None,
    )


def _sample(
    session: Session, model: nn.Module, prompts: tuple[str, ...], spec: EvaluationSpec, label: str, progress: Progress
) -> Tensor:
    start, parts = time.perf_counter(), []
    for first, part in _batches(prompts, spec.batch_size):
        parts.append(session.sample(model, part, seed=spec.seed + first, batch_size=spec.batch_size))
        progress.count(f"sampling {label}", first + len(part), len(prompts))
    progress.say(f"{label}: {len(prompts)} images in {time.perf_counter() - start:.1f} s")
    return torch.cat(parts)


def _batches(prompts: tuple[str, ...], batch_size: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    for first in range(0, len(prompts), batch_size):
        yield first, prompts[first : first + batch_size]


def _original_row(session: Session, images: Tensor, prompts: tuple[str, ...]) -> dict[str, Any]:
    quality = image_quality(images, images, prompts, session.judge, session.judge)
    quality_values = dataclasses.asdict(quality) | {"frechet": None, "psnr_db": None}
    return {
        "model": ORIGINAL,
        "weights": _dtype_label(session),
        "num_file_bytes": _original_bytes(session),
        "validation_loss": None,
        "quality": quality_values,
        "num_steps": None,
        "train_s": None,
    }


def _method_row(
    session: Session,
    label: str,
    method: RunFolder,
    student: nn.Module,
    images: Tensor,
    reference: Tensor,
    prompts: tuple[str, ...],
) -> dict[str, Any]:
    recipe = method.recipe()
    result = method.read_json(method.result_path)
    quality = image_quality(images, reference, prompts, session.judge, session.judge)
    activation = recipe.quantization.activation
    return {
        "model": label,
        "weights": f"W{recipe.quantization.weight.bits:g}A{activation.bits:g}" if activation else "weights only",
        **dataclasses.asdict(packed_size(session, student)),
        "validation_loss": validation_loss(session.task, session.teacher, student, recipe.train),
        "quality": dataclasses.asdict(quality),
        "num_steps": result["num_steps"],
        "train_s": result["train_s"],
    }


def packed_size(session: Session, student: nn.Module) -> PackedSize:
    """Size of the student's packed file, found by writing it to a temporary place."""
    with TemporaryDirectory() as folder:
        return write_packed(student, session.description(), Path(folder) / "packed")


def _original_bytes(session: Session) -> int:
    from fraqat.tasks.pipelines import transformer_file_bytes

    folder = Path(resolve_source(session.recipe.model).source)
    if folder.is_dir() and (num_bytes := transformer_file_bytes(folder)):
        return num_bytes
    return sum(p.numel() * p.element_size() for p in session.teacher.parameters())


def _dtype_label(session: Session) -> str:
    from fraqat.tasks.pipelines import stored_dtype

    folder = Path(resolve_source(session.recipe.model).source)
    return stored_dtype(folder) if folder.is_dir() else session.recipe.model.teacher_dtype


def _write_images(folder: Path, pictures: dict[str, Tensor]) -> None:
    with atomic_folder(folder, replace=True) as temporary:
        for label, images in pictures.items():
            (temporary / label).mkdir()
            for i, image in enumerate(images):
                (temporary / label / f"{i:02d}.png").write_bytes(to_png(image))
