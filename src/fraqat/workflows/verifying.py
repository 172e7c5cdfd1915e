"""`fraqat verify`: an export in its target's own runtime against the student of its run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.export import (
    LayerCodes,
    OpenedExport,
    Outputs,
    Part,
    ShowsWeights,
    layer_codes,
    run_module,
    target_named,
)
from fraqat.files import atomic_file, write_json_atomic
from fraqat.nn import quantized_layers
from fraqat.table import Table
from fraqat.workflows.exporting import check_grid, check_target, export_format, fit_
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import Session, open_session

NUM_BATCHES = 2
WEIGHT_SQNR_DB = 100.0
_SAMPLES_FOLDER = "verify"


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
        self.largest = max(self.largest, float(difference.max()))

    @property
    def sqnr_db(self) -> float:
        """Signal over error in dB; infinite where nothing differs, minus infinity where nothing is right."""
        if math.isnan(self.error):
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
    samples: tuple[Path, ...]


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
    session = session or open_session(recipe)
    check_target(target, recipe, session)
    student = session.load_student(recipe, run.student_path, with_engine=False)
    if check_grid(student, target, accept_loss=True):
        fit_(student, target, session)
    opened = target.open(folder, student)
    parts = session.export_parts(student)
    codes = layer_codes(student)
    checks = _layer_checks(opened, codes)
    weights = _weight_errors(opened, student)
    whole: dict[str, Error] = {}
    errors: dict[str, Error] = {}
    for part in parts if target.exports_all_parts else parts[:1]:
        progress.say(f"comparing {part.name}")
        for inputs in part.batches()[:num_batches]:
            found = opened.run(part, inputs)
            wanted = run_module(part.module, student, [], part, inputs)
            _compare(part.name, found, wanted, student, whole, errors)
    layers = [
        dataclasses.replace(check, error=errors.get(check.name), weight_error=weights.get(check.name))
        for check in checks
    ]
    samples = () if prompt is None else _sample(session, run, target.name, opened, parts[0], student, prompt)
    verified = _judge(layers, whole, target.bound, target.name, samples)
    write_json_atomic(
        run.path / _SAMPLES_FOLDER / f"{target.name}.json",
        {"summary": verified.summary.to_json(), "layers": verified.layers.to_json(), "holds": verified.holds},
    )
    return verified


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


def _judge(
    layers: list[LayerCheck], whole: dict[str, Error], bound: Any, target: str, samples: tuple[Path, ...]
) -> Verified:
    def breaks(check: LayerCheck) -> bool:
        is_other = check.num_differing_codes != 0
        if check.weight_error is not None and check.weight_error.sqnr_db < WEIGHT_SQNR_DB:
            return True
        return is_other or (check.error is not None and check.error.sqnr_db < bound.layer_sqnr_db)

    broken = [check.name for check in layers if breaks(check)]
    rows: list[tuple[Any, ...]] = [
        (c.name, c.num_differing_codes, _rounded(c.error), _finite(c.error.largest) if c.error else None)
        for c in layers
    ]
    table = Table(
        f"Layers of {target}, each with the input that it got there",
        ("layer", "codes that differ", "SQNR, dB", "largest error"),
        tuple(rows),
    )
    shown = [check.error for check in layers if check.error is not None]
    lowest = min((error.sqnr_db for error in shown), default=None)
    differing = sum(check.num_differing_codes or 0 for check in layers)
    absent = sum(check.num_differing_codes is None for check in layers)
    least_weight = min((c.weight_error.sqnr_db for c in layers if c.weight_error is not None), default=None)
    summary: list[tuple[Any, ...]] = [
        ("layers whose codes are in the file", len(layers) - absent, len(layers)),
        ("codes that differ", differing, 0),
        (
            "least SQNR of a weight, scales included, dB",
            _number(least_weight),
            WEIGHT_SQNR_DB if least_weight else None,
        ),
        ("layers whose output was compared", len(shown), None),
        ("least SQNR of a layer, dB", _number(lowest), _number(bound.layer_sqnr_db) if shown else None),
    ]
    for name, error in whole.items():
        summary.append((f"SQNR of {name}, dB", _number(error.sqnr_db), _number(bound.sqnr_db)))
        summary.append((f"largest error of {name}", _finite(error.largest), None))
    holds = not broken and all(error.sqnr_db >= bound.sqnr_db for error in whole.values())
    first = broken[0] if broken else ""
    notes = (f"Bounds: {bound.reason}.", f"First layer that breaks its bound: {first or 'none'}.")
    title = f"{target} against the trained student: {'holds' if holds else 'DOES NOT HOLD'}"
    return Verified(Table(title, ("check", "found", "bound"), tuple(summary), notes), table, holds, first, samples)


def _rounded(error: Error | None) -> Any:
    return None if error is None else _number(error.sqnr_db)


def _number(value: float | None) -> Any:
    """Infinity as text, which JSON has no number for."""
    if value is None:
        return None
    return round(value, 1) if math.isfinite(value) else ("exact" if value > 0 else "no signal")


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else "not finite"


def _sample(
    session: Session[Any],
    run: RunFolder,
    target: str,
    opened: OpenedExport,
    part: Part,
    student: nn.Module,
    prompt: str,
) -> tuple[Path, ...]:
    """The prompt by the original, the student and the export, each from the same noise."""
    folder = run.path / _SAMPLES_FOLDER / target
    files = {
        "original": session.generate(session.teacher, (prompt,), seed=0)[0],
        "student": session.generate(student, (prompt,), seed=0)[0],
    }
    with session.computed_by(student, lambda inputs: opened.run(part, inputs).outputs):
        files["export"] = session.generate(student, (prompt,), seed=0)[0]
    paths: list[Path] = []
    for name, content in files.items():
        path = folder / f"{name}{session.sample_suffix}"
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
        paths.append(path)
    return tuple(paths)
