"""`fraqat evaluate`: the original, the baselines and the student on the same prompts and seeds."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from fraqat.config import ORIGINAL
from fraqat.distill import validation_loss
from fraqat.errors import ModelError, OutputError
from fraqat.evaluation import EvaluationSpec, image_quality
from fraqat.export import PackedSize, write_packed
from fraqat.files import atomic_folder, write_json_atomic
from fraqat.nn import quantized_layers, spec_label
from fraqat.table import Table
from fraqat.workflows.images import to_png
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.session import Session, resolve_source

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


def evaluate(
    run: RunFolder,
    progress: Progress,
    *,
    num_images: int | None = None,
    overwrite: bool = False,
    session: Session | None = None,
) -> Table:
    """Samples images of every finished method, compares them with the original's, and writes `evaluation.json`.

    Args:
        run: A finished run.
        progress: Told what happens.
        num_images: Instead of the recipe's `evaluation.num_images`.
        overwrite: Replace an evaluation that is there.
        session: Models and data of the run's recipe, if they are loaded already.

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
    for name in run.untrained_baselines():
        progress.warn(f"baseline {name} is not trained and left out: run `fraqat train --baselines` to add it")
    session = session or Session(recipe)
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
        "sampler": dataclasses.asdict(recipe.sampler),
        "losses": [dataclasses.asdict(term) for term in recipe.train.losses],
        "models": models,
    }
    write_json_atomic(run.evaluation_path, evaluation)
    return quality_table(evaluation, recipe.name)


def quality_table(evaluation: dict[str, Any], name: str) -> Table:
    """The table of `evaluation.json` of the recipe `name`.

    Raises:
        ModelError: The evaluation lacks something, as one of another version does.
    """
    try:
        rows = tuple(_cells(row) for row in evaluation["models"])
        sampler, terms = evaluation["sampler"], evaluation["losses"]
        loss = " + ".join(f"{term['weight']:g} {term['name']}" for term in terms).replace("1 mse", "mean squared error")
        notes = (
            f"{evaluation['num_images']} images per model from held-out prompts, {sampler['num_steps']} sampler steps, "
            f"guidance {sampler['guidance_scale']:g}, the same prompt and seed in every model.",
            f"Distillation loss: {loss} to the original's output on held-out data. Frechet: distance to the original's "
            "images in the features of the colour-digits classifier. PSNR: median over pairs. Digit, colours: share of "
            "images that show what the prompt says, by the same classifier. Size: transformer file, everything in it.",
        )
    except (KeyError, TypeError) as error:
        raise ModelError(f"evaluation.json lacks {error}. Fix: run `fraqat evaluate RUN --overwrite`.") from error
    return Table(f"Quality of {name}", _COLUMNS, rows, notes)


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
    start = time.perf_counter()
    images = session.sample(
        model,
        prompts,
        seed=spec.seed,
        batch_size=spec.batch_size,
        on_done=lambda num_done: progress.count(f"sampling {label}", num_done, len(prompts)),
    )
    progress.say(f"{label}: {len(prompts)} images in {time.perf_counter() - start:.1f} s")
    return images


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
    result = method.read_json(method.result_path)
    quality = image_quality(images, reference, prompts, session.judge, session.judge)
    return {
        "model": label,
        "weights": _weights_label(student),
        **dataclasses.asdict(packed_size(session, student)),
        "validation_loss": validation_loss(session.task, session.teacher, student, session.recipe.train),
        "quality": dataclasses.asdict(quality),
        "num_steps": result["num_steps"],
        "train_s": result["train_s"],
    }


def packed_size(session: Session, student: nn.Module) -> PackedSize:
    """Size of the student's packed file, found by writing it to a temporary place."""
    with TemporaryDirectory() as folder:
        return write_packed(student, session.description(), Path(folder) / "packed")


def _weights_label(student: nn.Module) -> str:
    """What most layers are, then the exceptions with their number: `W4A8`, or `W4A8, 1 W4A16`."""
    counts = Counter(spec_label(layer.spec) for _, layer in quantized_layers(student))
    (usual, _), *others = counts.most_common()
    return ", ".join([usual, *(f"{num} {label}" for label, num in others)])


def _original_files(session: Session) -> list[Path]:
    from fraqat.tasks.pipelines import transformer_files

    folder = Path(resolve_source(session.recipe.model).source)
    return transformer_files(folder, session.recipe.model.variant) if folder.is_dir() else []


def _original_bytes(session: Session) -> int:
    if files := _original_files(session):
        return sum(path.stat().st_size for path in files)
    return sum(p.numel() * p.element_size() for p in session.teacher.parameters())


def _dtype_label(session: Session) -> str:
    from fraqat.tasks.pipelines import stored_dtype

    files = _original_files(session)
    return stored_dtype(files[0]) if files else session.recipe.model.teacher_dtype


def _write_images(folder: Path, pictures: dict[str, Tensor]) -> None:
    with atomic_folder(folder, replace=True) as temporary:
        for label, images in pictures.items():
            (temporary / label).mkdir()
            for i, image in enumerate(images):
                (temporary / label / f"{i:02d}.png").write_bytes(to_png(image))
