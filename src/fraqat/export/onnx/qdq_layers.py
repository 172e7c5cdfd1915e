"""A quantized layer between QDQ pairs: codes, scales, zero points and the int32 bias as ONNX constants.

Shape suffixes: K input channels, O output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from fraqat.errors import config_error
from fraqat.export.codes import LayerCodes
from fraqat.export.onnx.layers import Ops, Value
from fraqat.numerics import Granularity

_INT32_MAX = 2**31 - 1
_EMPTY_ROW_STEPS = 2**20
_SMALL_BITS = 4
_BYTE_BITS = 8


@dataclass(frozen=True)
class Accumulator:
    """The scales of a layer's integer sums, and its bias as one of them.

    Args:
        weight_scale_O: float32. Rows of zeros get a scale that suits their bias: any is exact.
        scale_O: s_x * s_w, float32.
        bias_O: int32 codes at `scale_O`, or None.
    """

    weight_scale_O: Tensor
    scale_O: Tensor
    bias_O: Tensor | None


def accumulator(layer: LayerCodes) -> Accumulator:
    """The scales of the integer sums of a layer with one scale per output channel and a static input.

    Raises:
        ConfigError: The bias is more than 2^31 steps of the accumulator.
    """
    assert layer.activation is not None
    num_rows = layer.codes.shape[0]
    weight_scale_O = layer.qparams.scale.float().flatten().expand(num_rows).clone()
    input_scale = layer.activation.scale.float().flatten()
    if layer.bias is None:
        return Accumulator(weight_scale_O, input_scale * weight_scale_O, None)
    is_empty = (layer.matrix == 0).all(dim=1)
    fitting = layer.bias.abs().clamp(min=1e-6) / (input_scale * _EMPTY_ROW_STEPS)
    weight_scale_O = torch.where(is_empty, fitting, weight_scale_O)
    scale_O = input_scale * weight_scale_O
    bias_O = torch.round(layer.bias.double() / scale_O.double())
    if bool((bias_O.abs() > _INT32_MAX).any()):
        raise config_error(
            f"{layer.name}.bias",
            f"{float(layer.bias.abs().max()):g}",
            allowed="at most 2^31 steps of s_x * s_w",
            fix="calibrate with inputs that this layer sees, or keep it in floating point by a rule with skip: true",
        )
    return Accumulator(weight_scale_O, scale_O, bias_O.to(torch.int32))


def input_type(layer: LayerCodes) -> ir.DataType:
    """uint8, uint16, int8 or int16, by the grid of the layer's input."""
    activation = layer.spec.activation
    assert activation is not None
    is_signed, is_byte = activation.symmetric, activation.bits <= _BYTE_BITS
    if is_signed:
        return ir.DataType.INT8 if is_byte else ir.DataType.INT16
    return ir.DataType.UINT8 if is_byte else ir.DataType.UINT16


def quantized_input(ops: Ops, layer: LayerCodes, x: Value) -> Value:
    """The input on its grid: QuantizeLinear, DequantizeLinear."""
    assert layer.activation is not None
    zero_point = layer.activation.zero_point
    scale = ops.constant("input_scale", np.array(float(layer.activation.scale), np.float32))
    code = np.array(0 if zero_point is None else int(zero_point))
    zero = ops.constant("input_zero_point", code, input_type(layer))
    return ops("DequantizeLinear", ops("QuantizeLinear", x, scale, zero), scale, zero)


def code_type(layer: LayerCodes) -> ir.DataType:
    """INT4 where the codes fit."""
    return ir.DataType.INT4 if layer.grid.storage_bits <= _SMALL_BITS else ir.DataType.INT8


def quantized_weight(ops: Ops, layer: LayerCodes, codes: Tensor, scale_O: Tensor, axis: int) -> Value:
    """DequantizeLinear of the codes, one scale and one zero point (zero) per output channel.

    Args:
        ops: Takes the nodes.
        layer: Gives the type.
        codes: In the shape that the operator takes.
        scale_O: float32.
        axis: Of the output channels.
    """
    dtype = code_type(layer)
    stored = ops.constant("codes", codes.contiguous(), dtype)
    zero = ops.constant("weight_zero_point", np.zeros(len(scale_O)), dtype)
    return ops("DequantizeLinear", stored, ops.constant("weight_scale", scale_O.contiguous()), zero, axis=axis)


def quantized_bias(ops: Ops, sums: Accumulator) -> Value | None:
    """DequantizeLinear of the int32 bias."""
    if sums.bias_O is None:
        return None
    zero = ops.constant("bias_zero_point", np.zeros(len(sums.bias_O)), ir.DataType.INT32)
    scale = ops.constant("bias_scale", sums.scale_O.contiguous())
    return ops("DequantizeLinear", ops.constant("bias", sums.bias_O), scale, zero, axis=0)


def qdq_product(ops: Ops, layer: LayerCodes, node: Any, x: Value) -> Value:
    """The layer's output: MatMul and Add, or a 1x1 Conv.

    Args:
        ops: Takes the nodes.
        layer: Its input is static or in floating point.
        node: The `Layer` node, for its strides.
        x: [..., K], or [N, K, H, W] of a pointwise convolution.
    """
    given = x if layer.spec.activation is None else quantized_input(ops, layer, x)
    is_linear = layer.type_name == "Linear"
    stored_bias: Value | None = None
    if layer.spec.weight.granularity is Granularity.GROUP:
        weight = _blocked_weight(ops, layer, is_linear)
    else:
        sums = None if layer.activation is None else accumulator(layer)
        scale_O = layer.qparams.scale.float().flatten().expand(layer.codes.shape[0])
        if sums is not None:
            stored_bias, scale_O = quantized_bias(ops, sums), sums.weight_scale_O
        codes = layer.matrix.t() if is_linear else layer.codes
        weight = quantized_weight(ops, layer, codes, scale_O, axis=1 if is_linear else 0)
    if stored_bias is None and layer.bias is not None:
        stored_bias = ops.constant("bias", layer.bias)
    if not is_linear:
        inputs = (given, weight) if stored_bias is None else (given, weight, stored_bias)
        strides = tuple(node.attributes["strides"].as_ints())
        return ops("Conv", *inputs, kernel_shape=(1, 1), strides=strides)
    y = ops("MatMul", given, weight)
    return y if stored_bias is None else ops("Add", y, stored_bias)


def _blocked_weight(ops: Ops, layer: LayerCodes, is_linear: bool) -> Value:
    """float32 [K, O], or [O, K, 1, 1] of a convolution, from codes with a scale per block of input channels."""
    num_rows = layer.codes.shape[0]
    scale_GO = layer.qparams.scale.float().reshape(num_rows, -1).t().contiguous()
    dtype = code_type(layer)
    stored = ops.constant("codes", layer.matrix.t().contiguous(), dtype)
    zero = ops.constant("weight_zero_point", np.zeros(tuple(scale_GO.shape)), dtype)
    scale = ops.constant("weight_scale", scale_GO)
    weight_KO = ops("DequantizeLinear", stored, scale, zero, axis=0, block_size=layer.spec.weight.group_size)
    if is_linear and dtype is ir.DataType.INT4:
        return weight_KO
    # ONNX Runtime joins 8-bit weights that lie right before a MatMul to an integer product that knows no blocks
    shape = ops.constant("weight_shape", np.array(layer.matrix.t().shape if is_linear else layer.codes.shape, np.int64))
    return ops("Reshape", weight_KO if is_linear else ops("Transpose", weight_KO, perm=(1, 0)), shape)
