"""The neutral graph: a part of the model as ONNX, with every quantized layer as one node `fraqat::Layer`.

Tracing knows nothing of quantization, and lowering nothing of PyTorch: each format replaces the `Layer` nodes by what its
runtime computes. A `Layer` takes x [..., I] (`kind` Linear) or [N, I, H, W] (`kind` PointwiseConv) and carries the student's
layer name as its attribute `name`; its output is called `NAME.output`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fraqat.errors import ModelError, config_error
from fraqat.export.target import FloatDtype, Inputs, Part, PositionalPart
from fraqat.nn import QuantizedLayer, quantized_layers

OPSET = 21
"""The first with INT4 and blocked DequantizeLinear."""
DOMAIN, LAYER = "fraqat", "Layer"
LAYER_INPUTS = "fraqat.layer_inputs"
"""Metadata of a lowered graph: layer -> name of the tensor that it is given, as JSON."""
LAYER_OUTPUTS = "fraqat.layer_outputs"
"""Metadata: layer -> name of the tensor that it gives (in a static graph: that its product gives), as JSON."""
_INLINE_BYTES = 1 << 30
_SMALL_TENSOR = 1 << 10
_CROPS = ("Reshape", "Slice")
BATCH = "batch"
_NOT_IN_NAMES = frozenset("\"'\\")
_TRACED_BATCH, _TRACED_SIZE = 32, 1 << 20
"""Conditions of the model's code on sizes must be decided up to here; diffusers' upsampling has one at a batch of 64. The graph
itself takes any size."""


def output_name(layer: str) -> str:
    """The name of a layer's output in the graph."""
    return f"{layer}.output"


def trace(part: Part, student: nn.Module) -> Any:
    """The neutral graph of a part, an `onnx_ir.Model`.

    Args:
        part: Holds `student`, or is it.
        student: Changed by `quantize_`; its layers are changed while the part is traced.

    Raises:
        ConfigError: A module's name cannot stand in a graph.
        ModelError: PyTorch cannot trace the part.
    """
    _check_names(part)
    example = dict(part.batches()[0])
    with _as_nodes(student), _quiet():
        program = _export(PositionalPart(part.module, tuple(example)), part, example)
        try:
            model = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=True, verbose=False)
        except torch.onnx.OnnxExporterError as error:
            raise _not_traced(part, error) from error
    assert model is not None
    graph: Any = model.model.graph
    _drop_vain_squeezes_(graph)
    _crop_constants_(graph)
    for value, name in zip(graph.inputs, example, strict=True):
        value.name = name
    _name_sizes_(graph, part)
    for value, name in zip(graph.outputs, part.outputs, strict=True):
        value.name = name
    for node in graph:
        if node.op_type == LAYER and node.outputs[0] not in graph.outputs:
            node.outputs[0].name = output_name(node.attributes["name"].as_string())
    return model.model


def _export(module: nn.Module, part: Part, example: Inputs) -> torch.export.ExportedProgram:
    sizes: dict[str, Any] = {}
    for axes in part.dynamic_axes.values():
        for name in axes.values():
            largest = _TRACED_BATCH if name == BATCH else _TRACED_SIZE
            sizes.setdefault(name, torch.export.Dim(name, min=1, max=largest))
    arguments = tuple(value.contiguous() for value in example.values())  # strides would become conditions
    shapes = tuple({i: sizes[n] for i, n in part.dynamic_axes.get(name, {}).items()} or None for name in example)
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), arguments, dynamic_shapes={"tensors": shapes}, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _not_traced(part, error) from error


def _not_traced(part: Part, error: Exception) -> ModelError:
    return ModelError(
        f"{part.name} ({type(part.module).__name__}) cannot be traced for ONNX: {error}. Fix: make its forward free of "
        "branches on values, or export with --format packed."
    )


def _check_names(part: Part) -> None:
    """Tracing makes source code of names, and a quote in one would end its text there."""
    module = part.module
    names = (
        n for found in (module.named_modules(), module.named_parameters(), module.named_buffers()) for n, _ in found
    )
    for name in names:
        if not name.isprintable() or set(name) & _NOT_IN_NAMES:
            raise config_error(
                "module name", name, allowed="printable characters but for quotes and backslashes", fix="rename it"
            )


@contextmanager
def _as_nodes(student: nn.Module) -> Generator[None]:
    """Lets every quantized layer stand for one node while it is traced."""
    layers = [layer for _, layer in quantized_layers(student)]
    try:
        for name, layer in quantized_layers(student):
            layer.__dict__["forward"] = _node(name, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _node(name: str, layer: QuantizedLayer) -> Callable[[Tensor], Tensor]:
    num_outputs, is_linear = layer.weight.shape[0], layer.type_name == "Linear"
    strides = (1, 1) if is_linear else cast(tuple[int, int], layer.stride)

    def forward(input: Tensor) -> Tensor:
        shape: tuple[Any, ...] = (*input.shape[:-1], num_outputs)
        if not is_linear:
            places = [(size - 1) // step + 1 for size, step in zip(input.shape[2:], strides, strict=True)]
            shape = (input.shape[0], num_outputs, *places)
        attributes: dict[str, Any] = {"name": name, "kind": layer.type_name, "strides": list(strides)}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{LAYER}", (input,), attributes, dtype=input.dtype, shape=shape, version=1
        )

    return forward


def _drop_vain_squeezes_(graph: Any) -> None:
    """Removes the Squeeze of an axis that is longer than 1: PyTorch leaves such an axis alone, ONNX refuses it."""
    for node in tuple(graph):
        given, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Squeeze" or given is None or given.shape is None or output.shape is None:
            continue
        if len(given.shape) == len(output.shape):
            output.replace_all_uses_with(given, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _crop_constants_(graph: Any) -> None:
    """Computes the reshapes and slices of constants: of a table of positions, which serves all sizes of picture, only what the
    traced size reads is stored (0.9 GB of SD3.5 Medium's table are 25 MB at 1024 pixels)."""
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    for node in tuple(graph):
        if node.op_type not in _CROPS or node.domain or any(v is None or v.const_value is None for v in node.inputs):
            continue
        feeds = {value.name: value.const_value.numpy() for value in node.inputs}
        evaluator: Any = ReferenceEvaluator(onnx_ir.to_proto(node), opsets={"": OPSET})
        output, (array,) = node.outputs[0], evaluator.run(None, feeds)
        cropped = onnx_ir.Value(name=f"{output.name}.constant", const_value=onnx_ir.tensor(np.ascontiguousarray(array)))
        cropped.shape, cropped.type = onnx_ir.Shape(array.shape), output.type or node.inputs[0].type
        graph.register_initializer(cropped)
        output.replace_all_uses_with(cropped, replace_graph_outputs=True)
        read = tuple(node.inputs)
        graph.remove(node, safe=True)
        for value in dict.fromkeys(read):
            if not value.uses() and value.name in graph.initializers and value not in graph.outputs:
                del graph.initializers[value.name]


def _name_sizes_(graph: Any, part: Part) -> None:
    """Gives dynamic axes the names of the part, in inputs and outputs."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in part.dynamic_axes.get(value.name, {}).items():
            names[str(value.shape[axis])] = name
            value.shape[axis] = name
    for value in graph.outputs:
        for axis, size in enumerate(value.shape):
            if str(size) in names:
                value.shape[axis] = names[str(size)]


@contextmanager
def _quiet() -> Generator[None]:
    """The exporter speaks of libraries that are not needed, and of its own internals."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # constants are folded on both sides of a choice: the logarithm of a distance of 0 in T5
            warnings.filterwarnings("ignore", "divide by zero|invalid value", RuntimeWarning)
            yield
    finally:
        registration.setLevel(level)


def layer_nodes(model: Any) -> dict[str, Any]:
    """The `Layer` nodes of a neutral graph by layer name."""
    found: dict[str, Any] = {}
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type != LAYER:
            continue
        name = node.attributes["name"].as_string()
        if name in found:
            raise config_error(
                "layer", name, allowed="layers that a part calls once", fix="skip the layer, or give each call its own"
            )
        found[name] = node
    return found


def replace_layers_(model: Any, lower: Mapping[str, Callable[[Any, Any], Any]]) -> None:
    """Replaces every `Layer` node.

    Args:
        model: A neutral graph, changed in place.
        lower: Layer name -> function of a tape and the layer's input that gives its output.
    """
    from onnx_ir import convenience
    from onnx_ir.tape import Tape

    nodes = layer_nodes(model)
    model.metadata_props[LAYER_INPUTS] = json.dumps({name: node.inputs[0].name for name, node in nodes.items()})
    model.metadata_props[LAYER_OUTPUTS] = json.dumps({name: node.outputs[0].name for name, node in nodes.items()})
    for name, node in nodes.items():
        old, tape = node.outputs[0], Tape()
        new = lower[name](tape, node.inputs[0])
        label = old.name
        for initializer in tape.initializers:
            model.graph.register_initializer(initializer)
        convenience.replace_nodes_and_values(model.graph, node, [node], list(tape.nodes), [old], [new])
        new.name = label
    model.graph.sort()


def store_floats_(model: Any, float_dtype: FloatDtype) -> None:
    """Stores floats that are not scales in another precision, widened again where they are used.

    Args:
        model: A lowered graph; constants of a few elements that are no bias stay as they are.
        float_dtype: `float32` changes nothing.
    """
    import onnx_ir

    if float_dtype == "float32":
        return
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or name.endswith(("_scale", ".offset")):
            continue
        if tensor.size < _SMALL_TENSOR and not name.endswith(".bias"):
            continue
        rounded = torch.from_numpy(tensor.numpy().copy()).to(torch.bfloat16).view(torch.int16).numpy()
        stored = onnx_ir.Value(name=f"{name}.bfloat16")
        stored.const_value = onnx_ir.tensor(
            rounded.view(onnx_ir.DataType.BFLOAT16.numpy()), dtype=onnx_ir.DataType.BFLOAT16, name=stored.name
        )
        cast = onnx_ir.node("Cast", [stored], attributes={"to": int(onnx_ir.DataType.FLOAT)})
        cast.outputs[0].dtype, cast.outputs[0].shape = tensor.dtype, tensor.shape
        model.graph.register_initializer(stored)
        model.graph.insert_before(model.graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
        del model.graph.initializers[name]
        cast.outputs[0].name = name


def save(model: Any, path: Path) -> None:
    """Writes a graph; weights of more than a gigabyte go into a file beside it."""
    import onnx_ir

    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if num_bytes > _INLINE_BYTES:
        onnx_ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=_SMALL_TENSOR)
    else:
        onnx_ir.save(model, path)
