"""`fraqat verify`: an export in its target's own runtime against the student of its run."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fraqat.errors import config_error
from fraqat.export import (
    CountsSteps,
    LayerCodes,
    OpenedExport,
    Outputs,
    Part,
    ShowsWeights,
    StepsApart,
    layer_codes,
    run_module,
    target_named,
)
from fraqat.files import atomic_file, write_json_atomic
from fraqat.nn import quantized_layers
from fraqat.workflows.exporting import (
    check_grid,
    check_target,
    export_format,
    exported_bits,
    fit_,
    round_floats_,
    stored_dtype,
)
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import Session, open_session
from fraqat.workflows.verdict import Error, LayerCheck, Verified, judge

NUM_BATCHES = 2
_SAMPLES_FOLDER = "verify"


def verify(
    folder: Path,
    run: RunFolder,
    progress: Progress,
    *,
    num_batches: int = NUM_BATCHES,
    prompt: str | None = None,
    session: Session[Any] | None = None,
) -> Verified:
    """Runs an export on real inputs, layer by layer and as a whole, beside the student that it was made from.

    Args:
        folder: Of `fraqat export`; files that were edited or cut are refused.
        run: The run.
        progress: Told what happens.
        num_batches: Batches of calibration inputs that are compared.
        prompt: Sample this prompt with the student and with the export too, into `RUN/verify/TARGET`.
        session: Models and data of the run's recipe, if they are loaded already.

    Raises:
        ModelError: The export is damaged or of a newer format.
    """
    target = target_named(export_format(folder))
    run.methods()
    recipe = run.recipe()
    session = session or open_session(recipe, progress)
    check_target(target, recipe, session)
    stand_in = session.stand_in
    if prompt is not None and stand_in is None:
        raise config_error(
            "prompt",
            prompt,
            allowed=f"exports of text-to-image models, not of {recipe.task}",
            fix="leave --prompt out; examples/ generates with the exported files",
        )
    bits = exported_bits(folder)
    student = session.load_student(recipe, run.student_path, with_engine=False, bits=bits).cpu()
    if check_grid(student, target, accept_loss=True):
        fit_(student, target, session)
    opened = target.open(folder, student)
    round_floats_(student, stored_dtype(folder))
    parts = session.export_parts(student)
    layers, whole = _compare_all(
        opened, student, parts if target.exports_all_parts else parts[:1], num_batches, progress
    )
    verified = judge(layers, whole, target.bound, target.name)
    write_json_atomic(
        run.at_width(run.path / _SAMPLES_FOLDER / f"{target.name}.json", bits),
        {"summary": verified.summary.to_json(), "layers": verified.layers.to_json(), "holds": verified.holds},
    )
    if prompt is None or stand_in is None:
        return verified
    with_export = stand_in(student, lambda inputs: opened.run(parts[0], inputs).outputs)
    folder = run.at_width(run.path / _SAMPLES_FOLDER / target.name, bits)
    samples = _sample(session, folder, student, with_export, prompt)
    return dataclasses.replace(verified, samples=samples)


def _compare_all(
    opened: OpenedExport, student: nn.Module, parts: tuple[Part, ...], num_batches: int, progress: Progress
) -> tuple[list[LayerCheck], dict[str, Error]]:
    """Every layer, and every output by `PART.NAME`."""
    checks = _layer_checks(opened, layer_codes(student))
    weights = _weight_errors(opened, student)
    whole: dict[str, Error] = {}
    errors: dict[str, Error] = {}
    steps: dict[str, StepsApart] = {}
    for part in parts:
        progress.say(f"comparing {part.name}")
        kept: list[Outputs] = []
        for inputs in part.batches()[:num_batches]:
            kept.append(opened.run(part, inputs))
            wanted = run_module(part.module, student, [], part, inputs)
            _compare(part.name, kept[-1], wanted, student, whole, errors)
        if isinstance(opened, CountsSteps):
            steps |= opened.steps_apart(part, kept)
    layers = [
        dataclasses.replace(
            check, error=errors.get(check.name), weight_error=weights.get(check.name), steps=steps.get(check.name)
        )
        for check in checks
    ]
    return layers, whole


def _layer_checks(opened: OpenedExport, codes: dict[str, LayerCodes]) -> list[LayerCheck]:
    found = opened.codes()
    return [
        LayerCheck(name, int((found[name].int() != layer.codes.int()).sum()) if name in found else None)
        for name, layer in codes.items()
    ]


@torch.no_grad()
def _weight_errors(opened: OpenedExport, student: nn.Module) -> dict[str, Error]:
    """What scales of the file add to the codes, where the runtime says what its weights are."""
    errors: dict[str, Error] = {}
    if not isinstance(opened, ShowsWeights):
        return errors
    layers = dict(quantized_layers(student))
    for name, weight in opened.weights().items():
        layer = layers[name]
        errors[name] = Error()
        errors[name].add(layer.weight_quantizer(layer.master_weight()), weight.reshape(layer.weight.shape))
    return errors


@torch.no_grad()
def _compare(
    part: str, found: Outputs, wanted: Outputs, student: nn.Module, whole: dict[str, Error], errors: dict[str, Error]
) -> None:
    for name, output in wanted.outputs.items():
        whole.setdefault(f"{part}.{name}", Error()).add(output, found.outputs[name])
    for name, output in found.layers.items():
        alone = student.get_submodule(name)(found.layer_inputs[name])
        errors.setdefault(name, Error()).add(alone, output)


def _sample(
    session: Session[Any], folder: Path, student: nn.Module, with_export: AbstractContextManager[None], prompt: str
) -> tuple[Path, ...]:
    """The prompt by the original, the student and the export, each from the same noise."""
    files = {
        "original": session.generate(session.teacher, (prompt,), seed=0)[0],
        "student": session.generate(student, (prompt,), seed=0)[0],
    }
    with with_export:
        files["export"] = session.generate(student, (prompt,), seed=0)[0]
    paths: list[Path] = []
    for name, content in files.items():
        path = folder / f"{name}{session.sample_suffix}"
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
        paths.append(path)
    return tuple(paths)
