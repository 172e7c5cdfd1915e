"""Triton kernels: the product with everything after it fused, and the quantizers before it.

Importable without Triton and without a GPU; `Triton.why_unavailable` tells. With `TRITON_INTERPRET=1` set before the first
import, the kernels run on the CPU, slowly.

Shape suffixes: M tokens, K input channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fraqat.kernels.product import Operands

_IS_INSTALLED = find_spec("triton") is not None
if TYPE_CHECKING or _IS_INSTALLED:
    import triton
    import triton.language as tl
    from triton import knobs

_IS_INTERPRETED = _IS_INSTALLED and bool(knobs.runtime.interpret)
_LOWEST_CAPABILITY = (8, 0)
_LARGEST_ROW = 16384
_PART = 4096
_FULL_BUCKET = 8192


def _jit(*, unspecialized: Sequence[str] = ()) -> Callable[[Any], Any]:
    """`triton.jit` where there is Triton; the plain function, never called, where there is none."""
    return triton.jit(do_not_specialize=list(unspecialized)) if _IS_INSTALLED else lambda kernel: kernel


def _tune(kernel: Any) -> Any:
    """Measures the tile shapes once for every O, K and bucket of M; the interpreter has but one."""
    if not _IS_INSTALLED:
        return kernel
    tiles = [_tile(32, 32, 64, 4, 1)] if _IS_INTERPRETED else [_tile(*sizes) for sizes in _TILES]
    keys = ["size_O", "size_K", "bucket_M"]
    return triton.autotune(tiles, key=keys, prune_configs_by={"early_config_prune": _drop_tall_tiles})(kernel)


# Tokens, output channels, input channels, warps, stages.
_TILES = (
    (128, 256, 128, 8, 3),
    (256, 128, 128, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 128, 8, 3),
    (128, 128, 128, 4, 4),
    (128, 128, 64, 4, 4),
    (64, 256, 128, 4, 3),
    (64, 128, 128, 4, 4),
    (64, 64, 128, 4, 4),
    (32, 128, 128, 4, 4),
    (16, 128, 128, 4, 4),
    (16, 64, 256, 4, 4),
)


def _tile(block_M: int, block_O: int, block_K: int, num_warps: int, num_stages: int) -> Any:
    blocks = {"BLOCK_M": block_M, "BLOCK_O": block_O, "BLOCK_K": block_K}
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


def _drop_tall_tiles(tiles: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    tallest = max(16, arguments["bucket_M"])
    return [tile for tile in tiles if tile.kwargs["BLOCK_M"] <= tallest]


# A kernel's arguments, pointers and numbers, have no annotation: Triton would take it for a global variable of the kernel.
# pyright: reportMissingParameterType=false


@_tune
@_jit(unspecialized=("size_M", "bucket_M"))
def _product_kernel(
    codes_MK,
    weight_OK,
    weight_scale_O,
    token_scale,
    zero_point,
    row_sums_O,
    bias_O,
    y_MO,
    size_M,
    size_O,
    size_K,
    bucket_M,
    TOKEN_STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that run together form a group of rows, so that they share the weight's tiles in the L2 cache.
    num_blocks_M, num_blocks_O = tl.cdiv(size_M, BLOCK_M), tl.cdiv(size_O, BLOCK_O)
    group, member = tl.program_id(0) // (GROUP * num_blocks_O), tl.program_id(0) % (GROUP * num_blocks_O)
    group_size = tl.minimum(num_blocks_M - group * GROUP, GROUP)
    rows_M = (group * GROUP + member % group_size) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_O = (member // group_size) * BLOCK_O + tl.arange(0, BLOCK_O)
    # Rows past the end read those of the start and are not stored, so that only K needs a mask.
    columns = tl.arange(0, BLOCK_K)[None, :]
    codes_MK += (rows_M % size_M).to(tl.int64)[:, None] * size_K + columns
    weight_OK += (rows_O % size_O).to(tl.int64)[:, None] * size_K + columns

    sums = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.int32)
    for start in range(0, size_K, BLOCK_K):
        is_inside = columns < size_K - start
        codes = tl.load(codes_MK, mask=is_inside, other=0)
        weight = tl.load(weight_OK, mask=is_inside, other=0)
        if OFFSET:
            # Flips the highest bit, which is to subtract 128.
            codes = (codes ^ OFFSET).to(tl.int8, bitcast=True)
        sums = tl.dot(codes, tl.trans(weight), sums, out_dtype=tl.int32)
        codes_MK += BLOCK_K
        weight_OK += BLOCK_K

    is_row_M, is_row_O = rows_M < size_M, rows_O < size_O
    if zero_point is not None:
        shift = OFFSET - tl.load(zero_point)
        sums += shift * tl.load(row_sums_O + rows_O, mask=is_row_O, other=0)[None, :]
    y = sums.to(tl.float32) * tl.load(weight_scale_O + rows_O, mask=is_row_O, other=0.0)[None, :]
    y = y * tl.load(token_scale + rows_M * TOKEN_STRIDE, mask=is_row_M, other=0.0)[:, None]
    if bias_O is not None:
        y += tl.load(bias_O + rows_O, mask=is_row_O, other=0.0)[None, :]
    y_MO += rows_M.to(tl.int64)[:, None] * size_O + rows_O[None, :]
    tl.store(y_MO, y.to(y_MO.dtype.element_ty), mask=is_row_M[:, None] & is_row_O[None, :])


@_jit()
def _largest_bits(x):
    # Without its sign a float orders like its bits, with NaN at the top: a maximum of integers cannot lose it.
    return tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@_jit()
def _scale_of_largest(bits):
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
    return tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)


@_jit()
def _round_to_int8(ratio):
    # Between 2^23 and 2^24 float32 holds the integers alone, so the sum with 1.5 * 2^23 rounds, ties to even.
    codes = (ratio + 12582912.0) - 12582912.0
    return tl.where(ratio == ratio, codes, 0.0).to(tl.int8)


@_jit(unspecialized=("size_M",))
def _quantize_tokens_kernel(
    x_MK, codes_MK, scale_M, size_M, size_K, ONE_PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)[None, :]
    is_row = (rows < size_M)[:, None]
    offsets = rows.to(tl.int64)[:, None] * size_K + columns
    if ONE_PART:
        is_inside = is_row & (columns < size_K)
        x = tl.load(x_MK + offsets, mask=is_inside, other=0.0)
        scale = _scale_of_largest(_largest_bits(x))
        codes = _round_to_int8(tl.div_rn(x.to(tl.float32), scale[:, None]))
        tl.store(codes_MK + offsets, codes, mask=is_inside)
    else:
        largest = tl.zeros((BLOCK_M,), dtype=tl.int32)
        for start in range(0, size_K, BLOCK_K):
            is_inside = is_row & (columns < size_K - start)
            x = tl.load(x_MK + offsets + start, mask=is_inside, other=0.0)
            largest = tl.maximum(largest, _largest_bits(x))
        scale = _scale_of_largest(largest)
        for start in range(0, size_K, BLOCK_K):
            is_inside = is_row & (columns < size_K - start)
            x = tl.load(x_MK + offsets + start, mask=is_inside, other=0.0)
            codes = _round_to_int8(tl.div_rn(x.to(tl.float32), scale[:, None]))
            tl.store(codes_MK + offsets + start, codes, mask=is_inside)
    tl.store(scale_M + rows, scale, mask=rows < size_M)


@_jit()
def _quantize_weight_kernel(
    weight_OK, scale_O, qmin, qmax, codes_OK, row_sums_O, size_O, size_K, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.arange(0, BLOCK_K)[None, :]
    is_row = rows < size_O
    offsets = rows.to(tl.int64)[:, None] * size_K + columns
    scale = tl.load(scale_O + rows, mask=is_row, other=1.0)[:, None]
    lowest, highest = tl.load(qmin).to(tl.float32), tl.load(qmax).to(tl.float32)
    row_sums = tl.zeros((BLOCK_O,), dtype=tl.int32)
    for start in range(0, size_K, BLOCK_K):
        is_inside = is_row[:, None] & (columns < size_K - start)
        weight = tl.load(weight_OK + offsets + start, mask=is_inside, other=0.0).to(tl.float32)
        # The bounds are integers, so clamping first changes nothing and keeps the ratio small enough to be rounded.
        codes = _round_to_int8(tl.minimum(tl.maximum(tl.div_rn(weight, scale), lowest), highest))
        tl.store(codes_OK + offsets + start, codes, mask=is_inside)
        row_sums += tl.sum(codes.to(tl.int32), axis=1)
    tl.store(row_sums_O + rows, row_sums, mask=is_row)


@_jit(unspecialized=("size_M", "seed"))
def _quantize_stochastic_kernel(
    x_MK, codes_MK, scale_M, seed, size_M, size_K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)[None, :]
    is_row = (rows < size_M)[:, None]
    offsets = rows.to(tl.int64)[:, None] * size_K + columns
    largest = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(0, size_K, BLOCK_K):
        x = tl.load(x_MK + offsets + start, mask=is_row & (columns < size_K - start), other=0.0)
        largest = tl.maximum(largest, _largest_bits(x))
    scale = _scale_of_largest(largest)
    counters_M = tl.broadcast_to(rows[:, None], (BLOCK_M, BLOCK_K))
    nothing = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    # The generator is the costly part and gives four numbers at a time, for four parts of the row.
    for block in range(tl.cdiv(size_K, 4 * BLOCK_K)):
        counters_K = tl.broadcast_to(columns + block * BLOCK_K, (BLOCK_M, BLOCK_K))
        random = tl.philox(seed, counters_M, counters_K, nothing, nothing)
        for part in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
            begin = (4 * block + part) * BLOCK_K
            is_inside = is_row & (columns < size_K - begin)
            x = tl.load(x_MK + offsets + begin, mask=is_inside, other=0.0)
            ratio = tl.div_rn(x.to(tl.float32), scale[:, None])
            below = tl.floor(ratio)
            codes = below + (tl.uint_to_uniform_float(random[part]) < ratio - below).to(tl.float32)
            codes = _round_to_int8(tl.where(codes > 127.0, 127.0, tl.where(codes < -127.0, -127.0, codes)))
            tl.store(codes_MK + offsets + begin, codes, mask=is_inside)
    tl.store(scale_M + rows, scale, mask=rows < size_M)


class Triton:
    """Integer matrix units of NVIDIA GPUs: one kernel from the codes to y.

    Numerics: the sums are exact for K up to 65000. Products and sums are not contracted, divisions round correctly and ties
    go to even, so that every result is the one of the engines on the CPU.
    """

    name = "triton"
    is_layout_cheap = False

    def why_unavailable(self, device: torch.device) -> str:
        """Runs on CUDA devices of compute capability 8.0 or more, and under Triton's interpreter."""
        if not _IS_INSTALLED:
            return 'triton is not installed: pip install "fraqat[gpu]"'
        if _IS_INTERPRETED:
            return "" if device.type in ("cpu", "cuda") else f"runs on cpu and cuda, not on {device.type}"
        if device.type != "cuda":
            return f"runs on cuda, not on {device.type}, unless TRITON_INTERPRET=1 is set"
        if torch.cuda.get_device_capability(device) < _LOWEST_CAPABILITY:
            return "needs compute capability 8.0"
        return ""

    def prepare(self, codes_OK: Tensor) -> Tensor:
        """The codes themselves."""
        return codes_OK

    def product(self, operands: Operands, prepared: Tensor) -> Tensor:
        """Unsigned codes are moved by 128 inside the kernel, and the zero point with them."""
        codes = operands.codes_MK
        (size_M, size_K), size_O = codes.shape, prepared.shape[0]
        is_unsigned = codes.dtype == torch.uint8
        assert codes.is_contiguous() and prepared.is_contiguous()
        assert operands.zero_point is not None or not is_unsigned
        # The interpreter cuts bfloat16 off instead of rounding it: torch rounds there.
        dtype = torch.float32 if _IS_INTERPRETED else operands.out_dtype
        y = torch.empty(size_M, size_O, dtype=dtype, device=codes.device)
        if size_M == 0:
            return y.to(operands.out_dtype)

        def grid(tile: dict[str, Any]) -> tuple[int]:
            return (triton.cdiv(size_M, tile["BLOCK_M"]) * triton.cdiv(size_O, tile["BLOCK_O"]),)

        with torch.cuda.device_of(codes):
            _product_kernel[grid](
                codes,
                prepared,
                operands.weight_scale_O,
                operands.token_scale,
                operands.zero_point,
                operands.row_sums_O,
                operands.bias_O,
                y,
                size_M,
                size_O,
                size_K,
                triton.next_power_of_2(min(size_M, _FULL_BUCKET)),
                TOKEN_STRIDE=int(operands.token_scale.numel() > 1),
                OFFSET=128 if is_unsigned else 0,
                GROUP=8,
                enable_fp_fusion=False,
            )
        return y.to(operands.out_dtype)

    def quantize_tokens(self, x_MK: Tensor) -> tuple[Tensor, Tensor]:
        """Symmetric codes by each token's largest magnitude: round(x / scale), scale = max(max|x| / 127, float32's tiny).

        Args:
            x_MK: float32, bfloat16 or float16.

        Returns:
            int8 codes [M, K] within [-127, 127], and the float32 scale [M].

        Numerics: float32 and ties to even. The scale of a token that holds NaN or infinity is not finite, nor is then its
            product with a weight.
        """
        x, codes, scale = _with_room_for_codes(x_MK)
        size_M, size_K = x.shape
        rows, columns, options = _row_blocks(size_K, _LARGEST_ROW)
        grid = (triton.cdiv(size_M, rows),)
        with torch.cuda.device_of(x):
            _quantize_tokens_kernel[grid](x, codes, scale, size_M, size_K, size_K <= columns, rows, columns, **options)
        return codes, scale

    def quantize_weight(
        self, weight_OK: Tensor, scale_O: Tensor, qmin: float | Tensor, qmax: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes of a weight, clamp(round(w / scale), qmin, qmax), and the sum of each row of them.

        Args:
            weight_OK: float32 or bfloat16.
            scale_O: float32, positive.
            qmin, qmax: Integers with -128 <= qmin <= 0 <= qmax <= 127: numbers or 0-dim tensors of any dtype.

        Returns:
            int8 codes [O, K] and int32 sums [O].

        Numerics: float32 and ties to even. Infinity saturates; NaN has no code and becomes qmin.
        """
        weight, codes, _ = _with_room_for_codes(weight_OK)
        row_sums = torch.empty(weight.shape[0], dtype=torch.int32, device=weight.device)
        size_O, size_K = weight.shape
        rows, columns, options = _row_blocks(size_K, _PART)
        grid = (triton.cdiv(size_O, rows),)
        lowest, highest = (_on_device(limit, weight.device) for limit in (qmin, qmax))
        scale = scale_O.contiguous()
        with torch.cuda.device_of(weight):
            _quantize_weight_kernel[grid](
                weight, scale, lowest, highest, codes, row_sums, size_O, size_K, rows, columns, **options
            )
        return codes, row_sums

    def quantize_stochastic(self, dy_MO: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """`quantize_tokens` with stochastic rounding: a code is dy / scale on average over the seeds.

        Args:
            dy_MO: float32, bfloat16 or float16.
            seed: 0 to 2^31 - 1. The same seed gives the same codes.

        Returns:
            int8 codes [M, O] within [-127, 127], and the float32 scale [M].
        """
        dy, codes, scale = _with_room_for_codes(dy_MO)
        size_M, size_O = dy.shape
        rows, columns, options = _row_blocks(triton.cdiv(size_O, 4), _PART // 4)
        grid = (triton.cdiv(size_M, rows),)
        with torch.cuda.device_of(dy):
            _quantize_stochastic_kernel[grid](dy, codes, scale, seed, size_M, size_O, rows, columns, **options)
        return codes, scale


def _with_room_for_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return x, codes, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _on_device(number: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device)
    return torch.full((), number, dtype=torch.float32, device=device)


def _row_blocks(width: int, widest: int) -> tuple[int, int, dict[str, Any]]:
    """Rows and columns of a program, together at least 4096 numbers or `widest`, and how to compile it."""
    columns = min(triton.next_power_of_2(max(width, 1)), widest)
    rows = max(1, min(_PART, widest) // columns)
    num_warps = min(16, max(4, rows * columns // 1024))
    return rows, columns, {"num_warps": num_warps, "enable_fp_fusion": False}
