"""The float graph of a part with fixed shapes: what a compiler for an accelerator reads, and what its encodings name.

Sizes are those of one sample. What depends on step and mask alone (sines of the step, an additive mask) is computed by a small
graph of its own, on the host: integers of 16 bits are too coarse for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnx_ir.tape import Tape
from torch import nn

from fraqat.errors import config_error
from fraqat.export.codes import LayerCodes
from fraqat.export.onnx.graph import layer_nodes, replace_layers_, trace
from fraqat.export.onnx.layers import Ops, Value
from fraqat.export.onnx.rewrites import rewrite_
from fraqat.export.target import Inputs, Part, samples_of

_HOST_RANK = 1
_NEVER_ON_HOST = ("Layer", "Gemm", "MatMul", "Conv")


@dataclass(frozen=True)
class FloatGraph:
    """A part with fixed shapes.

    Args:
        model: `onnx_ir.Model` of ordinary operators; the weight of a layer is `LAYER.weight`, what it is given `LAYER.input`.
        host: Gives the model's inputs that depend on step and mask alone; None if there are none.
        inputs_of: Layer -> name of the tensor that it is given, one name for layers that share it.
        products: Layer -> name of the tensor that its product gives.
    """

    model: ir.Model
    host: ir.Model | None
    inputs_of: Mapping[str, str]
    products: Mapping[str, str]


def single_samples(part: Part, limit: int) -> list[Inputs]:
    """Up to `limit` inputs of one sample each, spread over all batches of a part."""
    samples = [sample for batch in part.batches() for sample in samples_of(part, batch)]
    if len(samples) <= limit:
        return samples
    return [samples[round(i * (len(samples) - 1) / max(1, limit - 1))] for i in range(limit)]


def float_graph(
    part: Part, student: nn.Module, codes: Mapping[str, LayerCodes], samples: Sequence[Inputs]
) -> FloatGraph:
    """Traces a part for one sample, with the weights that the codes stand for.

    Args:
        part: Holds `student`, or is it.
        student: Changed by `quantize_`.
        codes: Of its layers.
        samples: Inputs of one sample each; the first gives the shapes.
    """
    model = trace(dataclasses.replace(part, batches=lambda: samples, dynamic_axes={}), student)
    for run in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True),
        passes.CommonSubexpressionEliminationPass(),
    ):
        run(model)
    inputs_of, products = _lower_(model, codes)
    passes.ShapeInferencePass()(model)
    _check_shapes(model)
    host = _split_host_(model, set(inputs_of.values()))
    passes.RemoveUnusedNodesPass()(model)
    rewrite_(model)
    passes.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    model.opset_imports.pop("fraqat", None)
    model.opset_imports.pop("pkg.torch::symbolic", None)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    return FloatGraph(model, host, inputs_of, products)


def _lower_(model: ir.Model, codes: Mapping[str, LayerCodes]) -> tuple[dict[str, str], dict[str, str]]:
    """Makes Gemm and Conv of the `Layer` nodes; what each is given, and what its product is called."""
    nodes, shared = layer_nodes(model), dict[tuple[Any, ...], Value]()
    products: dict[str, str] = {}
    inputs_of: dict[str, str] = {}

    def lower(name: str) -> Any:
        def build(tape: Tape, x: Value) -> Value:
            layer, ops = codes[name], Ops(tape, name)
            given = _given(ops, layer, x, shared)
            inputs_of[name] = str(given.name)
            y = _float_product(ops, layer, nodes[name], given, x)
            if layer.type_name == "Linear" and _rank(x) != 2:
                y.name = f"{name}.product"
                products[name] = y.name
                return ops(
                    "Reshape", y, ops.constant("shape", np.array([*_sizes(x)[:-1], layer.codes.shape[0]], np.int64))
                )
            products[name] = str(nodes[name].outputs[0].name)
            return y

        return build

    replace_layers_(model, {name: lower(name) for name in nodes})
    return inputs_of, products


def _given(ops: Ops, layer: LayerCodes, x: Value, shared: dict[tuple[Any, ...], Value]) -> Value:
    """The layer's input under its own name; layers that round the same tensor alike share it."""
    assert layer.activation is not None
    zero_point = layer.activation.zero_point
    key = (x, layer.type_name, float(layer.activation.scale), None if zero_point is None else int(zero_point))
    if key not in shared:
        is_rows = layer.type_name == "Linear" and _rank(x) != 2
        num_columns = layer.matrix.shape[1]
        shared[key] = (
            ops("Reshape", x, ops.constant("rows", np.array([-1, num_columns], np.int64)))
            if is_rows
            else ops("Identity", x)
        )
        shared[key].name = f"{layer.name}.input"
        shared[key].type = ir.TensorType(ir.DataType.FLOAT)
    return shared[key]


def _float_product(ops: Ops, layer: LayerCodes, node: Any, given: Value, x: Value) -> Value:
    scale = layer.qparams.scale.float().reshape(-1, *(1 for _ in layer.codes.shape[1:]))
    weight = ops.constant("weight", layer.codes.float() * scale)
    bias = () if layer.bias is None else (ops.constant("bias", layer.bias),)
    if layer.type_name == "Linear":
        return ops("Gemm", given, weight, *bias, transB=1)
    strides = tuple(node.attributes["strides"].as_ints())
    return ops("Conv", given, weight, *bias, kernel_shape=(1, 1), strides=strides)


def _sizes(x: Value) -> list[int]:
    assert x.shape is not None, f"the shape of {x.name} is not known"
    return [int(size) for size in x.shape]  # pyright: ignore[reportArgumentType]


def _rank(x: Value) -> int:
    return len(_sizes(x))


def _split_host_(model: ir.Model, layer_inputs: set[str]) -> ir.Model | None:
    """Moves what depends on integers and single numbers alone into a model of its own."""
    graph = model.graph
    is_host = {value: _belongs_to_host(value) for value in graph.inputs}
    moved: list[ir.Node] = []
    for node in graph:
        given = [value for value in node.inputs if value is not None and not value.is_initializer()]
        is_kept = node.op_type in _NEVER_ON_HOST or str(node.outputs[0].name) in layer_inputs
        if given and not is_kept and all(is_host.get(value, False) for value in given):
            moved.append(node)
            is_host |= dict.fromkeys(node.outputs, True)
    host_inputs = [value for value in graph.inputs if is_host[value]]
    if not host_inputs:
        return None
    kept = set(graph) - set(moved)
    edges = [v for v, on_host in is_host.items() if on_host and any(use.node in kept for use in v.uses())]
    host = _cut_host(model, [str(value.name) for value in host_inputs], [str(value.name) for value in edges])
    for index, value in enumerate(edges):
        new = ir.Value(name=f"host_{index}", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        for use in tuple(value.uses()):
            if use.node in kept:
                use.node.replace_input_with(use.idx, new)
        graph.inputs.append(new)
        host.graph.outputs[index].name = new.name
    for node in reversed(moved):
        graph.remove(node, safe=True)
    for value in host_inputs:
        graph.inputs.remove(value)
    return host


def _belongs_to_host(value: Value) -> bool:
    return value.dtype is None or not value.dtype.is_floating_point() or _rank(value) <= _HOST_RANK


def _cut_host(model: ir.Model, inputs: list[str], outputs: list[str]) -> ir.Model:
    """A copy of the nodes between some inputs and some outputs."""
    copy = model.clone()
    values = {str(v.name): v for v in (*copy.graph.inputs, *(o for node in copy.graph for o in node.outputs))}
    copy.graph.outputs.clear()
    for name in outputs:
        value = values[name]
        if value.is_graph_input():
            node = ir.node("Identity", [value])
            copy.graph.append(node)
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            value = node.outputs[0]
        copy.graph.outputs.append(value)
    passes.RemoveUnusedNodesPass()(copy)
    for value in tuple(copy.graph.inputs):
        if str(value.name) not in inputs:
            copy.graph.inputs.remove(value)
    return copy


def _check_shapes(model: ir.Model) -> None:
    for node in model.graph:
        for value in node.outputs:
            sizes = None if value.shape is None else list(value.shape)
            if sizes is None or not all(isinstance(size, int) for size in sizes):
                raise config_error(
                    "shape",
                    f"{value.name} of {node.op_type}: {sizes}",
                    allowed="fixed sizes for an accelerator",
                    fix="make the part's forward free of sizes that depend on values",
                )


def constant_array(value: Value) -> np.ndarray[Any, Any]:
    """What an initializer holds."""
    assert value.const_value is not None
    return value.const_value.numpy()
