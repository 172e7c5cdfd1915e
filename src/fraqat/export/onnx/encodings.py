"""Encodings: the integer grid of every tensor of a float graph, and what is observed to find those that were not trained.

Inputs of layers and weights have the grids that were trained. Every other tensor gets the range that it takes in the
calibration samples, with the layers computing on their grids: 16 bits, but for the outputs of layers with inputs of 8 bits,
which the HTP gives in 8 bits only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fraqat.export.codes import LayerCodes
from fraqat.export.onnx.graph import save
from fraqat.export.onnx.qdq_layers import accumulator
from fraqat.export.onnx.runtime import open_session
from fraqat.export.onnx.static import FloatGraph, constant_array
from fraqat.export.target import Inputs
from fraqat.numerics import RangeMethod, RunningStatistics

Array = np.ndarray[Any, Any]
BYTE, WORD = 8, 16
DATA_MOVEMENT = ("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Identity", "Flatten")
"""Operators whose output has the grid of their input."""
_MASKED = -1e3
_MASK_MARGIN = 32.0
_MIN_WIDTH = 1e-4
_CONSTANT_WEIGHT_BITS = 8
_WEIGHT_OPS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Encoding:
    """value = scale * (code - zero_point), codes from 0 to 2^bits - 1.

    Args:
        bits: 8 or 16.
        scale: float32.
        zero_point: Code of zero.
    """

    bits: int
    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        """Smallest value."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """Largest value."""
        return (2**self.bits - 1 - self.zero_point) * self.scale

    def widened(self) -> Encoding:
        """The same values among those of 16 bits: 65535 = 257 * 255."""
        if self.bits == WORD:
            return self
        return Encoding(WORD, float(np.float32(self.scale / 257)), self.zero_point * 257)


def encoding_of_range(low: float, high: float, bits: int) -> Encoding:
    """The grid that covers a range and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    high = max(high, low + _MIN_WIDTH)
    num_steps = 2**bits - 1
    scale = float(np.float32((high - low) / num_steps))
    return Encoding(bits, scale, int(np.clip(round(-low / scale), 0, num_steps)))


@dataclass(frozen=True)
class WeightEncoding:
    """value = scale_O * code.

    Args:
        bits: 4 or 8.
        codes: In the weight's shape.
        scale_O: float32, one per output channel.
        axis: Of the output channels.
        layer: The student's layer; empty for a weight that was in floating point and is rounded here.
        bias: Name of the layer's bias and its codes at `bias_scale_O`, int32.
    """

    bits: int
    codes: Array
    scale_O: Array
    axis: int
    layer: str = ""
    bias_codes_O: Array | None = None
    bias_scale_O: Array | None = None


@dataclass(frozen=True)
class Encodings:
    """Grids by tensor name.

    Args:
        activations: Of what operators take and give, and of constants that are not weights.
        weights: Of weights.
    """

    activations: Mapping[str, Encoding]
    weights: Mapping[str, WeightEncoding] = field(default_factory=dict[str, WeightEncoding])


def trained_encodings(graph: FloatGraph, codes: Mapping[str, LayerCodes]) -> Encodings:
    """What training fixed: inputs and weights of the layers."""
    activations: dict[str, Encoding] = {}
    weights: dict[str, WeightEncoding] = {}
    for name, tensor in graph.inputs_of.items():
        layer = codes[name]
        assert layer.activation is not None and layer.activation.zero_point is not None
        bits = int(layer.spec.activation.bits) if layer.spec.activation is not None else WORD
        activations[tensor] = Encoding(bits, float(layer.activation.scale), int(layer.activation.zero_point))
        sums = accumulator(layer)
        weights[f"{name}.weight"] = WeightEncoding(
            bits=4 if layer.grid.storage_bits <= 4 else 8,
            codes=layer.codes.numpy(),
            scale_O=sums.weight_scale_O.numpy(),
            axis=0,
            layer=name,
            bias_codes_O=None if sums.bias_O is None else sums.bias_O.numpy(),
            bias_scale_O=sums.scale_O.numpy(),
        )
    return Encodings(activations, weights)


def constant_weights(model: ir.Model, trained: Encodings) -> dict[str, WeightEncoding]:
    """Weights of operators that are not layers (a depthwise convolution, a skipped layer): 8 bits per output channel."""
    found: dict[str, WeightEncoding] = {}
    for node in model.graph:
        if node.op_type not in _WEIGHT_OPS:
            continue
        value = node.inputs[1]
        if value is None or not value.is_initializer() or value.name in trained.weights:
            continue
        array = constant_array(value).astype(np.float32)
        if node.op_type == "MatMul" and array.ndim != 2:
            continue
        is_rows_first = node.op_type == "Conv" or (node.op_type == "Gemm" and _flag(node, "transB"))
        axis = 0 if is_rows_first else 1
        others = tuple(i for i in range(array.ndim) if i != axis)
        limit = 2 ** (_CONSTANT_WEIGHT_BITS - 1) - 1
        scale = np.maximum(np.abs(array).max(axis=others, keepdims=True), 1e-6) / np.float32(limit)
        codes = np.clip(np.round(array / scale), -limit, limit).astype(np.int8)
        found[str(value.name)] = WeightEncoding(_CONSTANT_WEIGHT_BITS, codes, scale.flatten().astype(np.float32), axis)
    return found


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())


def observe(observed: ir.Model, graph: FloatGraph, samples: Sequence[Inputs]) -> dict[str, RunningStatistics]:
    """Statistics of every float tensor that operators take or give.

    Args:
        observed: The float graph with the trained grids alone; its outputs are changed.
        graph: Gives the names.
        samples: Inputs of one sample each, as the original graph takes them.
    """
    names = {str(v.name): v for node in observed.graph for v in node.outputs}
    wanted = [str(v.name) for node in graph.model.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]
    outputs = {str(value.name) for value in observed.graph.outputs}
    observed.graph.outputs.extend(names[name] for name in wanted if name not in outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "observed.onnx"
        save(observed, path)
        session = open_session(path)
        host = None if graph.host is None else HostPart(graph.host)
        given = [item.name for item in session.get_inputs()]
        order = [item.name for item in session.get_outputs()]
        statistics = {name: RunningStatistics() for name in (*given, *order)}
        masked = _masked_tensors(graph)
        for sample in samples:
            feeds = all_feeds(sample, host)
            found = run_session(session, {name: feeds[name] for name in given})
            for name, array in (*found.items(), *((name, feeds[name]) for name in given)):
                rest = _without_mask(array) if name in masked else array
                statistics[name].update(torch.from_numpy(rest))
    return statistics


def _masked_tensors(graph: FloatGraph) -> set[str]:
    """What may hold the minus infinity of a mask: what the host gives, moved or added to scores."""
    found = set() if graph.host is None else {str(value.name) for value in graph.host.graph.outputs}
    for node in graph.model.graph:
        is_passed_on = node.op_type in DATA_MOVEMENT or node.op_type == "Add"
        if is_passed_on and any(value is not None and str(value.name) in found for value in node.inputs):
            found |= {str(value.name) for value in node.outputs}
    return found


def _without_mask(array: Array) -> Array:
    """Minus infinity of an additive mask, as a number that integers of 16 bits can hold beside the rest."""
    is_masked = array < _MASKED
    if not is_masked.any():
        return array
    rest = array[~is_masked]
    return np.where(is_masked, (rest.min() if rest.size else 0.0) - _MASK_MARGIN, array)


class HostPart:
    """The graph that computes on the host what depends on step and mask alone.

    Args:
        model: The graph itself, or its file.
    """

    def __init__(self, model: ir.Model | Path):
        source = model if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
        self._session = open_session(source)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Its outputs by name."""
        given = {item.name: feeds[item.name] for item in self._session.get_inputs()}
        return run_session(self._session, given)


def run_session(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of an ONNX Runtime session by name."""
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def all_feeds(sample: Inputs, host: HostPart | None) -> dict[str, Array]:
    """A sample and what the host makes of it."""
    feeds: dict[str, Array] = {name: value.numpy() for name, value in sample.items()}
    return feeds if host is None else feeds | host(feeds)


def complete_encodings(
    graph: FloatGraph, trained: Encodings, statistics: Mapping[str, RunningStatistics], method: RangeMethod
) -> Encodings:
    """A grid for every tensor.

    Args:
        graph: The float graph.
        trained: What training fixed.
        statistics: Of every other tensor.
        method: How outputs of 8 bits get their range; those of 16 bits cover what was seen.
    """
    byte_outputs = {
        graph.products[name] for name, tensor in graph.inputs_of.items() if trained.activations[tensor].bits == BYTE
    }
    found: dict[str, Encoding] = {}
    for value in graph.model.graph.inputs:
        found[str(value.name)] = encoding_of_range(*statistics[str(value.name)].range(RangeMethod.MIN_MAX), WORD)
    for node in graph.model.graph:
        source = node.inputs[0]
        for value in node.outputs:
            name = str(value.name)
            if name in trained.activations:
                found[name] = trained.activations[name]
            elif node.op_type in DATA_MOVEMENT and source is not None and str(source.name) in found:
                found[name] = found[str(source.name)]
            elif name in byte_outputs:
                found[name] = encoding_of_range(*statistics[name].range(method), BYTE)
            else:
                found[name] = encoding_of_range(*statistics[name].range(RangeMethod.MIN_MAX), WORD)
    return Encodings(found, {**trained.weights, **constant_weights(graph.model, trained)})
