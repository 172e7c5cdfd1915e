"""What every target has in common: what it computes, how it is written, how what was written is run again.

A target is one module of `fraqat.export` with one final subclass of `Target`; `fraqat.export.targets` lists them. Importing
such a module costs nothing: the target's own library is imported inside the methods that need it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fraqat.nn import ActivationSpec, QuantSpec, WeightSpec
from fraqat.numerics import Granularity, RangeMethod, ZeroPoint

FloatDtype = Literal["float32", "bfloat16"]
FLOAT_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16})

_INT8_BITS = 8

Inputs = Mapping[str, Tensor]
"""Arguments of one call by name, the batch on the first axis."""


@dataclass(frozen=True)
class ModelDescription:
    """What is needed to build the model again: its class, the class's configuration, and the pipeline it belongs to."""

    class_name: str
    config: dict[str, Any]
    base_pipeline: str
    base_revision: str | None = None
    base_variant: str | None = None


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer stands, for a target that does not take every layer.

    Args:
        name: Qualified name in the student.
        type_name: `Linear` or `PointwiseConv`.
        shape: Of its weight, [O, I] or [O, I, 1, 1].
    """

    name: str
    type_name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A piece of the model that is exported as a graph of its own, such as a transformer or a decoder.

    Args:
        name: Of its file.
        module: Called with keyword arguments alone; gives a tensor or a tuple of tensors.
        outputs: Names of what it gives.
        batches: Makes real inputs, several batches spread as the inputs at run time are; all have the same shapes but for the
            dynamic axes. The first one is what the graph is traced with.
        dynamic_axes: Input -> axis -> name of its size; axes of the same name have the same size.
        constants: What a program around the part needs to know, as plain JSON values.
        files: Path in the export's folder -> contents, for files that such a program reads, such as a tokenizer's.
    """

    name: str
    module: nn.Module
    outputs: tuple[str, ...]
    batches: Callable[[], Sequence[Inputs]]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])


class PositionalPart(nn.Module):
    """A part that takes its inputs in order, so that a tracer sees one name for each.

    Args:
        module: Called by name.
        names: Of the inputs.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: Tensor) -> Any:
        """Calls the part by name."""
        return self.module(**dict(zip(self.names, tensors, strict=True)))


def samples_of(part: Part, inputs: Inputs) -> list[Inputs]:
    """The samples of a batch, each with a batch axis of 1, for runtimes with a fixed batch."""
    batched = {name for name, axes in part.dynamic_axes.items() if 0 in axes and name in inputs}
    count = next((inputs[name].shape[0] for name in inputs if name in batched), 1)
    return [{n: v[i : i + 1] if n in batched else v for n, v in inputs.items()} for i in range(count)]


@dataclass(frozen=True)
class ExportJob:
    """What a target gets to write.

    Args:
        student: Changed by `quantize_`, at its final width, float32, in evaluation mode, on the CPU, without integer engines.
        parts: Makes the pieces to be exported as graphs; the first holds the quantized layers.
        description: How to build the float model again.
        origin: Folder of the original in its own library's format, for configuration and tokenizer; None where it is a hub id
            that is not on this machine.
        folder: Exists and is empty.
        float_dtype: Precision of what is not quantized.
        say: Told what happens.
    """

    student: nn.Module
    parts: Callable[[], tuple[Part, ...]]
    description: ModelDescription
    origin: Path | None
    folder: Path
    float_dtype: FloatDtype = "float32"
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class Outputs:
    """What a part gave.

    Args:
        outputs: By the names of `Part.outputs`.
        layers: Outputs of the quantized layers by the student's names; empty where the runtime cannot show them.
        layer_inputs: What each of these layers was given, so that a layer can be compared by itself: an error that a layer was
            handed down is not its own.
    """

    outputs: Mapping[str, Tensor]
    layers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    layer_inputs: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class OpenedExport(Protocol):
    """An export in its target's own runtime."""

    def codes(self) -> Mapping[str, Tensor]:
        """The integers of every quantized weight as they lie in the file, by the student's layer names, in its shape."""
        ...

    def run(self, part: Part, inputs: Inputs) -> Outputs:
        """Runs one part."""
        ...


@runtime_checkable
class ShowsWeights(Protocol):
    """An opened export that can say what its weights are, scales included."""

    def weights(self) -> Mapping[str, Tensor]:
        """Dequantized weights by the student's layer names, float32."""
        ...


@dataclass(frozen=True)
class StepsApart:
    """How far a layer's output on an accelerator is from the exact integers for the same input.

    Args:
        bits: Of the output.
        largest: In steps of the output's grid.
        share_equal: Outputs with the same code.
    """

    bits: int
    largest: float
    share_equal: float


@runtime_checkable
class CountsSteps(Protocol):
    """An opened export whose outputs are integers of their own."""

    def steps_apart(self, part: Part, found: Sequence[Outputs]) -> Mapping[str, StepsApart]:
        """Layers of a part against the same graph's exact computation, for what `run` gave."""
        ...


@dataclass(frozen=True)
class Bound:
    """What an export may differ by from the student.

    Args:
        sqnr_db: Least ratio of the student's output to the difference, over all inputs compared, of every output.
        layer_sqnr_db: The same for every layer that the runtime shows, given the same input.
        reason: Where the difference comes from.
        steps: Most steps of a layer's 8-bit output, where the runtime gives integers (`CountsSteps`).
    """

    sqnr_db: float
    layer_sqnr_db: float
    reason: str
    steps: float | None = None


class Target(ABC):
    """A file format and the arithmetic of what runs it.

    Attributes:
        name: As in `target:` of a recipe and `--format`.
        summary: One line.
        extra: The package's extra that brings what it needs; empty if nothing.
        requires: Modules that it imports when it is used.
        tasks: Tasks of the recipes that it takes.
        model_classes: Classes of diffusers and transformers that it takes; empty: any.
        defaults: Of the recipe's `quantization` section, for what the user does not set.
        float_dtypes: Precisions that it can store what is not quantized in.
        exports_all_parts: Whether every part is written, not the first alone.
        bound: What an export may differ by from the student.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    extra: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    tasks: ClassVar[tuple[str, ...]] = ("text-to-image", "language", "text-to-speech")
    model_classes: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    float_dtypes: ClassVar[tuple[FloatDtype, ...]] = ("float32", "bfloat16")
    exports_all_parts: ClassVar[bool] = False
    bound: ClassVar[Bound]

    @abstractmethod
    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """The specification nearest to `spec` that the target computes exactly; None: the layer stays in floating point."""

    @abstractmethod
    def write(self, job: ExportJob) -> None:
        """Writes the files into the job's folder.

        Raises:
            ConfigError: The model has something that the target has no place for.
            ModelError: The original's folder lacks what the target needs.
        """

    @abstractmethod
    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """What was written, in the target's own runtime.

        Args:
            folder: Of `write`; its checksums were compared.
            student: The model that it was made from, for names and shapes only.
        """


def fitted_weight(weight: WeightSpec, **changes: Any) -> WeightSpec:
    """`weight` with some fields changed, and those that depend on them made possible.

    Args:
        weight: Any specification.
        changes: Fields of `WeightSpec`.
    """
    if changes.get("granularity", weight.granularity) is not Granularity.GROUP:
        changes = {"group_size": None, "group_scale": "float"} | changes
    return dataclasses.replace(weight, **changes)


def fitted_activation(activation: ActivationSpec, **changes: Any) -> ActivationSpec:
    """`activation` with some fields changed; a static one is made per tensor, and only an asymmetric dynamic one has a
    `zero_point` of its own."""
    is_static = changes.get("static", activation.static)
    if is_static:
        changes = {"granularity": Granularity.TENSOR} | changes
    if is_static or changes.get("symmetric", activation.symmetric):
        changes = {"zero_point": ZeroPoint.FLOAT} | changes
    return dataclasses.replace(activation, **changes)


def token_int8(activation: ActivationSpec | None) -> ActivationSpec | None:
    """Symmetric int8 inputs per token, for runtimes that have nothing else; wider inputs stay in floating point."""
    if activation is None or activation.bits > _INT8_BITS:
        return None
    return fitted_activation(
        activation,
        bits=float(_INT8_BITS),
        granularity=Granularity.TOKEN,
        static=False,
        symmetric=True,
        range_method=RangeMethod.MAX_ABS,
        scale_dtype="float32",
    )
