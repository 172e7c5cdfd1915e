"""From a float graph and its encodings to a QDQ graph in which every tensor has a grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from fraqat.export.onnx.encodings import (
    BYTE,
    DATA_MOVEMENT,
    WORD,
    Array,
    Encoding,
    Encodings,
    WeightEncoding,
    encoding_of_range,
)
from fraqat.export.onnx.static import constant_array

Value = ir.Value
_PRODUCTS = ("Gemm", "Conv", "MatMul")
_BIAS = 2
_TYPES = {BYTE: ir.DataType.UINT8, WORD: ir.DataType.UINT16}


def with_grids(model: ir.Model, encodings: Encodings) -> ir.Model:
    """A copy of a float graph with QDQ pairs around every tensor that has an encoding.

    The dequantized tensor keeps the float tensor's name. Constants are rounded where the operator's input is.

    Args:
        model: The float graph, unchanged.
        encodings: Of some tensors (to observe the others), or of all.
    """
    return _Builder(model, encodings).build()


class _Builder:
    def __init__(self, model: ir.Model, encodings: Encodings):
        self._model = model.clone()
        self._graph = self._model.graph
        self._encodings = encodings
        self._made: dict[tuple[Any, ...], Value] = {}
        self._before: ir.Node | None = None

    def build(self) -> ir.Model:
        for value in tuple(self._graph.inputs):
            self._round_input_(value)
        for node in tuple(self._graph):
            self._before = node
            self._round_operands_(node)
            self._round_outputs_(node)
        passes.RemoveUnusedNodesPass()(self._model)
        self._graph.sort()
        return self._model

    def _round_input_(self, value: Value) -> None:
        encoding = self._encodings.activations.get(str(value.name))
        if encoding is None:
            return
        self._before = next(iter(self._graph))
        rounded = self._pair(value, encoding, f"{value.name}.rounded")
        self._made[value, encoding] = rounded
        self._replace_later_uses_(value, rounded)

    def _replace_later_uses_(self, old: Value, new: Value) -> None:
        quantize = new.producer().inputs[0].producer()  # pyright: ignore[reportOptionalMemberAccess]
        for use in tuple(old.uses()):
            if use.node is not quantize:
                use.node.replace_input_with(use.idx, new)

    def _round_outputs_(self, node: ir.Node) -> None:
        for value in node.outputs:
            name = str(value.name)
            encoding = self._encodings.activations.get(name)
            if encoding is None:
                continue
            value.name = f"{name}.float"
            self._before = None
            rounded = self._pair(value, encoding, name, after=node)
            rounded.shape, rounded.type = value.shape, value.type
            self._replace_later_uses_(value, rounded)
            for index, output in enumerate(self._graph.outputs):
                if output is value:
                    self._graph.outputs[index] = rounded
            self._made[rounded, encoding] = rounded

    def _round_operands_(self, node: ir.Node) -> None:
        wanted = self._wanted(node)
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            new = self._constant(node, index, value) if value.is_initializer() else self._on_grid(value, wanted)
            if new is not value:
                node.replace_input_with(index, new)

    def _wanted(self, node: ir.Node) -> Encoding | int | None:
        """The grid or number of bits that an operator takes; None leaves inputs as they are."""
        if len(node.outputs) == 1 and node.op_type in ("Identity", "Reshape"):
            name = str(node.outputs[0].name)
            return self._encodings.activations.get(name) if name.endswith(".input") else None
        is_layer = any(v is not None and str(v.name) in self._encodings.weights for v in node.inputs[1:2])
        trained = is_layer and self._encodings.weights[str(node.inputs[1].name)].layer  # pyright: ignore[reportOptionalMemberAccess]
        return None if node.op_type in DATA_MOVEMENT or trained else WORD

    def _on_grid(self, value: Value, wanted: Encoding | int | None) -> Value:
        name = str(value.name).removesuffix(".rounded")
        encoding = self._encodings.activations.get(name)
        if wanted is None or (encoding is None and isinstance(wanted, int)):
            return value
        target = wanted if isinstance(wanted, Encoding) else encoding.widened() if encoding is not None else None
        if target is None or target == encoding:
            return value
        if (value, target) not in self._made:
            self._made[value, target] = self._pair(value, target, f"{name}.as_{target.bits}_{len(self._made)}")
        return self._made[value, target]

    def _pair(self, value: Value, encoding: Encoding, name: str, after: ir.Node | None = None) -> Value:
        scale, zero = self._parameters(encoding)
        quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}.quantize")
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}.dequantize")
        quantize.outputs[0].name, dequantize.outputs[0].name = f"{name}.quantized", name
        dequantize.outputs[0].shape, dequantize.outputs[0].type = value.shape, value.type
        if after is not None:
            self._graph.insert_after(after, [quantize, dequantize])
        else:
            assert self._before is not None
            self._graph.insert_before(self._before, [quantize, dequantize])
        return dequantize.outputs[0]

    def _parameters(self, encoding: Encoding) -> tuple[Value, Value]:
        dtype = _TYPES[encoding.bits]
        scale = self._initializer(f"scale_{encoding.scale!r}", np.array(encoding.scale, np.float32))
        zero = self._initializer(f"zero_{encoding.bits}_{encoding.zero_point}", np.array(encoding.zero_point), dtype)
        return scale, zero

    def _initializer(self, name: str, array: Array, dtype: ir.DataType | None = None) -> Value:
        if name not in self._graph.initializers:
            tensor = (
                ir.tensor(array, name=name)
                if dtype is None
                else ir.tensor(array.astype(dtype.numpy()), dtype, name=name)
            )
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def _dequantized(self, name: str, array: Array, dtype: ir.DataType, scale: Array, **attributes: Any) -> Value:
        """DequantizeLinear of a constant with zero points of zero."""
        codes = self._initializer(f"{name}.codes", array, dtype)
        scales = self._initializer(f"{name}.scale", scale.astype(np.float32))
        zero = self._initializer(f"{name}.zero_point", np.zeros(scale.shape), dtype)
        return self._dequantize(name, codes, scales, zero, attributes)

    def _dequantize(self, name: str, codes: Value, scale: Value, zero: Value, attributes: Mapping[str, Any]) -> Value:
        assert self._before is not None
        key = ("constant", name)
        if key not in self._made:
            node = ir.node("DequantizeLinear", [codes, scale, zero], attributes, name=f"{name}.dequantize")
            node.outputs[0].name = f"{name}.dequantized"
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            self._graph.insert_before(next(iter(self._graph)), node)
            self._made[key] = node.outputs[0]
        return self._made[key]

    def _constant(self, node: ir.Node, index: int, value: Value) -> Value:
        name = str(value.name)
        if value.dtype != ir.DataType.FLOAT:
            return value
        weight = self._encodings.weights.get(name)
        if weight is not None and node.op_type in _PRODUCTS:
            dtype = ir.DataType.INT4 if weight.bits <= 4 else ir.DataType.INT8
            return self._dequantized(weight.layer or name, weight.codes, dtype, weight.scale_O, axis=weight.axis)
        if node.op_type in ("Gemm", "Conv") and index == _BIAS:
            return self._bias(node, value)
        if not any(str(v.name).removesuffix(".float") in self._encodings.activations for v in node.outputs):
            return value
        return self._rounded_constant(node, value)

    def _bias(self, node: ir.Node, value: Value) -> Value:
        name = str(value.name)
        weight_name = self._weight_names(node)
        weight = self._encodings.weights.get(weight_name)
        if weight is None:
            return value
        if weight.layer:
            assert weight.bias_codes_O is not None and weight.bias_scale_O is not None
            return self._dequantized(name, weight.bias_codes_O, ir.DataType.INT32, weight.bias_scale_O, axis=0)
        given = self._encodings.activations.get(self._source_name(node))
        if given is None:
            return value
        scale = (np.float32(given.widened().scale) * weight.scale_O).astype(np.float32)
        codes = np.clip(np.round(constant_array(value) / scale), -(2**31) + 1, 2**31 - 1).astype(np.int32)
        return self._dequantized(name, codes, ir.DataType.INT32, scale, axis=0)

    def _weight_names(self, node: ir.Node) -> str:
        weight = node.inputs[1]
        producer = None if weight is None else weight.producer()
        stored = weight if producer is None else producer.inputs[0]
        label = "" if stored is None else str(stored.name).removesuffix(".codes")
        return next((n for n, w in self._encodings.weights.items() if (w.layer or n) == label), label)

    def _source_name(self, node: ir.Node) -> str:
        name = "" if node.inputs[0] is None else str(node.inputs[0].name).removesuffix(".rounded")
        return name.split(".as_16_")[0]

    def _rounded_constant(self, node: ir.Node, value: Value) -> Value:
        array = constant_array(value).astype(np.float32)
        bits = BYTE if node.op_type == "LayerNormalization" else WORD
        encoding = encoding_of_range(float(array.min()), float(array.max()), bits)
        scale, zero = self._parameters(encoding)
        codes = np.clip(np.round(array / np.float32(encoding.scale)) + encoding.zero_point, 0, 2**bits - 1)
        stored = self._initializer(f"{value.name}.codes_{bits}", codes, _TYPES[bits])
        return self._dequantize(f"{value.name}.as_{bits}", stored, scale, zero, {})


def weight_of_layer(encodings: Encodings, layer: str) -> WeightEncoding:
    """The codes of a layer's weight."""
    return encodings.weights[f"{layer}.weight"]
