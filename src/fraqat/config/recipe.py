"""The recipe: one frozen, validated description of a run, made of each part's own section."""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fraqat.data.captioned import IMAGE_SIZES, DataSpec
from fraqat.distill import TrainSpec
from fraqat.errors import ConfigError, config_error
from fraqat.evaluation import EvaluationSpec
from fraqat.nn import ALL, STRICT_KEYS, ActivationSpec, LayerRule, QuantSpec, WeightSpec
from fraqat.schedules import ScheduleKind, ScheduleSpec, StageUnit
from fraqat.tasks import ModelSpec, SamplerSpec

ORIGINAL = "original"
"""The full-precision model's name in tables."""

_BASELINE_SECTIONS = ("quantization", "schedule", "train")
_SHARED_TRAIN_FIELDS = ("batch_size", "seed", "epochs", "losses")
# What does not change the trained weights is left out of the fingerprint that a checkpoint must share.
_TRAINED_SAMPLER_FIELDS = ("timesteps", "max_sequence_length")
_FREE_TRAIN_FIELDS = ("validate_every", "checkpoint_every", "num_checkpoints_kept", "tensorboard")


@dataclass(frozen=True)
class QuantizationSpec:
    """What the student becomes: the arguments of `quantize_`.

    Args:
        weight, activation: Of every layer that no rule changes; `activation: null` leaves inputs in floating point.
        rules: Exceptions in order.
        train: Family that is trained alone: FF, Attn, TF; All trains everything.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    weight: WeightSpec = field(default_factory=WeightSpec)
    activation: ActivationSpec | None = field(default_factory=ActivationSpec)
    rules: tuple[LayerRule, ...] = ()
    train: str = ALL

    @property
    def spec(self) -> QuantSpec:
        """Weight and activation together."""
        return QuantSpec(self.weight, self.activation)


class Recipe(BaseModel):
    """Everything that decides a run. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: ModelSpec
    data: DataSpec = Field(default_factory=DataSpec)
    quantization: QuantizationSpec = Field(default_factory=QuantizationSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    train: TrainSpec = Field(default_factory=TrainSpec)
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    baselines: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        target = self.quantization.weight.bits
        stages = self.schedule.lengths(target)
        kind = self.schedule.kind
        if len(stages) == 1 and kind not in (ScheduleKind.CONSTANT, ScheduleKind.CUSTOM):
            raise config_error(
                "schedule.kind",
                kind.value,
                allowed=f"constant or custom for a target of {target:g} bits, which no named ramp lies above",
                fix="set kind: constant",
            )
        if self.train.steps and self.schedule.unit is not StageUnit.EPOCHS:
            self.schedule.resolve(target, self.train.steps)
        _check_rules(self.quantization)
        _check_data(self)
        for name in self.baselines:
            self.baseline(name)
        return self

    @property
    def label(self) -> str:
        """What the method is called in tables: a baseline's own name, `fraqat`, or what the schedule and steps say."""
        if "/" in self.name:
            return self.name.rsplit("/", 1)[-1]
        if self.train.steps == 0:
            return "post-training"
        kind = self.schedule.kind.value
        return {"fractional": "fraqat", "constant": "constant-width"}.get(kind, f"{kind}-schedule")

    def baseline(self, name: str) -> Recipe:
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
        changes = self.baselines[name]
        foreign = sorted(set(changes) - set(_BASELINE_SECTIONS))
        if foreign:
            raise config_error(
                f"baselines.{name}",
                foreign,
                allowed=f"the sections {', '.join(_BASELINE_SECTIONS)}",
                fix="remove the others",
            )
        try:
            changed = load_values(self._baseline_values(name, changes))
        except ConfigError as error:
            raise ConfigError(f"baselines.{name}: {error}") from None
        self._check_shared(name, changed)
        return changed

    def _baseline_values(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = self.model_dump(mode="json", exclude={"baselines"})
        values["name"] = f"{self.name}/{name}"
        if "kind" in (changes.get("schedule") or {}):
            values["schedule"] = {}
        if (changes.get("train") or {}).get("steps") == 0:
            values["train"]["epochs"] = None
            values["schedule"] = {"kind": "constant"}
        return _merge(values, changes)

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
        values = self.model_dump(mode="json", exclude={"name", "evaluation", "baselines"})
        for name in _FREE_TRAIN_FIELDS:
            del values["train"][name]
        values["sampler"] = {name: values["sampler"][name] for name in _TRAINED_SAMPLER_FIELDS}
        del values["model"]["device"]
        return values


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


def _check_data(recipe: Recipe) -> None:
    if recipe.train.batch_size > recipe.data.num_train:
        raise config_error(
            "train.batch_size",
            recipe.train.batch_size,
            allowed=f"at most data.num_train = {recipe.data.num_train}",
            fix="use a smaller batch or more data",
        )
    size = IMAGE_SIZES.get(recipe.data.source)
    wanted = (recipe.sampler.height, recipe.sampler.width)
    if size is not None and wanted != size:
        raise config_error(
            "sampler.height, width",
            list(wanted),
            allowed=f"{list(size)}, the size of {recipe.data.source}",
            fix="set sampler.height and sampler.width",
        )


def load_recipe(source: str, settings: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        source: Path of a YAML file, or the name of a recipe that comes with the package.
        settings: `dotted.key=value` changes, the value in YAML.

    Raises:
        ConfigError: The file is missing or not YAML, or a field is unknown or impossible; all problems are listed.
    """
    values = _read_yaml(source)
    for setting in settings:
        _apply_setting(values, setting)
    return load_values(values)


def load_values(values: dict[str, Any]) -> Recipe:
    """Validates plain values; see `load_recipe`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(problem)) for problem in error.errors())) from None


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("fraqat") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read_yaml(source: str) -> dict[str, Any]:
    if source in recipe_names():
        text = (resources.files("fraqat") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(source)
        if not path.is_file():
            names = ", ".join(recipe_names())
            raise config_error("recipe", source, allowed=f"a YAML file, or one of {names}", fix="correct the path")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {source} cannot be read: {error}. Fix: pass a YAML text file.") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {source} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise config_error("recipe", source, allowed="a mapping of sections", fix="start from a recipe of the package")
    return values


def _apply_setting(values: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise config_error("--set", setting, allowed="dotted.key=value", fix="write for example train.steps=100")
    place: Any = values
    for part in parts[:-1]:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
            continue
        if not isinstance(place, dict):
            raise config_error("--set", setting, allowed="a key that exists in the recipe", fix=f"check {part!r}")
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise config_error("--set", setting, allowed="a value in YAML", fix="quote it") from None
    last = parts[-1]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise config_error("--set", setting, allowed="a key that exists in the recipe", fix=f"check {last!r}")


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _explain(problem: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "recipe"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return f"{path}: {cause}"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(problem["loc"][:-1]), n=1)
        known = ", ".join(_known_keys(problem["loc"][:-1]))
        fix = f"did you mean {close[0]!r}?" if close else "remove it"
        return f"{path}: unknown key: allowed is {known}. Fix: {fix}"
    shown = json.dumps(problem.get("input"), default=str)
    return f"{path} = {shown[:80]} is not possible: {problem['msg']}. Fix: correct {path}."


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys that the recipe allows at a place, found in its JSON schema."""
    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    node: dict[str, Any] = schema
    for part in location:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        options = [node, *node.get("anyOf", [])]
        reference = next((option["$ref"] for option in options if "$ref" in option), None)
        node = definitions[reference.split("/")[-1]] if reference else node
    return list(node.get("properties", {}))
