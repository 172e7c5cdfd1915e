"""`fraqat compare`: methods on the same model, data, number of steps and seeds, each at its own best learning rate."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fraqat.baselines import CalibrationLoss, search_step_sizes_, train_peer
from fraqat.config import METHODS, ORIGINAL, Method, Recipe, load_recipe, merged, plain
from fraqat.distill import (
    OUTPUTS_FOLDER,
    Batch,
    DistillResult,
    DistillTask,
    describe_difference,
    hold_teacher_,
    training_task,
    validation_loss,
)
from fraqat.errors import ModelError, NonFiniteLossError, OutputError, choice_error, config_error
from fraqat.files import (
    atomic_file,
    atomic_folder,
    explain_os_errors,
    folder_lock,
    save_tensors,
    write_json_atomic,
    write_text_atomic,
)
from fraqat.nn import merge_adapters_
from fraqat.workflows.calibration import calibrated_student
from fraqat.workflows.comparison import Comparison, MethodResult, RunRecord, comparison_page, run_name
from fraqat.workflows.progress import Progress
from fraqat.workflows.runs import RunFolder
from fraqat.workflows.sessions import QualityColumn, Session, open_session
from fraqat.workflows.training import resolve_schedule, train_student, with_absolute_paths

DEFAULT_METHODS = ("dynamic", "vanilla-qat", "paper", "fraqat")
RESULT = "comparison.json"
PAGE = "comparison.html"
_RECIPE = "compared.yaml"
_RECORD = "record.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class CompareOptions:
    """What is compared.

    Args:
        methods: Names of `fraqat.config.METHODS`, or of baselines in the recipe that have no such name.
        num_seeds: Seeds per method, counted from 1; the recipe's own seed chooses the learning rate.
        rates: Learning rates that every trained method is tried at; empty takes 1/3, 1 and 3 times the recipe's.
        measures_quality: Also sample and judge every student.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    num_seeds: int = 3
    rates: tuple[float, ...] = ()
    measures_quality: bool = False

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise config_error("--methods", list(self.methods), allowed="different names", fix="name each method once")
        if self.num_seeds < 1:
            raise config_error("--seeds", self.num_seeds, allowed="1 or more", fix="use 3 or more for an interval")
        wrong = [rate for rate in self.rates if not (math.isfinite(rate) and rate > 0)]
        if wrong or len(set(self.rates)) < len(self.rates):
            raise config_error(
                "--rates", list(self.rates), allowed="different positive numbers", fix="write --rates 1e-4,3e-4,1e-3"
            )


def compare(
    recipe: Recipe,
    folder: Path,
    options: CompareOptions,
    progress: Progress,
    *,
    session: Session[Any] | None = None,
) -> Comparison:
    """Trains and measures every method; what is finished in the folder is not done again.

    Args:
        recipe: Model, data, grid and length; the methods change quantization, schedule and training settings.
        folder: Gets `METHOD/rate-R/seed-S/` run folders, `comparison.json` and the page `comparison.html`.
        options: Methods, seeds, rates.
        progress: Told what happens.
        session: Models and data of the recipe, if they are loaded already.

    Raises:
        ConfigError: A method or rate that the recipe cannot have.
        OutputError: The folder holds something else, or runs of another recipe; nothing is changed.
        FraqatError: See the errors of training.
    """
    if recipe.train.steps == 0:
        raise config_error("train.steps", 0, allowed="1 or more to compare methods", fix="set train.steps")
    if recipe.preset is not None:
        raise config_error(
            "preset",
            recipe.preset,
            allowed="null to compare methods, since they would all begin from it",
            fix="pass --set preset=null, and --set what all methods should share",
        )
    recipe = with_absolute_paths(recipe)
    methods = [_method_of(recipe, name) for name in options.methods]
    rates = options.rates or _rates_around(recipe.train.learning_rate.peak)
    for method in methods:
        _recipe_of(recipe, method, rates[0], 1)  # what is impossible is said before anything is trained
        _check_recordable(recipe, method)
    _claim_folder(folder, recipe)
    with folder_lock(folder):
        session = session or open_session(recipe, progress)
        for method in methods:
            training_task(session.task, _recipe_of(recipe, method, rates[0], 1).train)
        runner = _Runner(recipe, folder, progress, session, options)
        results = tuple(_compare_one(runner, method, rates, options.num_seeds) for method in methods)
        comparison = Comparison(recipe, results, runner.columns)
        write_json_atomic(folder / RESULT, comparison.to_json())
        write_text_atomic(folder / PAGE, comparison_page(comparison, folder, runner.prompts))
    return comparison


class _Runner:
    """Trains single students of one comparison and remembers them on disk."""

    def __init__(
        self, recipe: Recipe, folder: Path, progress: Progress, session: Session[Any], options: CompareOptions
    ):
        self.recipe, self.folder, self.progress, self.session = recipe, folder, progress, session
        self.columns: tuple[QualityColumn, ...] = ()
        self.prompts: tuple[str, ...] = ()
        self._kept_seeds = range(1, options.num_seeds + 1)
        self._evaluator = session.evaluator(None) if options.measures_quality else None
        values = recipe.to_values()
        self._measured_with = {name: values[name] for name in ("evaluation", "sampler") if name in values}
        for half in (0, 1):
            if not held_out_half(session.task, recipe.train.batch_size, half):
                raise config_error(
                    "data.num_validation", 1, allowed="2 or more to choose rates and to compare", fix="hold out more"
                )
        if self._evaluator is not None:
            self.columns = self._evaluator.columns
            self.prompts = self._evaluator.shown_prompts
            # Before anything is trained: train.teacher.dtype changes the teacher.
            original = self._evaluator.measure(ORIGINAL, session.teacher, progress)
            self._keep_samples(folder / ORIGINAL / "samples", original.samples)

    def choose(self, method: Method, rates: Sequence[float]) -> dict[float, float | None]:
        """Loss of every rate on the half that chooses; None where training diverged or the loss is not a number."""
        seed = self.recipe.train.seed
        return {rate: self.run(method, rate, seed, is_final=False).choice_loss for rate in rates}

    def run(self, method: Method, rate: float | None, seed: int, *, is_final: bool) -> RunRecord:
        """One student; a final one is kept and its quality measured, if that was asked for."""
        recipe = _recipe_of(self.recipe, method, rate, seed)
        run = RunFolder.create(self.folder / method.name / run_name(rate, seed), recipe)
        path = run.path / _RECORD
        record = _read_record(run, path) if path.exists() else None
        needs_quality = is_final and self._evaluator is not None and not self._has_quality(record)
        needs_student = is_final and not method.peer and not run.student_path.exists()
        if record is not None and not needs_student and not (needs_quality and method.peer):
            if not needs_quality:
                return record
            student = self.session.load_student(recipe, run.student_path)
        else:
            if record is not None:  # it chose a rate, and its weights were not kept
                _remove(run.path)
                run = RunFolder.create(run.path, recipe)
            try:
                student, record = self._train(method, recipe, run, rate)
            except NonFiniteLossError as error:
                if is_final:
                    raise
                self.progress.warn(f"{method.name}, rate {rate}: {error}")
                student, record = None, RunRecord(method.name, rate, seed, None, None, 0, 0.0)
            if student is not None and not method.peer and (is_final or seed in self._kept_seeds):
                with atomic_file(run.student_path) as target:
                    save_tensors(student.state_dict(), target)
        if needs_quality and student is not None:
            quality = self._measure(f"{method.name}, seed {seed}", student, run.samples_path)
            record = dataclasses.replace(record, quality=quality, measured_with=self._measured_with)
        write_json_atomic(path, dataclasses.asdict(record))
        for name in (_CHECKPOINTS, OUTPUTS_FOLDER):
            shutil.rmtree(run.path / name, ignore_errors=True)
        self.progress.say(f"{method.name}, rate {rate}, seed {seed}: test loss {record.test_loss}")
        return record

    def _has_quality(self, record: RunRecord | None) -> bool:
        return record is not None and bool(record.quality) and record.measured_with == self._measured_with

    def _train(self, method: Method, recipe: Recipe, run: RunFolder, rate: float | None) -> tuple[nn.Module, RunRecord]:
        student, result = self._trained_by_peer(method, recipe) if method.peer else self._trained(method, recipe, run)
        choice, test = (self._half_loss(student, recipe, half) for half in (0, 1))
        record = RunRecord(method.name, rate, recipe.train.seed, choice, test, result.num_steps, result.train_s)
        return student, record

    def _trained(self, method: Method, recipe: Recipe, run: RunFolder) -> tuple[nn.Module, DistillResult]:
        if not method.searches_scales:
            return train_student(self.session, recipe, run, self.progress)
        session = self.session
        student = calibrated_student(session, recipe, self.progress)
        hold_teacher_(session.teacher, student, recipe.train.teacher.dtype)
        loss = CalibrationLoss(session.task, session.teacher, student, recipe.train)
        start = time.perf_counter()
        search_step_sizes_(student, loss)
        merge_adapters_(student)
        return student.eval(), DistillResult(0, time.perf_counter() - start, 0.0)

    def _trained_by_peer(self, method: Method, recipe: Recipe) -> tuple[nn.Module, DistillResult]:
        session = self.session
        student, _ = session.new_student(recipe)
        num_steps = 0 if recipe.train.steps == 0 else self._num_steps
        found = train_peer(method.peer, session.task, session.teacher, student, num_steps, recipe.train)
        return found.model, DistillResult(found.num_steps, found.train_s, found.validation_loss)

    @property
    def _num_steps(self) -> int:
        schedule = resolve_schedule(self.recipe, self.session.task.steps_per_epoch(self.recipe.train.batch_size))
        assert schedule is not None
        return schedule.total_steps

    def _half_loss(self, student: nn.Module, recipe: Recipe, half: int) -> float | None:
        task = self.session.task
        if recipe.train.teacher.outputs == "recorded":  # the teacher was loaded anew
            hold_teacher_(self.session.teacher, student, recipe.train.teacher.dtype)
        batches = held_out_half(task, recipe.train.batch_size, half)
        loss = validation_loss(task, self.session.teacher, student, recipe.train, batches)
        return loss if math.isfinite(loss) else None

    def _measure(self, label: str, student: nn.Module, samples: Path) -> dict[str, float | None]:
        evaluator = self._evaluator
        assert evaluator is not None
        measured = evaluator.measure(label, student, self.progress)
        self._keep_samples(samples, measured.samples)
        return dict(measured.quality)

    def _keep_samples(self, folder: Path, samples: Sequence[bytes]) -> None:
        assert self._evaluator is not None
        with atomic_folder(folder, replace=True) as temporary:
            for i, content in enumerate(samples):
                (temporary / f"{i:02d}{self._evaluator.sample_suffix}").write_bytes(content)


def held_out_half(task: DistillTask, batch_size: int, half: int) -> list[Batch]:
    """Every second held-out sample, from the first (half 0) or the second (half 1) on; batches without one are left out."""
    found: list[Batch] = []
    num_seen = 0
    for batch in task.validation_batches(batch_size):
        size = len(next(iter(batch.values())))
        first = (half + num_seen) % 2
        num_seen += size
        if first < size:
            found.append({name: value[first::2] if _is_column(value) else value for name, value in batch.items()})
    return found


def _is_column(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim > 0)


def _compare_one(runner: _Runner, method: Method, rates: Sequence[float], num_seeds: int) -> MethodResult:
    if not method.is_trained:
        return MethodResult(method.name, None, {}, (runner.run(method, None, runner.recipe.train.seed, is_final=True),))
    tried = runner.choose(method, rates)
    finite = {rate: loss for rate, loss in tried.items() if loss is not None}
    if not finite:
        raise NonFiniteLossError(f"{method.name} diverged at every rate: {list(rates)}. Fix: pass smaller --rates.")
    best = min(finite, key=lambda rate: finite[rate])
    records = tuple(runner.run(method, best, seed, is_final=True) for seed in range(1, num_seeds + 1))
    return MethodResult(method.name, best, tried, records)


def _read_record(run: RunFolder, path: Path) -> RunRecord:
    try:
        return RunRecord(**run.read_json(path))
    except TypeError as error:
        raise ModelError(f"{path} is no record of this version: {error}. Fix: compare in a new folder.") from None


def _remove(folder: Path) -> None:
    """Aside first: an interruption leaves either the whole run or none."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _method_of(recipe: Recipe, name: str) -> Method:
    """A method by its name, or what a baseline of the recipe changes."""
    if name in METHODS:
        return METHODS[name]
    if name not in recipe.baselines:
        raise choice_error("--methods", name, (*METHODS, *recipe.baselines))
    if name in (_RECIPE, RESULT, PAGE) or name.startswith("."):
        allowed = f"a name that does not begin with a dot, not {_RECIPE}, {RESULT} or {PAGE}, which the folder has"
        raise config_error("--methods", name, allowed=allowed, fix="rename the baseline")
    recipe.baseline(name)  # refuses what must be shared
    return Method(name, "a baseline of the recipe", recipe.baselines[name])


def _recipe_of(recipe: Recipe, method: Method, rate: float | None, seed: int) -> Recipe:
    if method.peer:
        recipe = recipe.model_copy(update={"target": None})  # its grid is its own
    train: dict[str, Any] = {"seed": seed, "tensorboard": False}
    if rate is not None:
        train["learning_rate"] = {"peak": rate}
    return recipe.with_method(method.name, merged(plain(method.changes), {"train": train}))


def _check_recordable(recipe: Recipe, method: Method) -> None:
    if recipe.train.teacher.outputs == "recorded" and method.peer and method.is_trained:
        raise config_error(
            "train.teacher.outputs",
            "recorded",
            allowed=f"computed for method {method.name}, which is trained by other code that asks the teacher at every step",
            fix=f"set train.teacher.outputs: computed, or leave {method.name} out",
        )


def _claim_folder(folder: Path, recipe: Recipe) -> None:
    """Makes the folder one for comparisons on `recipe`, or finds that it is."""
    path = folder / _RECIPE
    if path.is_file():
        old, new = load_recipe(str(path)).fingerprint(), recipe.fingerprint()
        if old != new and all(item == path or item.name.startswith(".") for item in folder.iterdir()):
            with folder_lock(folder):  # it ended before anything was trained, as by a wrong path
                write_text_atomic(path, recipe.to_yaml())
        elif old != new:
            raise OutputError(
                f"{folder} holds a comparison on another recipe ({describe_difference(old, new)}): nothing was changed. "
                "Fix: choose a new folder."
            )
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is no comparison: nothing was changed. Fix: choose a new folder.")
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, recipe.to_yaml())


def _rates_around(peak: float) -> tuple[float, ...]:
    return tuple(float(f"{rate:.3g}") for rate in (peak / 3, peak, peak * 3))
