"""The integer path of a quantized layer: y from int8 codes, gradients from the same codes.

Shape suffixes: M tokens, K input channels, O output channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.kernels import (
    EngineTable,
    PreparedWeight,
    centred_codes,
    has_native_gradients,
    input_gradient,
    quantize_stochastic,
    quantize_weight,
    scaled_product,
    weight_gradient,
)
from fraqat.nn.adapters import LowRankAdapter
from fraqat.nn.input_codes import InputCodes, SharedInput, quantize_input, unpack_bits
from fraqat.nn.quantizers import ActivationQuantizer, KeepsBufferDtype, WeightQuantizer
from fraqat.nn.spec import QuantSpec
from fraqat.numerics import Granularity, ZeroPoint

WIDEST_BITS = 8.0
"""Above it codes do not fit in int8."""
_DTYPES = (torch.float32, torch.bfloat16)


def why_not_integer(spec: QuantSpec) -> str:
    """Why a layer quantized so cannot be an integer product; empty if it can."""
    weight, activation = spec.weight, spec.activation
    if activation is None:
        return "inputs stay in floating point"
    if activation.bits > WIDEST_BITS:
        return f"{activation.bits:g}-bit inputs"
    if weight.bits > WIDEST_BITS:
        return f"{weight.bits:g}-bit weights"
    if not weight.symmetric:
        return "weights with an offset (Eq. 2)"
    if weight.granularity is Granularity.GROUP and weight.group_scale == "float":
        return "float scales per group"
    if not activation.symmetric and not activation.static:
        is_real = activation.zero_point is ZeroPoint.FLOAT
        return "dynamic inputs with an offset (Eq. 2)" if is_real else "dynamic inputs with a zero point per token"
    return ""


class IntegerWeight(KeepsBufferDtype):
    """The codes of a layer's weight, made once per change of the weight and used by every product until the next.

    Buffers, none of them saved: `codes` int8 [O, K] (code * multiplier where group scales are integers), `scale` float32 [O],
    `row_sums` int32 [O], `handle` int64 0-dim; `transposed_codes` [K, O] and `transposed_handle` for integer input gradients.

    Args:
        table: Chooses the engine.
        inputs: Shared by all layers of the model.
        weight: [O, K] or [O, K, 1, 1].
        has_integer_gradient: Whether the gradient of the input is an integer product too.
        codes: int8 [O, K] that are kept anyway (a packed layer's), to be used instead of a copy.

    Attributes:
        is_current: Whether the codes are those of the weight. Where processes hold rows of a weight each, they are not from a
            change of the weight until it is gathered, which is when its layer is used next.
    """

    codes: Tensor
    scale: Tensor
    row_sums: Tensor
    handle: Tensor
    transposed_codes: Tensor | None
    transposed_handle: Tensor | None

    def __init__(
        self,
        table: EngineTable,
        inputs: SharedInput,
        weight: Tensor,
        *,
        has_integer_gradient: bool = False,
        codes: Tensor | None = None,
    ):
        super().__init__()
        self.is_current = True
        self.inputs = inputs
        self.prepared = PreparedWeight(table)
        self.has_native_gradients = has_native_gradients(weight.device)
        shape, device = weight.flatten(1).shape, weight.device
        codes = torch.zeros(shape, dtype=torch.int8, device=device) if codes is None else codes
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", torch.ones(shape[0], device=device), persistent=False)
        self.register_buffer("row_sums", torch.zeros(shape[0], dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("handle", self.prepared.handle, persistent=False)
        self.transposed = PreparedWeight(table) if has_integer_gradient else None
        transposed = torch.zeros(shape[::-1], dtype=torch.int8, device=device) if has_integer_gradient else None
        self.register_buffer("transposed_codes", transposed, persistent=False)
        transposed_handle = None if self.transposed is None else self.transposed.handle
        self.register_buffer("transposed_handle", transposed_handle, persistent=False)

    @torch.no_grad()
    def set_(self, codes: Tensor, scale: Tensor) -> None:
        """Takes new codes in.

        Args:
            codes: Integers within int8, of the weight's shape.
            scale: One per output channel, or one for all.
        """
        if codes.data_ptr() != self.codes.data_ptr():
            self.codes.copy_(codes.flatten(1))
        self.scale.copy_(scale.flatten())
        self.is_current = True
        torch.sum(self.codes, 1, dtype=torch.int32, out=self.row_sums)
        self.prepared.renew()
        self._transpose_()

    def _transpose_(self) -> None:
        if self.transposed_codes is not None and self.transposed is not None:
            self.transposed_codes.copy_(self.codes.t())
            self.transposed.renew()

    def _refresh_in_one_pass_(self, quantizer: WeightQuantizer, weight: Tensor) -> bool:
        weight_OK = weight.detach().flatten(1)
        grid, divisor = quantizer.grid, quantizer.max_abs_divisor
        if divisor is None:
            self.scale.copy_(quantizer.qparams(weight).scale.flatten())
        return quantize_weight(
            weight_OK,
            self.scale,
            grid.qmin,
            grid.qmax,
            self.codes,
            self.row_sums,
            self.prepared,
            divisor=divisor,
        )

    def refresh_(self, quantizer: WeightQuantizer, weight: Tensor) -> None:
        """Quantizes the weight anew, at its current width."""
        self.is_current = True
        if quantizer.layout.group_size is None and self._refresh_in_one_pass_(quantizer, weight):
            self._transpose_()
            return
        self.set_(*quantizer.unchecked_codes(weight))


class HasIntegerPath(nn.Module):
    """What layers with codes share, in training and in inference."""

    activation_quantizer: ActivationQuantizer | None
    integer: IntegerWeight | None

    def renew_codes_(self) -> None:
        """Makes the codes of a weight that has changed since; called in the forward pass, where the weight is whole."""
        raise RuntimeError(f"the codes of a {type(self).__name__} are not those of its weight")

    def integer_product(
        self, x: Tensor, bias: Tensor | None, weight: Tensor | None = None, adapter: LowRankAdapter | None = None
    ) -> Tensor | None:
        """The layer's output by its integer codes, or None where the floating-point path must run; see `integer_linear`."""
        dtype = integer_dtype(x, self.integer, self.activation_quantizer)
        if dtype is None or self.integer is None or self.activation_quantizer is None:
            return None
        if not self.integer.is_current:
            self.renew_codes_()
        return integer_linear(x, weight, bias, self.activation_quantizer, self.integer, dtype, adapter)


def integer_dtype(
    x: Tensor, integer: IntegerWeight | None, activation: ActivationQuantizer | None
) -> torch.dtype | None:
    """The dtype that a linear layer gives for `x`, or None where the floating-point path must run.

    It runs where the layer has no codes, its input is not quantized now (calibration), or the dtype has no integer path.
    """
    if integer is None or activation is None or activation.is_passive:
        return None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype if dtype in _DTYPES and x.dtype is not torch.float64 else None


def integer_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: ActivationQuantizer,
    integer: IntegerWeight,
    out_dtype: torch.dtype,
    adapter: LowRankAdapter | None = None,
) -> Tensor:
    """y = (scales) * (codes of x) @ (codes of W)^T + bias, the sum exact.

    Args:
        x: [..., K], or [N, K, H, W] where the quantizer's channel axis is 1.
        weight: Master weight [O, K] (or [O, K, 1, 1]): receives the gradient of the quantized weight straight through; the
            rest is done once per step (`IntegerLayers.finish_gradients_`). None where nothing is trained.
        bias: [O] or None.
        activation: Quantizer of x.
        integer: Codes of the weight.
        out_dtype: Of y: float32 or bfloat16.
        adapter: Receives the gradient in place of the weight, without the mask of clipped weights and without a dense
            gradient ever being formed.

    Returns:
        [..., O], or [N, O, H, W].

    Gradient: to x and to the weight by products in `out_dtype` with the codes that the forward pass used, which are what is
        kept for backward: 1 byte per element of x, and 1/8 more where x can be clipped.

    Numerics: codes and scales are those of the floating-point path, bit for bit. The sum is exact, then scaled in float32
        and rounded once; the floating-point path rounds its operands to the compute dtype first.
    """
    if x.ndim == 1:
        return integer_linear(x.unsqueeze(0), weight, bias, activation, integer, out_dtype, adapter).squeeze(0)
    axis = activation.layout.channel_axis % x.ndim
    codes = _quantize_shared(x, activation, integer.inputs)
    row_sums = None if codes.zero_point is None else integer.row_sums
    up_OR, down_RK = (None, None) if adapter is None else (adapter.up, adapter.down)
    seed = None
    if integer.transposed_handle is not None and torch.is_grad_enabled():
        seed = torch.randint(2**31, ())  # of the default generator, whose state a checkpoint holds
    y_MO = _IntegerLinear.apply(
        x,
        weight,
        bias,
        up_OR,
        down_RK,
        *codes,
        integer.codes,
        integer.scale,
        row_sums,
        integer.handle,
        integer.transposed_codes,
        integer.transposed_handle,
        seed,
        axis,
        out_dtype,
        integer.has_native_gradients,
    )
    lead = [size for index, size in enumerate(x.shape) if index != axis]
    return cast(Tensor, y_MO).view(*lead, integer.codes.shape[0]).movedim(-1, axis)


def _quantize_shared(x: Tensor, quantizer: ActivationQuantizer, inputs: SharedInput) -> InputCodes:
    # A compiler merges equal subexpressions itself, and cannot trace weak references.
    if torch.compiler.is_compiling() or x.is_inference():
        return quantize_input(x.detach(), quantizer)
    codes = inputs.get(x, quantizer)
    if codes is None:
        codes = quantize_input(x.detach(), quantizer)
        inputs.put(x, quantizer, codes)
    return codes


class _IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        up_OR: Tensor | None,
        down_RK: Tensor | None,
        codes_MK: Tensor,
        token_scale: Tensor,
        zero_point: Tensor | None,
        inside: Tensor | None,
        codes_OK: Tensor,
        scale_O: Tensor,
        row_sums_O: Tensor | None,
        handle: Tensor,
        codes_KO: Tensor | None,
        transposed_handle: Tensor | None,
        seed: Tensor | None,
        axis: int,
        out_dtype: torch.dtype,
        is_native: bool,
    ) -> Tensor:
        ctx.is_native = is_native
        ctx.x_shape, ctx.x_dtype, ctx.axis, ctx.dtype = x.shape, x.dtype, axis, out_dtype
        ctx.weight_shape, ctx.weight_dtype = (None, None) if weight is None else (weight.shape, weight.dtype)
        ctx.save_for_backward(
            codes_MK,
            token_scale,
            zero_point,
            inside,
            codes_OK,
            scale_O,
            up_OR,
            down_RK,
            codes_KO,
            transposed_handle,
            seed,
        )
        bias_O = None if bias is None else bias.float()
        return scaled_product(
            codes_MK, token_scale, codes_OK, scale_O, zero_point, row_sums_O, bias_O, handle, out_dtype
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        codes_MK, token_scale, zero_point, inside, codes_OK, scale_O, up_OR, down_RK, *transposed = ctx.saved_tensors
        (grad_MO,) = grad_outputs
        grad_x = grad_weight = grad_bias = grad_up = grad_down = None
        if ctx.needs_input_grad[0]:
            grad_MK = _input_gradient(grad_MO, scale_O, codes_OK, transposed, ctx.dtype, ctx.is_native)
            if inside is not None:
                grad_MK = grad_MK * unpack_bits(inside, grad_MK.shape[1])
            lead = [size for index, size in enumerate(ctx.x_shape) if index != ctx.axis]
            grad_x = grad_MK.view(*lead, grad_MK.shape[1]).movedim(-1, ctx.axis).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_OK = weight_gradient(
                grad_MO, token_scale, codes_MK, zero_point, ctx.dtype, ctx.weight_dtype, is_native=ctx.is_native
            )
            grad_weight = grad_OK.view(ctx.weight_shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_MO.sum(0, dtype=torch.float32)
        if up_OR is not None:
            scaled_MO = (grad_MO * token_scale.unsqueeze(-1)).to(ctx.dtype)
            values_MK = centred_codes(codes_MK, zero_point, ctx.dtype)
            grad_up = (scaled_MO.t() @ (values_MK @ down_RK.to(ctx.dtype).t())).to(up_OR.dtype)
            grad_down = ((scaled_MO @ up_OR.to(ctx.dtype)).t() @ values_MK).to(down_RK.dtype)
        return grad_x, grad_weight, grad_bias, grad_up, grad_down, *([None] * 14)


def _input_gradient(
    grad_MO: Tensor,
    scale_O: Tensor,
    codes_OK: Tensor,
    transposed: list[Tensor | None],
    dtype: torch.dtype,
    is_native: bool,
) -> Tensor:
    codes_KO, transposed_handle, seed = transposed
    if codes_KO is None or transposed_handle is None or seed is None:
        return input_gradient(grad_MO, scale_O, codes_OK, dtype, is_native=is_native)
    codes_MO, scale_M = quantize_stochastic((grad_MO * scale_O).contiguous(), seed)
    ones_K = torch.ones_like(codes_KO[:, 0], dtype=torch.float32)
    return scaled_product(codes_MO, scale_M, codes_KO, ones_K, None, None, None, transposed_handle, dtype)
