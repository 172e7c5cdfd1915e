"""The codes of a layer's input, made once for all layers that share it.

Shape suffixes: M tokens, K input channels.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fraqat.kernels import quantize_tokens, row_blocks
from fraqat.nn.quantizers import ActivationQuantizer
from fraqat.numerics import Granularity, QParams, RangeMethod, clamp_codes, round_to_codes

_MEASURED_BY_ROWS = (RangeMethod.MAX_ABS, RangeMethod.MIN_MAX)
"""Ranges that are the same to the last bit whatever rows are measured together; a mean is not."""


class InputCodes(NamedTuple):
    """A quantized input, its features on the last axis.

    Args:
        codes_MK: int8, or uint8 with a zero point.
        token_scale: float32, [M], or [1] where all tokens share it.
        zero_point: int32, 0-dim, or None.
        inside: One bit per element, [M, ceil(K / 8)] uint8: which values were not clipped. None where none can be.
    """

    codes_MK: Tensor
    token_scale: Tensor
    zero_point: Tensor | None
    inside: Tensor | None


class SharedInput:
    """The input that was quantized last, so that query, key and value quantize theirs once."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._source: weakref.ref[Tensor] | None = None
        self._codes: InputCodes | None = None

    def get(self, x: Tensor, quantizer: ActivationQuantizer) -> InputCodes | None:
        """What the same values were quantized to with the same settings, or None."""
        if self._source is None or self._source() is not x or self._key != _input_key(x, quantizer):
            return None
        return self._codes

    def put(self, x: Tensor, quantizer: ActivationQuantizer, codes: InputCodes) -> None:
        """Remembers a quantized input until the next one."""
        self._source, self._key, self._codes = weakref.ref(x, self._forget), _input_key(x, quantizer), codes

    def _forget(self, _: object = None) -> None:
        self._key, self._source, self._codes = None, None, None


def quantize_input(x: Tensor, quantizer: ActivationQuantizer) -> InputCodes:
    """Codes of x, features last.

    Args:
        x: [..., K], or [N, K, H, W] where the quantizer's channel axis is 1.
        quantizer: Decides scale, zero point and codes.

    Numerics: bit for bit the codes and scales of the quantizer's floating-point path.
    """
    axis = quantizer.layout.channel_axis
    if quantizer.is_plain and x.dtype != torch.float64:
        codes_MK, token_scale = quantize_tokens(x.movedim(axis, -1).flatten(0, -2).contiguous())
        return InputCodes(codes_MK, token_scale, None, None)
    x_MK = x.movedim(axis, -1).flatten(0, -2)
    num_tokens, num_inputs = x_MK.shape
    blocks = row_blocks(num_tokens, 4 * num_inputs, x.device)
    if len(blocks) == 1:
        qparams = quantizer.qparams(x)
        return _encode(x_MK, _token_scale(qparams.scale, x, axis), qparams.zero_point, quantizer)
    return _encode_in_blocks(x, x_MK, blocks, quantizer)


def _encode_in_blocks(x: Tensor, x_MK: Tensor, blocks: list[slice], quantizer: ActivationQuantizer) -> InputCodes:
    """`quantize_input` of x, whose rows are x_MK, with temporaries of one block alone."""
    spec, (num_tokens, num_inputs) = quantizer.spec, x_MK.shape
    is_measured_by_rows = spec.granularity is Granularity.TOKEN and spec.range_method in _MEASURED_BY_ROWS
    token_scale, zero_point = x.new_empty(num_tokens, dtype=torch.float32), None
    if not is_measured_by_rows:
        qparams = quantizer.qparams(x)
        token_scale, zero_point = _token_scale(qparams.scale, x, quantizer.layout.channel_axis), qparams.zero_point
    codes_MK = x.new_empty((num_tokens, num_inputs), dtype=_code_dtype(quantizer))
    inside = x.new_empty((num_tokens, -(-num_inputs // 8)), dtype=torch.uint8) if quantizer.can_clip else None
    for rows in blocks:
        if is_measured_by_rows:
            token_scale[rows] = quantizer.qparams(x_MK[rows]).scale.flatten()
        scale = token_scale if len(token_scale) == 1 else token_scale[rows]
        part = _encode(x_MK[rows], scale, zero_point, quantizer)
        codes_MK[rows] = part.codes_MK
        if inside is not None and part.inside is not None:
            inside[rows] = part.inside
    return InputCodes(codes_MK, token_scale, _integer_zero_point(zero_point), inside)


def _encode(x_MK: Tensor, token_scale: Tensor, zero_point: Tensor | None, quantizer: ActivationQuantizer) -> InputCodes:
    rounded = round_to_codes(x_MK.float(), QParams(token_scale.unsqueeze(-1), zero_point))
    codes, inside = rounded, None
    if quantizer.can_clip:
        codes = clamp_codes(rounded, quantizer.grid)
        inside = _pack_bits(codes == rounded)
    codes_MK = codes.to(_code_dtype(quantizer)).contiguous()
    return InputCodes(codes_MK, token_scale, _integer_zero_point(zero_point), inside)


def _code_dtype(quantizer: ActivationQuantizer) -> torch.dtype:
    return torch.int8 if quantizer.grid.qmin < 0 else torch.uint8


def _integer_zero_point(zero_point: Tensor | None) -> Tensor | None:
    return None if zero_point is None else zero_point.reshape(()).to(torch.int32)


def _token_scale(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    if scale.numel() == 1:
        return scale.reshape(1)
    return scale.movedim(axis, -1).expand(*x.movedim(axis, -1).shape[:-1], 1).flatten()


def _pack_bits(flags_MK: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(flags_MK.to(torch.uint8), (0, -flags_MK.shape[1] % 8))
    place = 2 ** torch.arange(8, dtype=torch.uint8, device=flags_MK.device)
    return (padded.unflatten(1, (-1, 8)) * place).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """The bits of `InputCodes.inside`, [M, width], as 0 and 1 in uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :width]


def _input_key(x: Tensor, quantizer: ActivationQuantizer) -> tuple[Any, ...]:
    scale, zero_point = quantizer.scale, quantizer.zero_point
    static = () if scale is None else (id(scale), scale._version, id(zero_point))
    return x._version, quantizer.spec, quantizer.layout, *static
