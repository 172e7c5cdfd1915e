"""The list of targets, and whether a trained model is on a target's grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from torch import nn

from fraqat.errors import choice_error, config_error
from fraqat.export.compressed_tensors import CompressedTensorsTarget
from fraqat.export.executorch import ExecutorchTarget
from fraqat.export.gguf import GgufTarget
from fraqat.export.onnx.integer import IntegerTarget
from fraqat.export.onnx.qdq import QdqTarget
from fraqat.export.onnx.qualcomm import QualcommTarget
from fraqat.export.packed_target import PackedTarget
from fraqat.export.target import LayerPlace, Target
from fraqat.export.torchao_target import TorchaoTarget
from fraqat.nn import QuantSpec, quantized_layers

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            PackedTarget(),
            IntegerTarget(),
            QdqTarget(),
            QualcommTarget(),
            GgufTarget(),
            CompressedTensorsTarget(),
            TorchaoTarget(),
            ExecutorchTarget(),
        )
    }
)
"""Name -> target."""
_NARROW_BITS = 8


def target_named(name: str) -> Target:
    """The target of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in TARGETS:
        raise choice_error("target", name, TARGETS)
    return TARGETS[name]


def check_model(target: Target, task: str, class_name: str | None = None) -> None:
    """Refuses a target that has no place for a kind of model.

    Args:
        target: Of a recipe or an export.
        task: Of the recipe.
        class_name: Of the part that is quantized; None where it is not known yet.

    Raises:
        ConfigError: The target does not take it.
    """
    if task not in target.tasks:
        takes = ", ".join(target.tasks)
        raise config_error("target", target.name, allowed=f"targets for {task}", fix=f"{target.name} takes {takes}")
    if class_name is not None and target.model_classes and class_name not in target.model_classes:
        raise config_error(
            "target",
            target.name,
            allowed=f"targets that take {class_name}",
            fix=f"{target.name} takes {', '.join(target.model_classes)}; `fraqat targets` lists the others",
        )


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A layer that is not what a target computes.

    Args:
        layer: Its name.
        field: First field that differs, by dotted name; `layer` where the target leaves the whole layer in floating point.
        found, wanted: Its value in the model, and the target's.
    """

    layer: str
    field: str
    found: object
    wanted: object

    def to_text(self) -> str:
        """One line."""
        return f"{self.layer}: {self.field} = {self.found}, the target computes {self.wanted}"


def first_difference(spec: QuantSpec, wanted: QuantSpec | None) -> tuple[str, object, object] | None:
    """Field, value in `spec`, value in `wanted` of the first field that differs; None if there is none."""
    if wanted is None:
        return "layer", "quantized", "it in floating point"
    for name in ("weight", "activation"):
        ours, theirs = getattr(spec, name), getattr(wanted, name)
        if ours == theirs:
            continue
        if ours is None or theirs is None:
            return name, "in floating point" if ours is None else "quantized", "float" if theirs is None else "integers"
        for field in dataclasses.fields(ours):
            found, expected = getattr(ours, field.name), getattr(theirs, field.name)
            if found != expected:
                return f"{name}.{field.name}", getattr(found, "value", found), getattr(expected, "value", expected)
    return None


def fitted(target: Target, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
    """What a layer becomes in training for a target.

    A layer that the target has no integers for stays in floating point (None), and an input wider than 8 bits becomes what the
    target has for it; the table of layers shows both.

    Raises:
        ConfigError: A rule asks for anything else that the target does not compute.
    """
    nearest = target.nearest(place, spec)
    difference = first_difference(spec, nearest)
    if nearest is None or difference is None:
        return nearest
    is_wide = spec.activation is not None and spec.activation.bits > _NARROW_BITS
    if is_wide and nearest.weight == spec.weight:
        return nearest
    name, found, wanted = difference
    raise config_error(
        f"quantization of layer {place.name}: {name}",
        found,
        allowed=f"{wanted} for target {target.name}",
        fix="change or remove the rule that sets it, or skip the layer",
    )


def check_plain(student: nn.Module, target: Target) -> None:
    """Refuses a student that is more than quantized products: no target has a place for a branch or smoothed inputs.

    Raises:
        ConfigError: A layer has one of these.
    """
    for name, layer in quantized_layers(student):
        if layer.has_extras:
            has = "a low-rank branch" if layer.branch is not None else "a smoothed input"
            raise config_error(
                "target",
                target.name,
                allowed=f"students of quantized products alone; layer {name} has {has}",
                fix="run this student with `fraqat evaluate` or `fraqat generate`, or train one without "
                "quantization.branch and quantization.smoothing",
            )


def mismatches(student: nn.Module, target: Target) -> Iterator[Mismatch]:
    """The quantized layers of a student that are not on the target's grid."""
    for name, layer in quantized_layers(student):
        place = LayerPlace(name, layer.type_name, tuple(layer.weight.shape))
        difference = first_difference(layer.spec, target.nearest(place, layer.spec))
        if difference is not None:
            yield Mismatch(name, *difference)
