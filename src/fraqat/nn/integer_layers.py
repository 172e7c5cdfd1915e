"""Puts the integer path into a quantized model, and keeps its codes in step with the weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fraqat.errors import config_error, parse_choice
from fraqat.kernels import EngineName, EngineTable
from fraqat.nn.input_codes import SharedInput
from fraqat.nn.integer import WIDEST_BITS, IntegerWeight, why_not_integer
from fraqat.nn.layers import QuantizedLayer
from fraqat.nn.packed import PackedLayer
from fraqat.nn.spec import STRICT_KEYS
from fraqat.nn.swap import quantized_layers
from fraqat.table import Table


@dataclass(frozen=True)
class EngineSpec:
    """How the products of quantized layers are computed.

    Args:
        name: `auto` measures the engines that run here and takes the fastest per shape; `reference` computes with quantized
            values in floating point; another name asks for that engine.
        strict: Whether it is an error that the engine named cannot run here; if not, the others are measured.
        input_gradient: `float`, or `integer`: gradients of inputs are integer products too, of gradients rounded to 8 bits per
            token, stochastically so that they are right on average.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    name: EngineName = EngineName.AUTO
    strict: bool = False
    input_gradient: Literal["float", "integer"] = "float"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", parse_choice("engine.name", self.name, EngineName))
        if self.strict and self.name == EngineName.AUTO:
            raise config_error("engine.strict", True, allowed="false with name: auto", fix="name the engine wanted")
        if self.input_gradient not in ("float", "integer"):
            raise config_error("engine.input_gradient", self.input_gradient, allowed="float, integer", fix="use one")
        if self.input_gradient == "integer" and self.name == EngineName.REFERENCE:
            raise config_error(
                "engine.input_gradient", "integer", allowed="float with name: reference", fix="use name: auto"
            )


class IntegerLayers:
    """The integer path of every layer of a model that can have one; the others keep the floating-point path.

    The codes of the weights are made by `refresh_` alone: call it whenever weights or widths have changed (after an
    optimizer step, `set_bits_`, `load_state_dict`). Autograd refuses a backward pass through codes that were refreshed
    since its forward pass.

    Args:
        model: A quantized or packed model, changed in place; `release_` undoes it for quantized layers.
        spec: Which engine.
        counts_preparation: Whether codes change often, as in training: see `EngineTable`.

    Raises:
        ConfigError: The engine named cannot run and `spec.strict`.
    """

    def __init__(self, model: nn.Module, spec: EngineSpec | None = None, *, counts_preparation: bool = True):
        spec = spec or EngineSpec()
        layers = dict(quantized_layers(model))
        device = next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.table = EngineTable(device, spec.name, strict=spec.strict, counts_preparation=counts_preparation)
        shared = shared_parameters(model)
        self.reasons = {
            name: reason
            for name, layer in layers.items()
            if (reason := why_not_integer(layer.spec) or ("shared weights" if id(layer.weight) in shared else ""))
        }
        inputs, has_integer_gradient = SharedInput(), spec.input_gradient == "integer"
        self._layers: list[tuple[QuantizedLayer, IntegerWeight]] = [
            (layer, IntegerWeight(self.table, inputs, layer.weight, has_integer_gradient=has_integer_gradient))
            for name, layer in layers.items()
            if name not in self.reasons
        ]
        self.num_packed = self._attach_packed_(model, inputs)
        self.is_sharded = False
        self.refresh_()

    @property
    def layers(self) -> list[tuple[QuantizedLayer, IntegerWeight]]:
        """Quantized layers that have an integer path, and their codes."""
        return list(self._layers)

    @property
    def num_layers(self) -> int:
        """How many layers have an integer path."""
        return len(self._layers) + self.num_packed

    def _attach_packed_(self, model: nn.Module, inputs: SharedInput) -> int:
        """Packed layers have their codes for good."""
        count = 0
        for name, layer in model.named_modules():
            if not isinstance(layer, PackedLayer):
                continue
            if reason := why_not_integer(layer.spec):
                self.reasons[name] = reason
                continue
            codes, scale = layer.effective_codes()
            layer.integer = IntegerWeight(self.table, inputs, layer.codes, codes=codes)
            layer.integer.set_(codes, scale)
            count += 1
        return count

    @torch.no_grad()
    def refresh_(self) -> None:
        """Quantizes every weight anew.

        A layer wider than 8 bits takes the floating-point path until it is narrower, one between its weights and the final grid
        until it is on the grid, and so does one whose scale is trained without its weight.

        With `is_sharded` (processes hold rows of the weights each) the codes are made when a weight is gathered next.
        """
        for layer, integer in self._layers:
            quantizer = layer.weight_quantizer
            is_integer = quantizer.bits <= WIDEST_BITS and quantizer.is_on_grid and not _trains_scale_alone(layer)
            if is_integer and self.is_sharded:
                integer.is_current = False
            elif is_integer:
                integer.refresh_(quantizer, layer.master_weight())
            if (layer.integer is not None) != is_integer:
                _set_integer_(layer, integer if is_integer else None)

    def finish_gradients_(self) -> None:
        """Completes the gradients of weights and learned scales: once, after the last backward pass of an optimizer step.

        Backward passes leave the gradient of the quantized weight in `weight.grad`. From their sum come the gradients of
        learned scales (LSQ), then those of clipped weights are zeroed (straight-through estimator). Both are linear, so the
        same as after every micro-batch. In data-parallel training call it after the sum over processes.
        """
        for layer, _ in self._layers:
            if layer.integer is not None and layer.weight.grad is not None:
                layer.weight_quantizer.finish_gradient_(layer.weight)

    def release_(self) -> None:
        """Gives every layer its floating-point path back."""
        for layer, _ in self._layers:
            _set_integer_(layer, None)

    @property
    def num_now(self) -> int:
        """Layers that compute by integers at the current widths."""
        return sum(layer.integer is not None for layer, _ in self._layers) + self.num_packed

    def record(self) -> dict[str, Any]:
        """What was chosen and why, for a log: JSON values."""
        chosen = [
            {"shape": str(c.shape), "dtype": str(c.shape.out_dtype), "engine": c.engine, "times_ms": c.times_ms}
            for c in self.table.choices
        ]
        floating = {"floating_point": _count(self.reasons), "unavailable": self.table.reasons}
        return {"num_layers": self.num_layers, "num_now": self.num_now, "chosen": chosen, **floating}

    def summary(self) -> str:
        """One line: how many layers, and which engines compute them."""
        counts = _count({str(choice.shape): choice.engine for choice in self.table.choices})
        engines = ", ".join(f"{name} ({count} shapes)" for name, count in counts.items()) or "none yet"
        wider = self.num_layers - self.num_now
        later = f", {wider} more once they are on their final grid or at 8 bits" if wider else ""
        return f"integer products in {self.num_now} layers{later}, {len(self.reasons)} in floating point; engines: {engines}"

    def to_table(self) -> Table:
        """Which engine computes which shape, with the times measured."""
        columns = ("tokens x in -> out", "dtype", "engine", "milliseconds")
        rows = tuple(
            (
                str(choice.shape),
                str(choice.shape.out_dtype).removeprefix("torch."),
                choice.engine,
                ", ".join(f"{name} {value:.2f}" for name, value in sorted(choice.times_ms.items())) or "not measured",
            )
            for choice in self.table.choices
        )
        notes = [f"{self.num_layers} layers by integer products"]
        notes += [f"{reason}: {count} layers in floating point" for reason, count in _count(self.reasons).items()]
        notes += [f"{name} cannot run: {reason}" for name, reason in self.table.reasons.items()]
        return Table("Engines", columns, rows, tuple(notes))


def _set_integer_(layer: QuantizedLayer, integer: IntegerWeight | None) -> None:
    layer.integer = integer
    layer.weight_quantizer.defers_gradient = integer is not None


def _trains_scale_alone(layer: QuantizedLayer) -> bool:
    scale = layer.weight_quantizer.scale
    return scale is not None and scale.requires_grad and not layer.weight.requires_grad


def shared_parameters(model: nn.Module) -> set[int]:
    """Parameters of more than one module: their gradient is not that of one quantized weight alone."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {parameter for parameter, count in owners.items() if count > 1}


def _count(reasons: dict[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    return counts
