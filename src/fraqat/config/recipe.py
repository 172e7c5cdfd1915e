"""What the recipes of all model families share: quantization, schedule, training, and baselines on the same terms."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import escape
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fraqat.config.branches import check_branch
from fraqat.config.layer_widths import LayerWidthsSpec, with_chosen_widths
from fraqat.config.methods import METHODS, method_named
from fraqat.config.problems import explain_problems
from fraqat.distill import TrainSpec, check_recordable
from fraqat.errors import ConfigError, config_error
from fraqat.export import LayerPlace, check_model, first_difference, target_named
from fraqat.nn import (
    ALL,
    STRICT_KEYS,
    ActivationSpec,
    BranchSpec,
    LayerRule,
    QuantSpec,
    RotationSpec,
    SmoothingSpec,
    WeightSpec,
)
from fraqat.numerics import RangeMethod
from fraqat.printable import printable
from fraqat.schedules import ScheduleKind, ScheduleSpec, StageUnit
from fraqat.tasks import ModelSpec

ORIGINAL = "original"
"""The full-precision model's name in tables."""

_BASELINE_SECTIONS = ("quantization", "schedule", "train")
_SHARED_TRAIN_FIELDS = ("batch_size", "seed", "epochs", "losses", "teacher")
_LONGEST_NAME = 100  # of folders; file systems take 255 bytes
_ANY_LAYER = LayerPlace("any", "Linear", (32, 1024))
# What does not change the trained weights is left out of the fingerprint that a checkpoint must share.
_FREE_TRAIN_FIELDS = (
    "validate_every",
    "checkpoint_every",
    "num_checkpoints_kept",
    "keep_best",
    "async_checkpoints",
    "tensorboard",
    "log_code_flips",
    "parallel",
    "on_non_finite",
    "on_out_of_memory",
    "profile",
    "wandb",
)
_FREE_TEACHER_FIELDS = ("outputs", "outputs_limit_gib")


@dataclass(frozen=True)
class QuantizationSpec:
    """What the student becomes: the arguments of `quantize_`.

    Args:
        weight, activation: Of every layer that no rule changes; `activation: null` leaves inputs in floating point.
        rules: Exceptions in order, after the model family's own.
        family_rules: Begin with the exceptions of the model's family, such as a last layer with 16-bit inputs.
        train: Family that is trained alone: FF, Attn, TF; All trains everything.
        branch: A low-rank branch in 16 bits beside every quantized layer (SVDQuant, DiTAS, SVDQAT); null: none.
        smoothing: Divide the input of every quantized layer by a factor per channel, chosen from calibration data; null: no.
        rotation: Turn what every attention passes on by an orthogonal matrix, merged into the weights around it; null: no.
        layer_widths: A width for every layer at a given average size, instead of `weight.bits`; null: one width for all.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    weight: WeightSpec = field(default_factory=WeightSpec)
    activation: ActivationSpec | None = field(default_factory=ActivationSpec)
    rules: tuple[LayerRule, ...] = ()
    family_rules: bool = True
    train: str = ALL
    branch: BranchSpec | None = None
    smoothing: SmoothingSpec | None = None
    rotation: RotationSpec | None = None
    layer_widths: LayerWidthsSpec | None = None

    @property
    def final_bits(self) -> float:
        """Where the schedule ends: the lowest width of the finished model."""
        bits = self.layer_widths.bits if self.layer_widths is not None else {}
        return min(bits.values(), default=self.weight.bits)

    @property
    def width_rules(self) -> tuple[LayerRule, ...]:
        """One rule for every layer whose width was chosen; they apply after all others."""
        bits = self.layer_widths.bits if self.layer_widths is not None else {}
        return tuple(LayerRule(pattern=escape(name), weight_bits=width) for name, width in bits.items())

    @property
    def spec(self) -> QuantSpec:
        """Weight and activation together."""
        return QuantSpec(self.weight, self.activation)


class Recipe(BaseModel, ABC):
    """Everything that decides a run; each model family adds its data and evaluation. Unknown keys are refused.

    `preset` names a method of `fraqat.config.METHODS`: what it changes is the default of quantization, schedule and training.
    `target` names what the result is for (`fraqat targets`): it sets the grid, kind of scale and activations that the
    recipe does not set itself, and refuses what the target does not compute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    LOSSES: ClassVar[tuple[str, ...]] = ()
    """Loss terms of the family."""

    name: str
    task: Any
    preset: str | None = None
    target: str | None = None
    model: ModelSpec
    data: Any
    quantization: QuantizationSpec = Field(default_factory=QuantizationSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    train: TrainSpec = Field(default_factory=TrainSpec)
    baselines: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    @abstractmethod
    def num_train(self) -> int | None:
        """Training samples of one epoch; None where only the data knows."""

    @property
    def num_validation(self) -> int:
        """Held-out samples, at most."""
        return self.data.num_validation

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        """What a target computes, then what a preset says, is the default of everything that the recipe does not set."""
        if not isinstance(values, dict):
            return values
        if isinstance(values.get("target"), str):
            values = _with_target(values)
        if isinstance(values.get("preset"), str):
            values = _with_preset(values)
        return with_chosen_widths(values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label in ("", ".", "..", ORIGINAL) or "\\" in self.name:
            raise config_error(
                "name", self.name, allowed=f"a name whose last part is not empty, . or {ORIGINAL}", fix="rename it"
            )
        if printable(self.name, "") != self.name or len(self.name) > _LONGEST_NAME:
            raise config_error(
                "name", self.name, allowed=f"up to {_LONGEST_NAME} characters that can be seen", fix="rename it"
            )
        target = self.quantization.final_bits
        stages = self.schedule.lengths(target)
        kind = self.schedule.kind
        if len(stages) == 1 and kind not in (ScheduleKind.CONSTANT, ScheduleKind.CUSTOM, ScheduleKind.SEVERAL):
            raise config_error(
                "schedule.kind",
                kind.value,
                allowed=f"constant or custom for a target of {target:g} bits, which no named ramp lies above",
                fix="set kind: constant",
            )
        if self.train.steps and self.schedule.unit is not StageUnit.EPOCHS:
            self.schedule.resolve(target, self.train.steps)
        _check_rules(self.quantization)
        check_branch(self.quantization.branch, self.quantization.smoothing, kind, self.target, self.train)
        _check_training(self)
        _check_target(self)
        self._check_family()
        for name in self.baselines:  # last: they share most settings, and would be blamed for them
            self.baseline(name)
        return self

    def _check_family(self) -> None:
        """Refuses what the model family does not have."""

    @property
    def _draws_noise_levels(self) -> bool:
        """Whether training draws noise levels, which can follow the student's error."""
        return False

    @property
    def label(self) -> str:
        """What the method is called in tables: a baseline's own name, `fraqat`, or what the schedule and steps say."""
        if "/" in self.name:
            return self.name.rsplit("/", 1)[-1]
        if self.preset is not None:
            return self.preset
        if self.train.steps == 0:
            return "post-training"
        kind = self.schedule.kind.value
        named = {"fractional": "fraqat", "constant": "constant-width", "several": "several-widths"}
        return named.get(kind, f"{kind}-schedule")

    def baseline(self, name: str) -> Self:
        """The recipe of a baseline: this one with the baseline's own quantization, schedule and training settings.

        Model, data, sampler, loss, seed, batch size and number of steps are shared, so that the comparison is fair; a
        baseline may only train for 0 steps instead (post-training quantization). A schedule that names its kind replaces the
        whole section.

        Raises:
            ConfigError: An unknown baseline, or one that changes what must be shared.
        """
        if name not in self.baselines:
            known = ", ".join(self.baselines) or "none"
            raise config_error("baseline", name, allowed=known, fix="add it to the recipe's baselines")
        if name in ("", ".", "..", ORIGINAL, self.label) or "/" in name or "\\" in name:
            raise config_error(
                "baselines", name, allowed=f"a name without slashes, not {ORIGINAL} or {self.label}", fix="rename it"
            )
        if printable(name, "") != name or len(name) > _LONGEST_NAME:
            raise config_error(
                "baselines",
                name,
                allowed=f"names of up to {_LONGEST_NAME} characters that can be seen",
                fix="rename it",
            )
        changes = self.baselines[name]
        foreign = sorted(set(changes) - set(_BASELINE_SECTIONS))
        if foreign:
            raise config_error(
                f"baselines.{name}",
                foreign,
                allowed=f"the sections {', '.join(_BASELINE_SECTIONS)}",
                fix="remove the others",
            )
        changed = self.with_method(name, changes, where=f"baselines.{name}")
        self._check_shared(name, changed)
        return changed

    def with_method(self, name: str, changes: Mapping[str, Any], *, where: str | None = None) -> Self:
        """This recipe with another way to quantize or train; model, data and evaluation are the same.

        Args:
            name: Becomes the last part of the recipe's name.
            changes: Of the sections quantization, schedule and train. A schedule that names its kind replaces the whole
                section, and 0 steps make the schedule constant.
            where: What an error is about; None is the method's name.

        Raises:
            ConfigError: The changed recipe is impossible.
        """
        try:
            return type(self).model_validate(self._changed_values(name, changes))
        except ValidationError as error:
            raise ConfigError(f"{where or f'method {name}'}: {explain_problems(error, type(self))}") from None

    def _changed_values(self, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = self.model_dump(mode="json", exclude={"baselines", "preset"})
        values["name"] = f"{self.name}/{name}"
        if "kind" in _section(changes, "schedule"):
            values["schedule"] = {}
        if _section(changes, "train").get("steps") == 0:
            values["train"]["epochs"] = None
            values["schedule"] = {"kind": "constant"}
        return merged(values, plain(changes))

    def _check_shared(self, name: str, changed: Recipe) -> None:
        is_untrained = changed.train.steps == 0
        for field_name in _SHARED_TRAIN_FIELDS:
            mine, theirs = getattr(self.train, field_name), getattr(changed.train, field_name)
            if mine != theirs and not (is_untrained and field_name == "epochs"):
                raise config_error(f"baselines.{name}.train.{field_name}", theirs, allowed=repr(mine), fix="remove it")
        if not is_untrained and changed.train.steps != self.train.steps:
            raise config_error(
                f"baselines.{name}.train.steps",
                changed.train.steps,
                allowed=f"0 or {self.train.steps}",
                fix="remove it",
            )

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values of every field, defaults included."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.to_values(), sort_keys=False, allow_unicode=True, width=110)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the trained weights."""
        values = self.model_dump(mode="json", exclude={"name", "preset", "evaluation", "baselines"})
        for name in _FREE_TRAIN_FIELDS:
            del values["train"][name]
        for name in _FREE_TEACHER_FIELDS:
            del values["train"]["teacher"][name]
        del values["model"]["device"]
        if values["train"]["timestep_importance"] == "auto":  # as the training has it; `outputs` is left out above
            is_off = not self._draws_noise_levels or self.train.teacher.outputs == "recorded"
            values["train"]["timestep_importance"] = None if is_off else "auto"
        if values["train"]["guidance_scale"] is None:  # as in checkpoints of before there was one
            del values["train"]["guidance_scale"]
        return values


def _section(changes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of changes that are not checked yet; empty where it is none."""
    found = changes.get(name)
    return found if isinstance(found, Mapping) else {}


def _with_target(values: dict[str, Any]) -> dict[str, Any]:
    given = values.get("quantization") or {}
    if not isinstance(given, dict):
        return values
    defaults = plain(target_named(values["target"]).defaults)
    if "activation" in given and given["activation"] is None:
        defaults.pop("activation", None)
    _drop_what_depends_(defaults, given)
    return {**values, "quantization": merged(defaults, given)}


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    method = method_named(values["preset"], field="preset")
    if not method.is_recipe:
        raise config_error(
            "preset",
            method.name,
            allowed=", ".join(name for name, one in METHODS.items() if one.is_recipe),
            fix="compare it with `fraqat compare`, where it runs through other code",
        )
    filled = dict(values)
    for section, defaults in plain(method.changes).items():
        given = values.get(section) or {}
        if not isinstance(given, dict):
            continue
        is_replaced = section == "schedule" and "kind" in given
        filled[section] = given if is_replaced else merged(defaults, given)
    return filled


def _check_rules(quantization: QuantizationSpec) -> None:
    """The schedule ends at `weight.bits`: a layer that ends below it would never be trained at its own width."""
    lowest = quantization.weight.bits
    for i, rule in enumerate(quantization.rules):
        bits = [rule.weight_bits, rule.spec.weight.bits if rule.spec else None]
        below = [b for b in bits if b is not None and b < lowest]
        if below:
            raise config_error(
                f"quantization.rules.{i}.weight_bits",
                below[0],
                allowed=f"quantization.weight.bits = {lowest:g}, where the schedule ends, or more",
                fix="set quantization.weight.bits to the lowest width and raise the other layers by rules",
            )


def _check_target(recipe: Recipe) -> None:
    """The grid that every layer has unless a rule changes it must be one that the target computes."""
    if recipe.target is None:
        return
    target, spec = target_named(recipe.target), recipe.quantization.spec
    check_model(target, recipe.task)
    difference = first_difference(spec, target.nearest(_ANY_LAYER, spec))
    if difference is not None:
        name, found, wanted = difference
        raise config_error(
            f"quantization.{name}",
            found,
            allowed=f"{wanted} for target {target.name}",
            fix="leave the field out, and the target sets it",
        )


def _check_training(recipe: Recipe) -> None:
    if recipe.num_train is not None and recipe.train.batch_size > recipe.num_train:
        raise config_error(
            "train.batch_size",
            recipe.train.batch_size,
            allowed=f"at most data.num_train = {recipe.num_train}",
            fix="use a smaller batch or more data",
        )
    if recipe.train.log_code_flips and recipe.schedule.kind is ScheduleKind.SEVERAL:
        raise config_error(
            "train.log_code_flips",
            True,
            allowed="false with schedule.kind: several, whose width changes at every step",
            fix="leave log_code_flips out",
        )
    if recipe.train.teacher.outputs == "recorded":
        check_recordable(
            is_automatic=recipe.schedule.kind is ScheduleKind.AUTOMATIC,
            draws_by_error=recipe.train.draws_by_error,
        )
    if recipe.train.ema_decay is not None and recipe.quantization.weight.range_method is RangeMethod.LEARNED:
        raise config_error(
            "train.ema_decay",
            recipe.train.ema_decay,
            allowed="null with learned scales (quantization.weight.range_method: learned)",
            fix="use range_method: mse, or leave ema_decay out",
        )
    foreign = [term.name for term in recipe.train.losses if term.name not in recipe.LOSSES]
    if foreign:
        raise config_error(
            "train.losses", foreign, allowed=f"{', '.join(recipe.LOSSES)} for {recipe.task}", fix="choose one of these"
        )


def _drop_what_depends_(defaults: dict[str, Any], given: dict[str, Any]) -> None:
    """Leaves out defaults of a target that belong to a choice which the recipe makes otherwise.

    The refusal then names what the recipe says, not what it never said.
    """
    dependent = {
        ("activation", "symmetric", True): ("zero_point",),
        ("activation", "static", True): ("zero_point",),
        ("activation", "static", False): ("range_method",),
        ("weight", "granularity", "tensor"): ("group_size", "group_scale"),
        ("weight", "granularity", "channel"): ("group_size", "group_scale"),
    }
    for (section, field_name, value), names in dependent.items():
        chosen = given.get(section)
        if isinstance(chosen, dict) and chosen.get(field_name) == value:
            for name in names:
                defaults.get(section, {}).pop(name, None)


def plain(values: Any) -> Any:
    """Mappings as dictionaries that can be changed."""
    return {key: plain(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result
