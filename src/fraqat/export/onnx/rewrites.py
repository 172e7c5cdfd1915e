"""Rewrites of a float graph with fixed shapes into the operators of the Qualcomm HTP, each exact but for float rounding.

What the HTP's compiler refused or computed poorly when it was tried: Einsum, tensors of more than 5 axes, a constant times a
tensor, a product with a reciprocal (coarse: the reciprocal needs a range of its own), and a tensor that holds sums and sums of
products side by side, as linear attention has them, because both then share one range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.tape import Tape

Value = ir.Value
_MAX_RANK = 5
_SQUARE = 2.0


def rewrite_(model: ir.Model) -> None:
    """Applies all rewrites until none applies."""
    for rule in _RULES:
        changed = True
        while changed:
            applied = [_apply(model, node, rule) for node in tuple(model.graph)]
            changed = any(applied)
        model.graph.sort()


class Site:
    """Builds the replacement of one node.

    Args:
        node: What is replaced.
    """

    def __init__(self, node: ir.Node):
        self.node, self.tape = node, Tape()
        self._label = str(node.outputs[0].name)
        self._num_constants = 0

    def __call__(self, op_type: str, *inputs: Value | None, shape: tuple[int, ...], **attributes: Any) -> Value:
        """One operator with one float output of a known shape."""
        value = self.tape.op(op_type, inputs, attributes)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        return value

    def constant(self, array: np.ndarray[Any, Any]) -> Value:
        """An initializer."""
        graph = self.node.graph
        assert graph is not None
        self._num_constants += 1
        while f"{self._label}.constant_{self._num_constants}" in graph.initializers:
            self._num_constants += 1
        return self.tape.initializer(ir.tensor(array), f"{self._label}.constant_{self._num_constants}")

    def reshape(self, x: Value, shape: tuple[int, ...]) -> Value:
        """`Reshape`, or nothing where the shape is that already."""
        if sizes(x) == shape:
            return x
        return self("Reshape", x, self.constant(np.array(shape, np.int64)), shape=shape)


Rule = Callable[[Site], Value | None]


def sizes(x: Value) -> tuple[int, ...]:
    """The fixed shape of a value."""
    assert x.shape is not None, f"the shape of {x.name} is not known"
    return tuple(int(size) for size in x.shape)  # pyright: ignore[reportArgumentType]


def _apply(model: ir.Model, node: ir.Node, rule: Rule) -> bool:
    if node.graph is None:
        return False
    site = Site(node)
    new = rule(site)
    if new is None:
        return False
    old = node.outputs[0]
    name = str(old.name)
    for initializer in site.tape.initializers:
        model.graph.register_initializer(initializer)
    if new.producer() is None or new.producer() not in site.tape.nodes:  # an existing value stands for it
        site.tape.op("Identity", [new])
        identity = site.tape.nodes[-1]
        new = identity.outputs[0]
        new.shape, new.type = old.shape, old.type
    convenience.replace_nodes_and_values(model.graph, node, [node], list(site.tape.nodes), [old], [new])
    new.name = name
    return True


def _array(value: Value | None) -> np.ndarray[Any, Any] | None:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def _ints(value: Value | None) -> list[int]:
    array = _array(value)
    assert array is not None
    return [int(item) for item in array.flatten()]


def _drop_identity(site: Site) -> Value | None:
    """Identity is nothing, but where it names a layer's input or a graph's output."""
    node = site.node
    x = node.inputs[0]
    is_named = str(node.outputs[0].name).endswith(".input") or node.outputs[0].is_graph_output()
    if node.op_type not in ("Identity", "Cast") or is_named or x is None:
        return None
    if node.op_type == "Cast" and x.dtype != node.outputs[0].dtype:
        return None
    convenience.replace_all_uses_with(node.outputs[0], x)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return None


def _as_reshape(site: Site) -> Value | None:
    """Squeeze, Unsqueeze and Flatten only change the shape."""
    node = site.node
    x = node.inputs[0]
    if node.op_type not in ("Squeeze", "Unsqueeze", "Flatten") or x is None or x.is_initializer():
        return None
    shape = sizes(node.outputs[0])
    return site("Reshape", x, site.constant(np.array(shape, np.int64)), shape=shape)


def _fixed_shape(site: Site) -> Value | None:
    """A Reshape names its sizes."""
    node = site.node
    x = node.inputs[0]
    if node.op_type != "Reshape" or x is None:
        return None
    shape = sizes(node.outputs[0])
    if _ints(node.inputs[1]) == list(shape):
        return None
    return site("Reshape", x, site.constant(np.array(shape, np.int64)), shape=shape)


def _einsum(site: Site) -> Value | None:
    """An Einsum of one tensor that only moves axes is a Transpose."""
    node = site.node
    if node.op_type != "Einsum" or len(node.inputs) != 1:
        return None
    before, after = node.attributes["equation"].as_string().replace(" ", "").split("->")
    if sorted(before) != sorted(after):
        return None
    perm = tuple(before.index(letter) for letter in after)
    return site("Transpose", node.inputs[0], shape=sizes(node.outputs[0]), perm=perm)


def _many_axes(site: Site) -> Value | None:
    """A Transpose of more than 5 axes, some of size 1, is one of fewer."""
    node = site.node
    x = node.inputs[0]
    if node.op_type != "Transpose" or x is None or len(sizes(x)) <= _MAX_RANK:
        return None
    shape, perm = sizes(x), list(node.attributes["perm"].as_ints())
    kept = [axis for axis, size in enumerate(shape) if size != 1]
    if len(kept) > _MAX_RANK:
        return None  # the compiler will refuse it by name
    order = [kept.index(axis) for axis in perm if axis in kept]
    small = site.reshape(x, tuple(shape[axis] for axis in kept))
    moved = site("Transpose", small, shape=tuple(shape[kept[i]] for i in order), perm=tuple(order))
    return site.reshape(moved, sizes(node.outputs[0]))


def _two_reshapes(site: Site) -> Value | None:
    """Of two in a row the second is enough."""
    node = site.node
    x = node.inputs[0]
    first = None if x is None else x.producer()
    if node.op_type != "Reshape" or first is None or first.op_type != "Reshape" or x is None:
        return None
    if str(x.name).endswith(".input") or first.inputs[0] is None:
        return None
    shape = sizes(node.outputs[0])
    return site("Reshape", first.inputs[0], site.constant(np.array(shape, np.int64)), shape=shape)


def _division(site: Site) -> Value | None:
    """x * (1 / s) = x / s."""
    node = site.node
    if node.op_type != "Mul":
        return None
    for x, y in (node.inputs, reversed(node.inputs)):
        producer = None if y is None else y.producer()
        if producer is not None and producer.op_type == "Reciprocal":
            return site("Div", x, producer.inputs[0], shape=sizes(node.outputs[0]))
    return None


def _square(site: Site) -> Value | None:
    """x ** 2 = x * x."""
    node = site.node
    exponent = _array(node.inputs[1]) if node.op_type == "Pow" else None
    if exponent is None or exponent.size != 1 or float(exponent.reshape(())) != _SQUARE:
        return None
    return site("Mul", node.inputs[0], node.inputs[0], shape=sizes(node.outputs[0]))


def _pad(site: Site) -> Value | None:
    """A padding of one axis by a number is a Concat."""
    node = site.node
    if node.op_type != "Pad" or node.attributes["mode"].as_string() != "constant":
        return None
    x, pads = node.inputs[0], _ints(node.inputs[1])
    assert x is not None
    rank = len(sizes(x))
    padded = [axis for axis in range(rank) if pads[axis] or pads[axis + rank]]
    if (len(node.inputs) > 3 and node.inputs[3] is not None) or len(padded) != 1:
        return None
    (axis,) = padded
    number = _array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(())
    assert number is not None

    def filled(count: int) -> tuple[Value, ...]:
        shape = (*sizes(x)[:axis], count, *sizes(x)[axis + 1 :])
        return (site.constant(np.full(shape, number, np.float32)),) if count else ()

    pieces = (*filled(pads[axis]), x, *filled(pads[axis + rank]))
    return site("Concat", *pieces, shape=sizes(node.outputs[0]), axis=axis)


def _slice_of(node: ir.Node) -> tuple[int, int, int] | None:
    """Axis, start and end of a Slice of one axis without steps."""
    if node.op_type != "Slice" or len(node.inputs) < 4 or node.inputs[0] is None:
        return None
    starts, ends, axes = (_ints(value) for value in node.inputs[1:4])
    steps = _ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if len(axes) != 1 or steps != [1]:
        return None
    shape = sizes(node.inputs[0])
    axis = axes[0] % len(shape)
    start, end, _ = slice(starts[0], ends[0]).indices(shape[axis])
    return axis, start, end


def _slice_of_matmul(site: Site) -> Value | None:
    """Some rows of A B are those rows of A, times B."""
    place, x = _slice_of(site.node), site.node.inputs[0]
    product = None if x is None else x.producer()
    if place is None or product is None or product.op_type != "MatMul":
        return None
    axis, start, end = place
    a, b = product.inputs
    assert a is not None and b is not None
    if axis != len(sizes(site.node.outputs[0])) - 2 or len(sizes(a)) <= axis or a.is_initializer():
        return None
    shape = (*sizes(a)[:axis], end - start, *sizes(a)[axis + 1 :])
    ends = [site.constant(np.array([number], np.int64)) for number in (start, end, axis)]
    rows = site("Slice", a, *ends, shape=shape)
    return site("MatMul", rows, b, shape=sizes(site.node.outputs[0]))


def _row_of_ones(site: Site) -> Value | None:
    """A row of ones times B is the sum of B's rows."""
    node = site.node
    ones = _array(node.inputs[0]) if node.op_type == "MatMul" else None
    if ones is None or ones.ndim < 2 or ones.shape[-2] != 1 or not bool((ones == 1).all()):
        return None
    axis = len(sizes(node.outputs[0])) - 2
    axes = site.constant(np.array([axis], np.int64))
    return site("ReduceSum", node.inputs[1], axes, shape=sizes(node.outputs[0]), keepdims=1)


def _slice_of_concat(site: Site) -> Value | None:
    """A Slice at the seams of a Concat is one of its inputs."""
    place, x = _slice_of(site.node), site.node.inputs[0]
    joined = None if x is None else x.producer()
    if place is None or joined is None or joined.op_type != "Concat" or x is None:
        return None
    axis, start, end = place
    if joined.attributes["axis"].as_int() % len(sizes(x)) != axis:
        return None
    seam = 0
    for piece in joined.inputs:
        assert piece is not None
        size = sizes(piece)[axis]
        if (seam, seam + size) == (start, end):
            return piece
        seam += size
    return None


_RULES: tuple[Rule, ...] = (
    _drop_identity,
    _as_reshape,
    _einsum,
    _many_axes,
    _fixed_shape,
    _two_reshapes,
    _division,
    _square,
    _pad,
    _slice_of_matmul,
    _slice_of_concat,
    _drop_identity,
    _row_of_ones,
)
