"""The engine that this package brings along: C++ kernels for CPUs with AMX, for the product, its quantizers and its gradients.

Shape suffixes: M tokens, K input channels, O output channels.
"""

from __future__ import annotations

import ctypes
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from fraqat.kernels.native_build import UnavailableError, built_library, cache_folder, check_cpu
from fraqat.kernels.product import Operands

_FLOATS = (torch.float32, torch.bfloat16)
_LANES, _DEPTH = 16, 64
_BUILD_LOCK = Lock()


class _Product(ctypes.Structure):
    """`Product` of the C++ source."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "packed", "weight_scale", "token_scale", "row_sums", "bias", "y")
        ),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_inputs", "num_outputs", "token_scale_stride")),
        *((name, ctypes.c_int32) for name in ("zero_point", "is_unsigned", "is_bfloat16", "num_threads")),
    )


class _GradientProduct(ctypes.Structure):
    """`GradientProduct` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "scale", "codes", "out", "bias")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_inputs", "num_outputs", "scale_stride")),
        *((name, ctypes.c_int32) for name in ("zero_point", "is_unsigned", "is_weight_gradient", "accumulates")),
        *((name, ctypes.c_int32) for name in ("grad_is_bfloat16", "out_is_bfloat16", "num_threads")),
    )


class Native:
    """Exact sums in AMX tiles; zero point, scales, bias and rounding while they are in the nearest cache."""

    name = "native"
    is_layout_cheap = False

    def why_unavailable(self, device: torch.device) -> str:
        """Runs on x86 CPUs with AMX under Linux where a C++ compiler is at hand; the first call builds the kernel."""
        if device.type != "cpu":
            return f"runs on cpu, not on {device.type}"
        return _library_or_reason()[1]

    def prepare(self, codes_OK: Tensor) -> Tensor:
        """The codes in tiles of 16 output channels and 64 input channels, [ceil(O/16), ceil(K/64), 16, 16, 4]."""
        packed = _empty_tiles(codes_OK)
        _library().fraqat_pack(
            _address(codes_OK, torch.int8), *_sizes(codes_OK), _address(packed, torch.int8), torch.get_num_threads()
        )
        return packed

    def product(self, operands: Operands, prepared: Tensor) -> Tensor:
        """One pass over memory: the sums never leave the nearest cache."""
        codes_MK, num_outputs = operands.codes_MK, operands.weight_scale_O.shape[0]
        y_MO = torch.empty(codes_MK.shape[0], num_outputs, dtype=operands.out_dtype)
        if y_MO.numel() == 0:
            return y_MO
        assert prepared.shape[:2] == _tile_counts(num_outputs, codes_MK.shape[1])
        is_unsigned, has_offset = codes_MK.dtype == torch.uint8, operands.zero_point is not None
        product = _Product(
            codes=_address(codes_MK, torch.uint8 if is_unsigned else torch.int8),
            packed=_address(prepared, torch.int8),
            weight_scale=_address(operands.weight_scale_O, torch.float32),
            token_scale=_address(operands.token_scale, torch.float32),
            row_sums=_address(operands.row_sums_O, torch.int32) if has_offset else None,
            bias=None if operands.bias_O is None else _address(operands.bias_O, torch.float32),
            y=_address(y_MO, *_FLOATS),
            num_tokens=codes_MK.shape[0],
            num_inputs=codes_MK.shape[1],
            num_outputs=num_outputs,
            token_scale_stride=int(operands.token_scale.numel() > 1),
            zero_point=0 if operands.zero_point is None else int(operands.zero_point),
            is_unsigned=is_unsigned,
            is_bfloat16=operands.out_dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
        )
        _library().fraqat_product(ctypes.byref(product))
        return y_MO


def quantize_and_pack(
    weight_OK: Tensor,
    scale_O: Tensor,
    qmin: int,
    qmax: int,
    *,
    divisor: float | None = None,
    codes_OK: Tensor | None = None,
    row_sums_O: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a weight, as `Native.prepare` wants them too, in one pass over memory.

    codes = clamp(round(weight / scale), qmin, qmax); with a divisor, scale = max(max|row| / divisor, least normal float32)

    Args:
        weight_OK: float32 or bfloat16, contiguous.
        scale_O: float32, positive, contiguous; receives the scales where there is a divisor.
        qmin: Least code, at least -128.
        qmax: Greatest code, at most 127.
        divisor: Positive; None where the scales are given.
        codes_OK, row_sums_O, packed: Where the results go, as an earlier call returned them; new tensors where None.

    Returns:
        The int8 codes [O, K], the int32 sum of each row, and the same codes in tiles.

    Numerics:
        The quotient is rounded as float32's division is, then to the nearest integer, ties to even: the codes are those
        of `torch.round(weight / scale)`. The scales are bit for bit those of torch's own operators in float32; where a row
        holds NaN or infinity its scale is not finite, and its codes mean nothing.
    """
    assert divisor is None or divisor > 0
    codes_OK = torch.empty(weight_OK.shape, dtype=torch.int8) if codes_OK is None else codes_OK
    packed = _empty_tiles(codes_OK) if packed is None else packed
    row_sums_O = torch.empty(weight_OK.shape[0], dtype=torch.int32) if row_sums_O is None else row_sums_O
    _library().fraqat_quantize_weight(
        _address(weight_OK, *_FLOATS),
        int(weight_OK.dtype == torch.bfloat16),
        _address(scale_O, torch.float32),
        ctypes.c_float(divisor or 0),
        *_sizes(weight_OK),
        ctypes.c_float(qmin),
        ctypes.c_float(qmax),
        _address(codes_OK, torch.int8),
        _address(packed, torch.int8),
        _address(row_sums_O, torch.int32),
        torch.get_num_threads(),
    )
    return codes_OK, row_sums_O, packed


def quantize_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit codes of each token, scaled by its largest magnitude, while the token is in cache.

    scale = max(max|x| / 127, least normal float32), codes = round(x / scale)

    Args:
        x_MK: float32 or bfloat16, contiguous.

    Returns:
        The int8 codes [M, K] and the float32 scales [M]. Where a token holds NaN or infinity so does its scale, and its
        codes mean nothing.

    Numerics:
        Bit for bit what torch's own operators give, in float32.
    """
    codes_MK = torch.empty(x_MK.shape, dtype=torch.int8)
    scale_M = torch.empty(x_MK.shape[0], dtype=torch.float32)
    _library().fraqat_quantize_tokens(
        _address(x_MK, *_FLOATS),
        int(x_MK.dtype == torch.bfloat16),
        *_sizes(x_MK),
        _address(codes_MK, torch.int8),
        _address(scale_M, torch.float32),
        torch.get_num_threads(),
    )
    return codes_MK, scale_M


def input_gradient(grad_MO: Tensor, scale_O: Tensor, codes_OK: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Gradient of the quantized input: (grad * scale) @ codes.

    Args:
        grad_MO: Gradient of the output, float32 or bfloat16, contiguous.
        scale_O: float32 scale of each output channel, contiguous.
        codes_OK: int8 codes of the weight, contiguous.
        out_dtype: float32 or bfloat16.

    Returns:
        [M, K], in `out_dtype`.

    Numerics:
        grad * scale is rounded to float32, then to bfloat16, which holds the codes exactly; the sum is float32, in an order
        that depends on nothing but O; the result is rounded once more to bfloat16 if that is asked for. As all bfloat16
        products of AMX do, it flushes denormals. The same bits for every number of threads.
    """
    (num_tokens, num_outputs), num_inputs = grad_MO.shape, codes_OK.shape[1]
    assert codes_OK.shape[0] == num_outputs and scale_O.shape == (num_outputs,)
    out_MK = torch.empty(num_tokens, num_inputs, dtype=out_dtype)
    if num_outputs == 0:
        return out_MK.zero_()
    _run(
        _GradientProduct(
            grad=_address(grad_MO, *_FLOATS),
            scale=_address(scale_O, torch.float32),
            codes=_address(codes_OK, torch.int8),
        ),
        grad_MO,
        out_MK,
    )
    return out_MK


def weight_gradient(
    grad_MO: Tensor,
    token_scale: Tensor,
    codes_MK: Tensor,
    zero_point: int = 0,
    out_dtype: torch.dtype = torch.float32,
    *,
    accumulate_into: Tensor | None = None,
    bias_gradient_O: Tensor | None = None,
) -> Tensor:
    """Gradient of the quantized weight: (grad * token scale)^T @ (codes - zero point).

    Args:
        grad_MO: Gradient of the output, float32 or bfloat16, contiguous.
        token_scale: float32, [M], or [1] where all tokens share it.
        codes_MK: int8 or uint8 codes of the input, contiguous.
        zero_point: Code of the value zero, within the dtype of the codes.
        out_dtype: float32 or bfloat16.
        accumulate_into: Contiguous tensor [O, K] that the gradient is added to, and that is returned; its dtype is the
            result's. None makes a new one.
        bias_gradient_O: float32; receives the sum of the gradient over the tokens, which costs next to nothing here.

    Returns:
        [O, K].

    Numerics:
        grad * scale is rounded to float32, then to bfloat16, which holds codes - zero point exactly; the sum over all tokens
        is float32, in their order, and is added to `accumulate_into` last. As all bfloat16 products of AMX do, it flushes
        denormals. The same bits for every number of threads.
    """
    (num_tokens, num_outputs), num_inputs = grad_MO.shape, codes_MK.shape[1]
    is_unsigned = codes_MK.dtype == torch.uint8
    assert codes_MK.shape[0] == num_tokens and token_scale.shape in ((1,), (num_tokens,))
    assert torch.iinfo(codes_MK.dtype).min <= zero_point <= torch.iinfo(codes_MK.dtype).max
    assert bias_gradient_O is None or bias_gradient_O.shape == (num_outputs,)
    if accumulate_into is None:
        out_OK = torch.empty(num_outputs, num_inputs, dtype=out_dtype)
    else:
        out_OK = accumulate_into
        assert out_OK.shape == (num_outputs, num_inputs)
    if num_tokens == 0 or out_OK.numel() == 0:
        if bias_gradient_O is not None:
            torch.sum(grad_MO, 0, dtype=torch.float32, out=bias_gradient_O)
        return out_OK if accumulate_into is not None else out_OK.zero_()
    product = _GradientProduct(
        grad=_address(grad_MO, *_FLOATS),
        scale=_address(token_scale, torch.float32),
        codes=_address(codes_MK, torch.uint8 if is_unsigned else torch.int8),
        bias=None if bias_gradient_O is None else _address(bias_gradient_O, torch.float32),
        scale_stride=int(token_scale.numel() > 1),
        zero_point=zero_point,
        is_unsigned=is_unsigned,
        is_weight_gradient=True,
        accumulates=accumulate_into is not None,
    )
    _run(product, grad_MO, out_OK)
    return out_OK


def _run(product: _GradientProduct, grad_MO: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    product.out = _address(out, *_FLOATS)
    product.num_tokens, product.num_outputs = grad_MO.shape
    product.num_inputs = out.shape[1]
    product.grad_is_bfloat16 = grad_MO.dtype == torch.bfloat16
    product.out_is_bfloat16 = out.dtype == torch.bfloat16
    product.num_threads = torch.get_num_threads()
    _library().fraqat_gradient_product(ctypes.byref(product))


def _address(tensor: Tensor | None, *dtypes: torch.dtype) -> ctypes.c_void_p:
    """Where the kernel finds a tensor that is as it expects."""
    assert tensor is not None and tensor.dtype in dtypes and tensor.is_contiguous() and tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(matrix: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    rows, columns = matrix.shape
    return ctypes.c_int64(rows), ctypes.c_int64(columns)


def _tile_counts(num_outputs: int, num_inputs: int) -> tuple[int, int]:
    return -(-num_outputs // _LANES), -(-num_inputs // _DEPTH)


def _empty_tiles(codes_OK: Tensor) -> Tensor:
    return torch.empty(*_tile_counts(*codes_OK.shape), _LANES, _LANES, 4, dtype=torch.int8)


def _library() -> ctypes.CDLL:
    found, reason = _library_or_reason()
    if found is None:
        raise UnavailableError(reason)
    return found


def _library_or_reason() -> tuple[ctypes.CDLL | None, str]:
    with _BUILD_LOCK:
        return _load()


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        check_cpu()
        found = ctypes.CDLL(str(built_library(cache_folder())))
        _check_results(found)
    except (UnavailableError, OSError) as error:
        return None, str(error)
    return found, ""


def _check_results(kernels: ctypes.CDLL) -> None:
    """One sum that float32 cannot hold, less all but its last one."""
    if not kernels.fraqat_has_bfloat16_tiles():
        raise UnavailableError("the CPU's AMX has no bfloat16")
    codes = torch.tensor([[127] * 1100 + [1]], dtype=torch.int8)
    row_sums = torch.tensor([127 * 127 * 1100], dtype=torch.int32)
    packed, y, one = _empty_tiles(codes), torch.zeros(1), torch.ones(1)
    kernels.fraqat_pack(_address(codes, torch.int8), *_sizes(codes), _address(packed, torch.int8), 1)
    product = _Product(
        codes=_address(codes, torch.int8),
        packed=_address(packed, torch.int8),
        weight_scale=_address(one, torch.float32),
        token_scale=_address(one, torch.float32),
        row_sums=_address(row_sums, torch.int32),
        y=_address(y, torch.float32),
        num_tokens=1,
        num_inputs=codes.shape[1],
        num_outputs=1,
        zero_point=1,
        num_threads=1,
    )
    kernels.fraqat_product(ctypes.byref(product))
    if y.item() != 1:
        raise UnavailableError("the kernel computes wrong sums on this CPU")
