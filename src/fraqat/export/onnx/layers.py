"""What a quantized layer computes, as ONNX operators: the exact integer product, and a floating-point one for the rest.

Shape suffixes: K input channels, O output channels, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from fraqat.export.codes import LayerCodes
from fraqat.nn import ActivationSpec, why_not_integer
from fraqat.numerics import MIN_SCALE, Granularity, Grid, QParams, RangeMethod

Value = ir.Value
_CHANNELS_LAST, _CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_SIGMAS = 3.0
_INT8_MIN, _INT8_MAX, _UINT8_MAX = -128, 127, 255
_SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8, 16: ir.DataType.INT16, 32: ir.DataType.INT32}
_UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8, 16: ir.DataType.UINT16, 32: ir.DataType.UINT32}
_PAIR_LIMIT = 64
"""Largest signed weight code that x86 CPUs without VNNI multiply exactly: ONNX Runtime adds two products of an input (up to
255) in 16 bits there and cuts the sum off at 32767, in silence."""
RUNTIME_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Ops:
    """Builds operators on a tape, with constants named after a layer.

    Args:
        tape: Takes the nodes.
        layer: Its name.
        shared: Constants of the whole graph by name; query, key and value quantize their input in the same way, and only what
            has the same constants is computed once.
    """

    tape: Tape
    layer: str
    shared: dict[str, Value] = field(default_factory=dict[str, Value])

    def __call__(self, op_type: str, *inputs: Value | None, **attributes: Any) -> Value:
        """One operator with one output."""
        return self.tape.op(op_type, inputs, attributes)

    def runtime(self, op_type: str, *inputs: Value | None) -> Value:
        """One operator of ONNX Runtime's own domain."""
        return self.tape.op(op_type, inputs, domain=RUNTIME_DOMAIN, version=1)

    def constant(self, name: str, value: np.ndarray[Any, Any] | Tensor, dtype: ir.DataType | None = None) -> Value:
        """An initializer called `LAYER.name`."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        tensor = ir.tensor(array) if dtype is None else ir.tensor(array.astype(dtype.numpy()), dtype=dtype)
        return self.tape.initializer(tensor, f"{self.layer}.{name}")

    def common(self, array: np.ndarray[Any, Any]) -> Value:
        """A small constant that equals others of the graph."""
        name = f"constant.{array.dtype.name}.{'_'.join(str(item) for item in array.flatten().tolist())}.{array.ndim}"
        if name not in self.shared:
            self.shared[name] = self.tape.initializer(ir.tensor(array), name)
        return self.shared[name]

    def scalar(self, value: float) -> Value:
        """A float32 constant."""
        return self.common(np.array(value, np.float32))

    def axes(self, *values: int) -> Value:
        """An int64 vector."""
        return self.common(np.array(values, np.int64))

    def cast(self, x: Value, to: ir.DataType) -> Value:
        """`Cast`."""
        return self("Cast", x, to=int(to))


def around_rows(ops: Ops, layer: LayerCodes, node: Any, rows: Callable[[Ops, Value], Value], x: Value) -> Value:
    """Runs `rows`, which takes features on the last axis, on the input of a layer of either kind.

    Args:
        ops: Takes the nodes.
        layer: Gives the kind.
        node: The `Layer` node, for its strides.
        rows: x [..., K] -> y [..., O].
        x: [..., K], or [N, K, H, W] of a pointwise convolution.
    """
    if layer.type_name == "Linear":
        return rows(ops, x)
    x = _picture(ops("Transpose", _strided(ops, node, x), perm=_CHANNELS_LAST))
    return ops("Transpose", rows(ops, x), perm=_CHANNELS_FIRST)


def layer_output(ops: Ops, layer: LayerCodes, node: Any, x: Value) -> Value:
    """What a layer of either kind gives, with its bias: an integer product where the specification allows one.

    Args:
        ops: Takes the nodes.
        layer: Its integers.
        node: The `Layer` node.
        x: [..., K], or [N, K, H, W] of a pointwise convolution, whose codes are transposed instead of its floats.
    """
    is_integer = not why_not_integer(layer.spec) and layer.grid.storage_bits <= 8
    if not is_integer:
        return around_rows(ops, layer, node, lambda ops, y: _with_bias(ops, layer, _float_product(ops, layer, y)), x)
    if layer.type_name == "Linear":
        return _integer_product(ops, layer, x)
    y = _integer_product(ops, layer, _strided(ops, node, x), channels_first=True)
    return ops("Transpose", y, perm=_CHANNELS_FIRST)


def _strided(ops: Ops, node: Any, x: Value) -> Value:
    vertical, horizontal = node.attributes["strides"].as_ints()
    if (vertical, horizontal) == (1, 1):
        return x
    ends = ops.axes(np.iinfo(np.int64).max, np.iinfo(np.int64).max)
    steps = ops.axes(vertical, horizontal)
    return _picture(ops("Slice", x, ops.axes(0, 0), ends, ops.axes(2, 3), steps))


def _picture(x: Value) -> Value:
    """The same value with its rank, which scales per sample need."""
    x.shape = ir.Shape([None] * len(_CHANNELS_LAST))
    return x


def _with_bias(ops: Ops, layer: LayerCodes, y: Value) -> Value:
    return y if layer.bias is None else ops("Add", y, ops.constant("bias", layer.bias))


def _integer_product(ops: Ops, layer: LayerCodes, x: Value, *, channels_first: bool = False) -> Value:
    """(codes of x - zero point) @ codes of W in int32, times the scales, by ONNX Runtime's own operator.

    MatMulInteger, Cast and Mul of the standard give the same numbers at 1.4 times the time (benchmarks/onnx_latency.py), and
    signed inputs take a path without vector instructions: codes of a symmetric input are stored as uint8 with zero point 128.
    """
    activation = layer.spec.activation
    assert activation is not None
    groups = layer.groups
    scale_O = (layer.qparams.scale if groups is None else groups.channel).flatten().float()
    weight_scale = ops.constant("weight_scale", scale_O.expand(len(layer.matrix)).contiguous())
    weight, weight_zero_point = _product_weight(ops, layer)
    if layer.activation is not None:
        codes, scale, zero_point = _static_codes(ops, activation, layer.activation, x)
        if channels_first:
            codes = ops("Transpose", codes, perm=_CHANNELS_LAST)
        bias = None if layer.bias is None else ops.constant("bias", layer.bias)
        return ops.runtime(
            "MatMulIntegerToFloat", codes, weight, scale, weight_scale, zero_point, weight_zero_point, bias
        )
    codes, scale, zero_point = _dynamic_integers(ops, activation, x, axis=1 if channels_first else -1)
    if channels_first:
        codes, scale = (ops("Transpose", value, perm=_CHANNELS_LAST) for value in (codes, scale))
    y = ops.runtime("MatMulIntegerToFloat", codes, weight, ops.scalar(1.0), weight_scale, zero_point, weight_zero_point)
    return _with_bias(ops, layer, ops("Mul", y, scale))


def _dynamic_integers(ops: Ops, activation: ActivationSpec, x: Value, axis: int) -> tuple[Value, Value, Value]:
    """Codes of a symmetric input plus 128 as uint8, their scale, and the zero point 128."""
    grid = activation.grid()
    scaled, scale, _ = _scaled(ops, activation, x, axis)
    if (grid.qmin, grid.qmax) != (_INT8_MIN, _INT8_MAX):
        scaled = _rounded(ops, grid, scaled)
    zero_point = ops.common(np.array(-_INT8_MIN, np.uint8))
    return ops("QuantizeLinear", scaled, ops.scalar(1.0), zero_point), scale, zero_point


def _product_weight(ops: Ops, layer: LayerCodes) -> tuple[Value, Value | None]:
    """Weights as a product takes them, [K, O], and their zero point: uint8 around 128 where signed ones might be cut off."""
    weight = _integer_weight(ops, layer)
    largest = max(abs(layer.grid.qmin), abs(layer.grid.qmax))
    if layer.groups is not None:
        largest *= int(layer.groups.multiplier.max())
    if largest <= _PAIR_LIMIT:
        return weight, None
    shifted = ops("Add", ops.cast(weight, ir.DataType.INT32), ops.common(np.array(-_INT8_MIN, np.int32)))
    return ops.cast(shifted, ir.DataType.UINT8), ops.common(np.array(-_INT8_MIN, np.uint8))


def _integer_weight(ops: Ops, layer: LayerCodes) -> Value:
    """Integers within int8, [K, O]: the codes, times the multipliers of their groups where these are integers."""
    codes = stored_codes(ops, layer)
    if layer.groups is None:
        return codes if layer.grid.storage_bits > 4 else ops.cast(codes, ir.DataType.INT8)
    num_rows, num_columns = layer.matrix.shape
    num_groups = layer.groups.multiplier.shape[1]
    blocks = ops("Reshape", ops.cast(codes, ir.DataType.INT32), ops.axes(num_groups, -1, num_rows))
    multiplier = layer.groups.multiplier.reshape(num_rows, num_groups, 1).permute(1, 2, 0).to(torch.int32)
    multiplied = ops("Mul", blocks, ops.constant("multiplier", multiplier.contiguous()))
    return ops.cast(ops("Reshape", multiplied, ops.axes(num_columns, num_rows)), ir.DataType.INT8)


def stored_codes(ops: Ops, layer: LayerCodes) -> Value:
    """The codes as they lie in the file, [K, O]: INT4 where they fit, else INT8, INT16, INT32 (UINT4, ... on grids from 0)."""
    types = _SIGNED if layer.grid.qmin < 0 else _UNSIGNED
    dtype = next(dtype for num_bits, dtype in types.items() if layer.grid.storage_bits <= num_bits)
    return ops.constant("codes", layer.matrix.t().contiguous(), dtype)


def _float_product(ops: Ops, layer: LayerCodes, x: Value) -> Value:
    weight = dequantized_weight(ops, layer)
    return ops("MatMul", x if layer.spec.activation is None else _fake_quantized(ops, layer, x), weight)


def dequantized_weight(ops: Ops, layer: LayerCodes) -> Value:
    """scale * code (+ offset), float32 [K, O].

    Cast and Mul instead of DequantizeLinear: ONNX Runtime turns DequantizeLinear of INT4 and MatMul into a product that rounds
    the inputs to 8 bits on its own (49 dB on a 16-bit layer).
    """
    num_rows, num_columns = layer.matrix.shape
    scale, offset = layer.qparams.scale.float(), layer.qparams.offset
    weight = ops.cast(stored_codes(ops, layer), ir.DataType.FLOAT)
    if layer.spec.weight.granularity is not Granularity.GROUP:
        weight = ops("Mul", weight, ops.constant("weight_scale", scale.flatten()))
        return weight if offset is None else ops("Add", weight, ops.constant("offset", offset.float().flatten()))
    blocks = ops("Reshape", weight, ops.axes(scale.shape[1], -1, num_rows))
    blocks = ops("Mul", blocks, ops.constant("weight_scale", scale.permute(1, 2, 0).contiguous()))
    if offset is not None:
        blocks = ops("Add", blocks, ops.constant("offset", offset.float().permute(1, 2, 0).contiguous()))
    return ops("Reshape", blocks, ops.axes(num_columns, num_rows))


def _static_codes(ops: Ops, activation: ActivationSpec, qparams: QParams, x: Value) -> tuple[Value, Value, Value]:
    """Codes as uint8, scale and zero point of an input whose scale is fixed."""
    grid = activation.grid()
    scale = ops.scalar(float(qparams.scale))
    shift = -_INT8_MIN if qparams.zero_point is None else int(qparams.zero_point)
    zero_point = ops.common(np.array(shift, np.uint8))
    if (grid.qmin, grid.qmax) in ((_INT8_MIN, _INT8_MAX), (0, _UINT8_MAX)):
        return ops("QuantizeLinear", x, scale, zero_point), scale, zero_point
    codes = ops("Add", ops("Round", ops("Div", x, scale)), ops.scalar(float(shift)))
    added = shift if qparams.zero_point is None else 0
    low, high = ops.scalar(float(grid.qmin + added)), ops.scalar(float(grid.qmax + added))
    return ops.cast(ops("Clip", codes, low, high), ir.DataType.UINT8), scale, zero_point


def _dynamic_codes(ops: Ops, activation: ActivationSpec, x: Value) -> tuple[Value, Value, Value | None]:
    """Codes as floats, scale and offset (Eq. 2) of an input whose range is measured."""
    scaled, scale, offset = _scaled(ops, activation, x)
    return _rounded(ops, activation.grid(), scaled), scale, offset


def _scaled(ops: Ops, activation: ActivationSpec, x: Value, axis: int = -1) -> tuple[Value, Value, Value | None]:
    """(x - offset) / scale before it is rounded, scale and offset; see `fraqat.numerics.qparams`."""
    grid = activation.grid()
    low, high = _range(ops, activation, x, axis)
    smallest = ops.scalar(MIN_SCALE)
    divisor = ops.scalar(grid.range_divisor)
    if activation.symmetric:
        offset, width = None, high
    else:
        offset, width = low, ops("Sub", high, low)
    scale = ops("Div", width, divisor)
    if activation.rounding_dtype is not None:
        rounding = ir.DataType.BFLOAT16 if activation.scale_dtype == "bfloat16" else ir.DataType.FLOAT16
        scale = ops.cast(ops.cast(scale, rounding), ir.DataType.FLOAT)
    scale = ops("Max", scale, smallest)
    return ops("Div", x if offset is None else ops("Sub", x, offset), scale), scale, offset


def _range(ops: Ops, activation: ActivationSpec, x: Value, axis: int) -> tuple[Value, Value]:
    """The range [low, high] of every block; of a symmetric grid [-high, high]."""
    method = activation.range_method
    axes = {
        Granularity.TOKEN: lambda: ops.axes(axis),
        Granularity.SAMPLE: lambda: _axes_after_first(ops, x),
        Granularity.TENSOR: lambda: None,
    }[activation.granularity]()

    def over(op_type: str, value: Value) -> Value:
        return ops(op_type, value, axes, keepdims=1)

    if method is RangeMethod.MAX_ABS:
        high = over("ReduceMax", ops("Abs", x))
        return (high if activation.symmetric else ops("Neg", high)), high
    low, high = over("ReduceMin", x), over("ReduceMax", x)
    if method is RangeMethod.THREE_SIGMA:
        mean = over("ReduceMean", x)
        deviation = ops("Sub", x, mean)
        variance = over("ReduceMean", ops("Mul", deviation, deviation))
        margin = ops("Mul", ops("Sqrt", variance), ops.scalar(_SIGMAS))
        low, high = ops("Max", low, ops("Sub", mean, margin)), ops("Min", high, ops("Add", mean, margin))
    if activation.symmetric:
        high = ops("Max", ops("Neg", low), high)
    return low, high


def _axes_after_first(ops: Ops, x: Value) -> Value:
    rank = None if x.shape is None else len(x.shape)
    assert rank is not None, f"the rank of {x.name} is not known"
    return ops.axes(*range(1, rank))


def _rounded(ops: Ops, grid: Grid, x: Value) -> Value:
    return ops("Clip", ops("Round", x), ops.scalar(float(grid.qmin)), ops.scalar(float(grid.qmax)))


def _fake_quantized(ops: Ops, layer: LayerCodes, x: Value) -> Value:
    """The input on its grid, float32: for widths that no integer product takes."""
    activation = layer.spec.activation
    assert activation is not None
    if layer.activation is None:
        codes, scale, offset = _dynamic_codes(ops, activation, x)
        values = ops("Mul", codes, scale)
        return values if offset is None else ops("Add", values, offset)
    grid = activation.grid()
    scale = ops.scalar(float(layer.activation.scale))
    codes = ops("Div", x, scale)
    if layer.activation.zero_point is None:
        return ops("Mul", _rounded(ops, grid, codes), scale)
    zero_point = ops.scalar(float(layer.activation.zero_point))
    shifted = ops("Add", ops("Round", codes), zero_point)
    clipped = ops("Clip", shifted, ops.scalar(float(grid.qmin)), ops.scalar(float(grid.qmax)))
    return ops("Mul", ops("Sub", clipped, zero_point), scale)
