"""`fraqat export` and `fraqat generate`."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fraqat.config import Recipe, load_recipe, load_values, merged
from fraqat.errors import ConfigError, ModelError, OutputError, check_seed, config_error
from fraqat.export import (
    FLOAT_DTYPES,
    MANIFEST_FILE,
    ExportJob,
    FloatDtype,
    LayerPlace,
    Mismatch,
    Target,
    check_model,
    check_plain,
    mismatches,
    read_manifest,
    target_named,
    write_manifest,
)
from fraqat.files import atomic_file, atomic_folder, write_json_atomic, write_text_atomic
from fraqat.nn import LayerRule, calibrate_, packed_codes, quantize_, quantized_layers, unquantize_
from fraqat.table import Table
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import Session, open_session

PACKED = "packed"
RECIPE_FILE = "recipe.yaml"
_NUM_NAMED = 4
_WIDTH_KEY = "width_bits"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        folder: Where.
        num_bytes: Of all files.
        num_quantized_weights: Weights that lie there as integers.
        bits_per_weight: Of codes, scales and description over these; None where the format does not tell them apart.
    """

    folder: Path
    num_bytes: int
    num_quantized_weights: int
    bits_per_weight: float | None


def export(
    run: RunFolder,
    target_name: str,
    progress: Progress,
    *,
    bits: float | None = None,
    float_dtype: FloatDtype = "float32",
    accept_loss: bool = False,
    overwrite: bool = False,
    session: Session[Any] | None = None,
) -> Exported:
    """Writes the student of a finished run for a target, in `RUN/export/TARGET`, or `RUN/export/TARGET-N-bits`.

    Args:
        run: A finished run.
        target_name: A key of `fraqat.export.TARGETS`.
        progress: Told what happens.
        bits: Which of the widths that the student serves (`schedule.kind: several`); None is the final one.
        float_dtype: Precision of everything that is not quantized.
        accept_loss: Quantize the trained weights anew where the target does not compute what was trained.
        overwrite: Replace an export that is there.
        session: Models and data of the run's recipe, if they are loaded already.

    Raises:
        ConfigError: The target does not take the model, or it was trained for another grid and `accept_loss` is false.
    """
    target = target_named(target_name)
    run.methods()
    recipe = run.recipe()
    session = session or open_session(recipe, progress)
    check_target(target, recipe, session)
    student = session.load_student(recipe, run.student_path, with_engine=False, bits=bits).cpu()
    if float_dtype not in target.float_dtypes:
        raise config_error(
            "float_dtype",
            float_dtype,
            allowed=f"{', '.join(target.float_dtypes)} for {target.name}",
            fix="leave it out",
        )
    lost = check_grid(student, target, accept_loss=accept_loss)
    if lost:
        progress.warn(f"{len(lost)} layers are quantized anew for {target.name}; the first: {lost[0].to_text()}")
        fit_(student, target, session)
    place = run.at_width(run.export_path(target.name), bits)
    with atomic_folder(place, replace=overwrite) as folder:
        target.write(_job(student, session, folder, float_dtype, progress))
        write_text_atomic(folder / RECIPE_FILE, recipe.to_yaml())
        if not (folder / MANIFEST_FILE).exists():
            write_manifest(folder, target.name, {"float_dtype": float_dtype, "requantized_layers": len(lost)})
        if bits is not None:
            manifest = run.read_json(folder / MANIFEST_FILE)
            write_json_atomic(folder / MANIFEST_FILE, manifest | {_WIDTH_KEY: bits})
    folder = place
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    num_weights = sum(layer.weight.numel() for _, layer in quantized_layers(student))
    bits = run.read_json(folder / MANIFEST_FILE).get("bits_per_weight")
    told = "" if bits is None else f", {bits:.3f} bits per quantized weight"
    progress.say(f"{folder}: {num_bytes / 1e6:.2f} MB{told}")
    return Exported(folder, num_bytes, num_weights, bits)


def _job(
    student: nn.Module, session: Session[Any], folder: Path, float_dtype: FloatDtype, progress: Progress
) -> ExportJob:
    origin = Path(session.model_spec.source)
    return ExportJob(
        student=student,
        parts=lambda: session.export_parts(student),
        description=session.description(),
        origin=origin if origin.is_dir() else None,
        folder=folder,
        float_dtype=float_dtype,
        say=progress.say,
    )


def check_target(target: Target, recipe: Recipe, session: Session[Any]) -> None:
    """Refuses a target that does not take the model, or whose libraries are missing.

    Raises:
        ConfigError: One of these.
    """
    check_model(target, recipe.task, session.known.class_name)
    missing = [name for name in target.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"target {target.name} needs {', '.join(missing)}. Fix: pip install 'fraqat[{target.extra}]'."
        )


def check_grid(student: nn.Module, target: Target, *, accept_loss: bool) -> list[Mismatch]:
    """The layers that the target does not compute as they were trained.

    Raises:
        ConfigError: There are some, and the loss is not accepted; or the student has branches or smoothed inputs.
    """
    check_plain(student, target)
    found = list(mismatches(student, target))
    if found and not accept_loss:
        shown = "; ".join(item.to_text() for item in found[:_NUM_NAMED])
        more = f"; and {len(found) - _NUM_NAMED} more" if len(found) > _NUM_NAMED else ""
        raise ConfigError(
            f"the run was not trained for target {target.name}: {shown}{more}. Fix: train with `--set target={target.name}`, "
            "or pass --accept-loss to quantize the trained weights anew on the target's grid."
        )
    return found


def fit_(student: nn.Module, target: Target, session: Session[Any]) -> None:
    """Quantizes the trained weights of a student anew, on the grid nearest to its own that the target computes."""
    rules = [LayerRule(pattern="*", skip=True)]
    for name, layer in quantized_layers(student):
        spec = target.nearest(LayerPlace(name, layer.type_name, tuple(layer.weight.shape)), layer.spec)
        if spec is not None:
            rules.append(LayerRule(pattern=name, spec=spec))
    unquantize_(student)
    quantize_(student, rules=rules, families=session.families)
    student.eval().requires_grad_(False)
    train, task = session.recipe.train, session.task
    calibrate_(
        student,
        partial(cast(Any, task).predict, student),
        task.calibration_batches(train.calibration_samples, train.batch_size),
    )


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
    if (source / MANIFEST_FILE).is_file():
        check_is_packed(source)
        return session, lambda: session.load_packed(source)
    run = RunFolder.open(source)
    run.methods()
    return session, lambda: session.load_student(recipe, run.student_path)


@torch.no_grad()
def round_floats_(student: nn.Module, float_dtype: str) -> None:
    """Rounds what is not quantized as an export in `float_dtype` stores it, so that the two can be compared."""
    dtype = FLOAT_DTYPES[float_dtype]
    quantized = {id(layer.weight) for _, layer in quantized_layers(student)}
    quantizers = [
        m for _, layer in quantized_layers(student) for m in (layer.weight_quantizer, layer.activation_quantizer)
    ]
    quantized |= {id(tensor) for m in quantizers if m is not None for tensor in (*m.parameters(), *m.buffers())}
    stored = student.state_dict(keep_vars=True)  # tables that a model makes anew, as of positions, lie in no file
    for tensor in stored.values():
        if tensor.is_floating_point() and id(tensor) not in quantized:
            tensor.copy_(tensor.to(dtype))


def check_is_packed(folder: Path) -> None:
    """Refuses an export that PyTorch does not run.

    Raises:
        ModelError: It was written for another target.
    """
    manifest = RunFolder(folder).read_json(folder / MANIFEST_FILE)
    name = manifest.get("format", PACKED) if isinstance(manifest, dict) else PACKED
    if name != PACKED:
        raise ModelError(
            f"{folder} is an export for {name}, which runs elsewhere. Fix: pass a run or an export of --format packed; "
            "`fraqat verify` runs this one."
        )


def stored_dtype(folder: Path) -> str:
    """The precision in which an export stores what is not quantized."""
    return str(RunFolder(folder).read_json(folder / MANIFEST_FILE).get("float_dtype", "float32"))


def exported_bits(folder: Path) -> float | None:
    """Which of several widths was exported; None for the final one."""
    bits = RunFolder(folder).read_json(folder / MANIFEST_FILE).get(_WIDTH_KEY)
    return None if bits is None else float(bits)


def export_format(folder: Path) -> str:
    """The target of an export.

    Raises:
        ModelError: The folder is no export, or damaged.
    """
    if (folder / MANIFEST_FILE).is_file():
        manifest = RunFolder(folder).read_json(folder / MANIFEST_FILE)
        if isinstance(manifest, dict) and "sha256" in manifest:
            return PACKED
    return str(read_manifest(folder)["format"])


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
