"""What a recipe needs in memory, whatever the model family: teacher, students, data; loaded once and shared by all methods."""

from __future__ import annotations

import dataclasses
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fraqat.config import LayerWidthsSpec, Recipe
from fraqat.distill import DistillTask
from fraqat.errors import ModelError, config_error
from fraqat.evaluation import Interval
from fraqat.export import (
    Inputs,
    LayerPlace,
    ModelDescription,
    Part,
    check_model,
    fitted,
    load_packed_,
    read_packed,
    target_named,
)
from fraqat.kernels import EngineName
from fraqat.nn import (
    EngineSpec,
    IntegerLayers,
    LayerFamilies,
    LayerRule,
    QuantReport,
    QuantSpec,
    add_adapters_,
    add_branches_,
    describe,
    quantize_,
    quantized_layers,
    rotate_value_paths_,
    serve_widths_,
    settle_at_,
    without_search,
)
from fraqat.planning import Workload
from fraqat.tasks import ModelSpec
from fraqat.tasks.known import KnownModel, describe_model
from fraqat.tasks.value_paths import find_value_paths
from fraqat.workflows.progress import Progress
from fraqat.zoo import zoo_path

ZOO_PREFIX = "zoo:"
RecipeT = TypeVar("RecipeT", bound=Recipe)


def resolve_source(spec: ModelSpec) -> ModelSpec:
    """Turns `zoo:NAME` into the folder of a model that comes with the package."""
    if not spec.source.startswith(ZOO_PREFIX):
        return spec
    return dataclasses.replace(spec, source=str(zoo_path(spec.source.removeprefix(ZOO_PREFIX))))


@dataclasses.dataclass(frozen=True)
class QualityColumn:
    """One column of the quality table.

    Args:
        key: Of the measured values.
        title: As people read it: `name, unit`.
        factor: The value is shown times this.
        decimals: Digits after the point, None for four significant ones.
    """

    key: str
    title: str
    factor: float = 1.0
    decimals: int | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the evaluation of one model gave.

    Args:
        quality: Values by column key; None where a value says nothing, as the original's distance to itself.
        samples: A few of what it made, as files (PNG, UTF-8 text or WAV), one for each shown prompt.
        intervals: 95 % bootstrap intervals by column key, in the unit of the value; keys without one are left out.
    """

    quality: Mapping[str, float | None]
    samples: tuple[bytes, ...]
    intervals: Mapping[str, Interval] = dataclasses.field(default_factory=dict[str, Interval])


StandIn = Callable[[nn.Module, Callable[[Inputs], Mapping[str, Tensor]]], AbstractContextManager[None]]
"""The student, and what takes the inputs of the first of `Session.export_parts` and gives its outputs."""


class Evaluator(Protocol):
    """Measures models against the original, which is measured first.

    Attributes:
        columns: Of the quality table.
        notes: What they mean.
        sample_suffix: `.png`, `.txt` or `.wav`.
        shown_prompts: The prompts of `Measurement.samples`.
    """

    columns: tuple[QualityColumn, ...]
    notes: tuple[str, ...]
    sample_suffix: str
    shown_prompts: tuple[str, ...]

    def measure(self, label: str, model: nn.Module, progress: Progress) -> Measurement:
        """Runs a model on held-out data."""
        ...


class Session(ABC, Generic[RecipeT]):
    """The models and data of one recipe; every part is loaded when it is first asked for.

    Args:
        recipe: Decides model and data. Methods that share these (`Recipe.baseline`) share the session.
        progress: Told while data are encoded.
    """

    sample_suffix: str
    """Of what `generate` makes from one prompt: `.png`, `.txt` or `.wav`."""

    def __init__(self, recipe: RecipeT, progress: Progress):
        self.recipe, self.progress = recipe, progress

    @property
    def model_spec(self) -> ModelSpec:
        """The model with its folder or hub id."""
        return resolve_source(self.recipe.model)

    @abstractmethod
    def load_model(self, dtype: torch.dtype) -> nn.Module:
        """The part of the pre-trained model that is quantized."""

    @abstractmethod
    def build_float(self, class_name: str, config: dict[str, Any]) -> nn.Module:
        """The same untrained, from the description of an export."""

    @cached_property
    def known(self) -> KnownModel:
        """Class and configuration of the part that is quantized, without its weights."""
        spec = self.model_spec
        return describe_model(spec.source, spec.revision)

    @property
    @abstractmethod
    def families(self) -> LayerFamilies:
        """Layer families of the model."""

    @property
    @abstractmethod
    def family_rules(self) -> tuple[LayerRule, ...]:
        """Exceptions that the model's family asks for."""

    @cached_property
    @abstractmethod
    def task(self) -> DistillTask:
        """Data and the outputs that are distilled."""

    def check(self, recipe: Recipe) -> None:
        """Refuses what cannot be trained, as far as the model's configuration shows it; no weights or data are read.

        Args:
            recipe: The session's own, or one that shares model and data with it.

        Raises:
            ConfigError: A setting that this model cannot have.
        """

    @abstractmethod
    def workload(self, recipe: Recipe) -> Workload:
        """One training step without weights or data, for a plan."""

    @abstractmethod
    def evaluator(self, num_samples: int | None) -> Evaluator:
        """Measures quality on so many held-out samples (None: as the recipe says)."""

    @abstractmethod
    def generate(
        self,
        model: nn.Module,
        prompts: tuple[str, ...],
        *,
        seed: int,
        on_done: Callable[[int], None] = lambda num_done: None,
    ) -> list[bytes]:
        """One file for each prompt, with the suffix `sample_suffix`."""

    @abstractmethod
    def description(self) -> ModelDescription:
        """How to build the model again, for exports."""

    @abstractmethod
    def export_parts(self, student: nn.Module) -> tuple[Part, ...]:
        """What is exported as graphs; the first one holds the student's quantized layers."""

    @property
    def stand_in(self) -> StandIn | None:
        """Lets another runtime compute the student in `generate`; None where `generate` calls more than the first part."""
        return None

    @abstractmethod
    def original_files(self) -> list[Path]:
        """Weight files of the original, empty where they lie on the hub."""

    @cached_property
    def teacher(self) -> nn.Module:
        """The frozen model in the teacher's own precision."""
        return self.load_model(self.recipe.model.dtype).eval().requires_grad_(False)

    def forget_teacher(self) -> None:
        """Lets a teacher that training has changed leave memory, with everything that was made of it."""
        for name in ("teacher", "task"):
            if name in self.__dict__:
                delattr(self, name)
        release_memory()

    def new_student(self, recipe: Recipe, *, is_trained: bool = False) -> tuple[nn.Module, QuantReport]:
        """A model quantized at its final width as `recipe` says, and the report.

        float32, but in low-rank training, where the frozen weights have the teacher's precision and can be held once.
        `is_trained`: see `quantize`.
        """
        dtype = torch.float32 if recipe.train.low_rank is None else self.recipe.model.dtype
        student = self.load_model(dtype).requires_grad_(True)
        _rotate_(student, recipe)
        report = self.quantize(student, recipe, is_trained=is_trained)
        self._add_adapters_(student, recipe)
        return student, report

    def planned_student(self, recipe: Recipe) -> nn.Module:
        """The student of `new_student` without its weights."""
        student = self.known.build()
        if recipe.train.low_rank is not None:
            student.to(recipe.model.dtype)
        _rotate_(student, recipe)
        self.quantize(student, recipe)
        self._add_adapters_(student, recipe)
        return student

    def _add_adapters_(self, student: nn.Module, recipe: Recipe) -> None:
        if recipe.train.low_rank is not None:
            with torch.random.fork_rng():
                torch.manual_seed(recipe.train.seed)
                add_adapters_(student, recipe.train.low_rank)

    def layers(self, recipe: Recipe) -> QuantReport:
        """The report of `new_student`, from the configuration alone."""
        model = self.known.build()
        _rotate_(model, recipe)
        return self.quantize(model, recipe)

    def reference(self, recipe: Recipe) -> nn.Module:
        """The teacher with the layers that a student of `recipe` begins from: rotated where the recipe says so."""
        if recipe.quantization.rotation is None:
            return self.teacher
        model = self.load_model(self.recipe.model.dtype).eval().requires_grad_(False)
        _rotate_(model, recipe)
        return model

    def quantize(self, student: nn.Module, recipe: Recipe, *, is_trained: bool = False) -> QuantReport:
        """Quantizes a model of the session as a recipe says.

        Args:
            student: Changed in place.
            recipe: Says how.
            is_trained: Makes the layers that training leaves, for a state that is loaded next: branches whose rank decays are
                gone, and no scale or clipping is searched.
        """
        with without_search() if is_trained else nullcontext():
            return self._quantize(student, recipe, is_trained=is_trained)

    def _quantize(self, student: nn.Module, recipe: Recipe, *, is_trained: bool) -> QuantReport:
        quantization = recipe.quantization
        exceptions = (*(self.family_rules if quantization.family_rules else ()), *quantization.rules)
        rules = (*exceptions, *quantization.width_rules)
        target = None if recipe.target is None else target_named(recipe.target)
        if target is not None:
            check_model(target, recipe.task, self.known.class_name)

        def fit(name: str, type_name: str, shape: tuple[int, ...], spec: QuantSpec) -> QuantSpec | None:
            return spec if target is None else fitted(target, LayerPlace(name, type_name, shape), spec)

        quantize_(student, quantization.spec, rules=rules, families=self.families, train=quantization.train, fit=fit)
        if quantization.layer_widths is not None:
            check_covered(student, quantization.layer_widths)
        if recipe.schedule.widths:
            serve_widths_(student, recipe.schedule.widths)
        branch = quantization.branch
        has_left = is_trained and branch is not None and branch.rank_schedule.decays
        add_branches_(student, None if has_left else branch, quantization.smoothing)
        return describe(student, self.families)

    def load_student(
        self, recipe: Recipe, path: Path, *, with_engine: bool = True, bits: float | None = None
    ) -> nn.Module:
        """The student that a run left.

        Args:
            recipe: Of the run.
            path: `student.safetensors`.
            bits: Which of the widths that it serves (`schedule.kind: several`); None is the final one.
            with_engine: False leaves the layers on the floating-point path, for exports.

        Raises:
            ModelError: The file is missing or damaged, or does not fit the recipe.
            ConfigError: A width that the run was not trained for.
        """
        check_served(recipe, bits)
        student = self.load_model(torch.float32)
        self.quantize(student, recipe, is_trained=True)
        try:
            student.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be loaded: {error}. Fix: train again in a new folder.") from error
        student.eval()
        if bits is not None:
            settle_at_(student, bits)
        return self._with_integers(student) if with_engine else student

    def load_packed(self, folder: Path) -> nn.Module:
        """The student of a packed export, from codes.

        Raises:
            ModelError: The export is missing or damaged.
        """
        packed = read_packed(folder)
        model = load_packed_(self.build_float(packed.description.class_name, packed.description.config), packed)
        return self._with_integers(model.to(self.recipe.model.torch_device).eval())

    def _with_integers(self, model: nn.Module) -> nn.Module:
        """Students run in inference as they are trained, so that a packed one computes the same bits."""
        name = self.recipe.train.engine.name
        if name != EngineName.REFERENCE:
            IntegerLayers(model, EngineSpec(name), counts_preparation=False)
        return model


def _rotate_(model: nn.Module, recipe: Recipe) -> None:
    rotation = recipe.quantization.rotation
    if rotation is not None:
        rotate_value_paths_(model, find_value_paths(model).paths, rotation)


def check_served(recipe: Recipe, bits: float | None) -> None:
    """Refuses a width that the student of a recipe was not trained for.

    Raises:
        ConfigError: It is none of `schedule.widths`.
    """
    served = recipe.schedule.widths or (recipe.quantization.final_bits,)
    if bits is not None and bits not in served:
        raise config_error(
            "bits",
            bits,
            allowed=f"{', '.join(f'{b:g}' for b in served)}, for which {recipe.label} was trained",
            fix="choose one of these, or train with schedule.kind: several and schedule.widths",
        )


def check_covered(student: nn.Module, spec: LayerWidthsSpec) -> None:
    """Refuses widths that were chosen for other layers than a student's.

    Raises:
        ConfigError: A quantized layer has none.
    """
    missing = [name for name, _ in quantized_layers(student) if name not in spec.bits]
    if missing:
        raise config_error(
            "quantization.layer_widths.table",
            spec.table,
            allowed=f"a table of all {len(list(quantized_layers(student)))} quantized layers; {missing[0]} is not in it",
            fix="measure again with this recipe's rules",
        )


def release_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def description_of(spec: ModelSpec, class_name: str, config: dict[str, Any]) -> ModelDescription:
    """The description of a model for exports, which name the model as the recipe does."""
    return ModelDescription(class_name, config, spec.source, spec.revision, spec.variant)
