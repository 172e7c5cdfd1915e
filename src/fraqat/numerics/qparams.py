"""From a tensor or its running statistics to scale and zero point: max-abs, min-max, 3-sigma, MSE clipping."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from fraqat.errors import config_error
from fraqat.numerics.granularity import BlockLayout
from fraqat.numerics.grid import Grid
from fraqat.numerics.histogram import Histogram

MIN_SCALE = float(torch.finfo(torch.float32).tiny)
MIN_FLOAT16_SCALE = 2.0**-24
"""Lower bound of a scale: an all-zero block gets it, so its codes and values are exactly zero. Exact in bf16."""

MSE_RATIOS = tuple(1.0 - 0.01 * step for step in range(80))
"""Candidate shares of the full range for MSE clipping: 1.00 down to 0.21. 1.00 is the full range itself, so MSE clipping is
never worse than max-abs on the tensor that it was measured on."""


class RangeMethod(StrEnum):
    """How the range that the codes must cover is measured."""

    MAX_ABS = "max_abs"
    MIN_MAX = "min_max"
    THREE_SIGMA = "three_sigma"
    MSE = "mse"
    LEARNED = "learned"
    PERCENTILE = "percentile"


_RANGE_METHODS = tuple(RangeMethod)
_SEARCHED = (RangeMethod.MSE, RangeMethod.LEARNED)
NEEDS_HISTOGRAM = (RangeMethod.MSE, RangeMethod.PERCENTILE)
"""Methods that need all values of static inputs, not their moments."""
DEFAULT_PERCENTILE = 99.99


class Levels(Protocol):
    """What the quantizers need of a grid. `Grid` has plain numbers; a compiled training step has 0-dim tensors, so that
    a change of the bit width does not recompile the graph."""

    @property
    def qmin(self) -> float | Tensor: ...
    @property
    def qmax(self) -> float | Tensor: ...
    @property
    def range_divisor(self) -> float | Tensor: ...
    @property
    def symmetric(self) -> bool: ...


@dataclass(frozen=True)
class QParams:
    """The affine map between codes and values: value = scale * (code - zero_point) + offset.

    Args:
        scale: Positive step size; broadcasts against the block view.
        zero_point: Integer code of the value zero (accelerators' asymmetric form), or None for 0.
        offset: Real value of code zero (w_min of Eq. 2), or None for 0.
        multiplier: What values are multiplied by on their way to codes, for runtimes that do not divide by the scale; or None.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    offset: Tensor | None = None
    multiplier: Tensor | None = None


def estimate_range(tensor: Tensor, layout: BlockLayout, method: RangeMethod) -> tuple[Tensor, Tensor]:
    """Measures the range [low, high] of every block.

    Args:
        tensor: Values, any floating dtype.
        layout: Which elements share a range.
        method: `max_abs` gives [-m, m]; `min_max` the extremes; `three_sigma` mean -+ 3 standard deviations, but never
            beyond the extremes (the paper's inlier rule). `mse` and `learned` start from the extremes: see `mse_clip_ratio`.

    Returns:
        `low` and `high`, float32 (float64 for float64 input), of the layout's scale shape.

    Raises:
        ConfigError: An unknown method.

    Numerics: NaN and infinity pass through, so a block that holds one gets a range that is not finite.
    """
    if method not in _RANGE_METHODS or method == RangeMethod.PERCENTILE:
        allowed = ", ".join(name for name in _RANGE_METHODS if name != RangeMethod.PERCENTILE)
        raise config_error(
            "range_method", method, allowed=f"{allowed} where a range is measured anew", fix="use one of these"
        )
    blocks = _compute_view(tensor, layout)
    dims = layout.reduce_dims(blocks.ndim)
    if method == RangeMethod.MAX_ABS:
        high = blocks.abs().amax(dim=dims, keepdim=True)
        return -high, high
    low, high = blocks.amin(dim=dims, keepdim=True), blocks.amax(dim=dims, keepdim=True)
    if method == RangeMethod.THREE_SIGMA:
        mean = blocks.mean(dim=dims, keepdim=True)
        margin = 3.0 * (blocks - mean).square().mean(dim=dims, keepdim=True).sqrt()
        low, high = torch.maximum(low, mean - margin), torch.minimum(high, mean + margin)
    return low, high


def qparams_from_range(
    low: Tensor,
    high: Tensor,
    levels: Levels,
    *,
    scale_dtype: torch.dtype | None = None,
    integer_zero_point: bool = False,
) -> QParams:
    """Turns a range into the affine map of Eq. 1 or Eq. 2.

    Args:
        low, high: Range per block, of the scale's shape.
        levels: The grid.
        scale_dtype: Round the scale to this dtype (bf16 is exact in fp32, bf16 and fp16 targets); it stays stored as float.
        integer_zero_point: Asymmetric grids only: the accelerators' form with an integer zero point. The range is widened to
            hold zero and divided by qmax - qmin, so that zero is exact; Eq. 2 keeps w_min as a real offset instead.

    Returns:
        The map, dtype of `low`. The scale is at least `MIN_SCALE`.
    """
    if levels.symmetric:
        scale = torch.maximum(-low, high) / levels.range_divisor
        return QParams(finish_scale(scale, scale_dtype))
    if not integer_zero_point:
        return QParams(finish_scale((high - low) / levels.range_divisor, scale_dtype), offset=low)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = finish_scale((high - low) / (levels.qmax - levels.qmin), scale_dtype)
    zero_point = torch.round(levels.qmin - low / scale)
    return QParams(scale, zero_point=clamp_codes(zero_point, levels))


def choose_qparams(
    tensor: Tensor,
    levels: Levels,
    layout: BlockLayout,
    method: RangeMethod,
    *,
    scale_dtype: torch.dtype | None = None,
    integer_zero_point: bool = False,
    clip_ratio: Tensor | None = None,
) -> QParams:
    """Range of `tensor`, then `qparams_from_range`.

    Args:
        clip_ratio: Known result of `mse_clip_ratio`; with method `mse` and None it is searched here, which is slow. `learned`
            gives what a learned scale starts from, which is the same.
        tensor, levels, layout, method, scale_dtype, integer_zero_point: As in the two functions that this one joins.
    """
    if isinstance(levels, Grid):
        tensor = tensor.to(torch.promote_types(tensor.dtype, levels.compute_dtype))
    low, high = estimate_range(tensor, layout, method)
    if method in _SEARCHED:
        if clip_ratio is None:
            clip_ratio = mse_clip_ratio(
                tensor, levels, layout, scale_dtype=scale_dtype, integer_zero_point=integer_zero_point
            )
        low, high = low * clip_ratio, high * clip_ratio
    return qparams_from_range(low, high, levels, scale_dtype=scale_dtype, integer_zero_point=integer_zero_point)


@torch.no_grad()
def mse_clip_ratio(
    tensor: Tensor,
    levels: Levels,
    layout: BlockLayout,
    *,
    scale_dtype: torch.dtype | None = None,
    integer_zero_point: bool = False,
) -> Tensor:
    """Searches, per block, the share of the full range that minimises the squared quantization error.

    Returns:
        Ratios among `MSE_RATIOS`, float32 or float64, of the layout's scale shape.

    Numerics: one pass over the tensor per candidate; the memory of three copies of the tensor.
    """
    blocks = _compute_view(tensor, layout)
    dims = layout.reduce_dims(blocks.ndim)
    low, high = estimate_range(tensor, layout, RangeMethod.MSE)
    best_error = torch.full_like(low, float("inf"))
    best_ratio = torch.ones_like(low)
    # The scales of several candidates at a time: a loop of operations on few elements costs more than the passes.
    at_a_time = max(1, min(len(MSE_RATIOS), blocks.numel() // max(1, low.numel())))
    for ratios in torch.tensor(MSE_RATIOS, dtype=low.dtype, device=low.device).split(at_a_time):
        shares = ratios.reshape(-1, *(1 for _ in low.shape))
        qparams = qparams_from_range(
            low * shares, high * shares, levels, scale_dtype=scale_dtype, integer_zero_point=integer_zero_point
        )
        for i, ratio in enumerate(ratios):
            error = _squared_error(blocks, _candidate(qparams, i), levels).sum(dim=dims, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_ratio = torch.where(better, ratio, best_ratio)
    return best_ratio


def _candidate(several: QParams, i: int) -> QParams:
    """The map of one candidate range."""
    zero_point, offset = several.zero_point, several.offset
    return QParams(
        several.scale[i],
        zero_point=None if zero_point is None else zero_point[i],
        offset=None if offset is None else offset[i],
    )


def _squared_error(blocks: Tensor, qparams: QParams, levels: Levels) -> Tensor:
    """(x - decode(encode(x)))^2, with one new tensor where codes are symmetric."""
    if qparams.zero_point is not None or qparams.offset is not None:
        return (blocks - decode(encode(blocks, qparams, levels), qparams)).square_()
    low: Any = levels.qmin
    high: Any = levels.qmax
    return (blocks / qparams.scale).round_().clamp_(low, high).mul_(qparams.scale).sub_(blocks).square_()


def covers_every_value(grid: Grid, method: RangeMethod, *, scale_dtype: torch.dtype | None = None) -> bool:
    """Whether a scale measured on the same values by `method` can clip none of them.

    True for max-abs on a symmetric grid of whole bits up to 16: max / (max / qmax) rounds to qmax, since both divisions
    together err by less than 2^-22. A fractional width, a rounded scale or another method may clip.
    """
    is_whole = float(grid.bits).is_integer() and 2 <= grid.bits <= 16
    return method is RangeMethod.MAX_ABS and grid.symmetric and is_whole and scale_dtype is None


def encode(blocks: Tensor, qparams: QParams, levels: Levels) -> Tensor:
    """clamp(round((x - offset) / scale) + zero_point, qmin, qmax), codes as floats. Ties round to even."""
    return clamp_codes(round_to_codes(blocks, qparams), levels)


def round_to_codes(blocks: Tensor, qparams: QParams) -> Tensor:
    """round((x - offset) / scale) + zero_point before the clamp.

    Division, not a product with 1 / scale, as ONNX defines; a product where a runtime's `multiplier` is given.
    """
    shifted = blocks if qparams.offset is None else blocks - qparams.offset
    scaled = shifted / qparams.scale if qparams.multiplier is None else shifted * qparams.multiplier
    codes = torch.round(scaled)
    return codes if qparams.zero_point is None else codes + qparams.zero_point


def clamp_codes(codes: Tensor, levels: Levels) -> Tensor:
    """Clips codes to [qmin, qmax]; NaN stays NaN."""
    low: Any = levels.qmin
    high: Any = levels.qmax
    return torch.clamp(codes, low, high)


def decode(codes: Tensor, qparams: QParams) -> Tensor:
    """scale * (code - zero_point) + offset."""
    codes = codes if qparams.zero_point is None else codes - qparams.zero_point
    values = codes * qparams.scale
    return values if qparams.offset is None else values + qparams.offset


@dataclass
class RunningStatistics:
    """Count, mean, squared deviation and extremes of all values seen, merged batch by batch in float64 (Chan et al. 1979).

    The paper's static activations: mean and standard deviation per layer over the calibration samples, not over the first
    batch only.

    Args:
        histogram: Collects the values too, for `mse` and `percentile`; None where only moments are wanted.
    """

    histogram: Histogram | None = None
    count: int = 0
    mean: float = 0.0
    squared_deviation: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def update(self, values: Tensor) -> None:
        """Adds the values of one batch, any shape; an empty one changes nothing.

        Raises:
            ConfigError: The batch holds NaN or infinity.
        """
        if not values.numel():
            return
        flat = values.detach().double().flatten()
        if not bool(torch.isfinite(flat).all()):
            raise config_error("activation", "nan or inf", allowed="finite values", fix="check the calibration inputs")
        count, mean = flat.numel(), float(flat.mean())
        total = self.count + count
        delta = mean - self.mean
        self.squared_deviation += float((flat - mean).square().sum()) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        if self.histogram is not None:
            self.histogram.update(flat)

    @property
    def std(self) -> float:
        """Population standard deviation of everything seen."""
        return (self.squared_deviation / self.count) ** 0.5 if self.count else 0.0

    def range(
        self, method: RangeMethod, grid: Grid | None = None, percentile: float = DEFAULT_PERCENTILE
    ) -> tuple[float, float]:
        """The range that `method` gives for these statistics; the same rules as `estimate_range`.

        Args:
            method: Any but `learned`.
            grid: What the range will be divided into; only for `mse`.
            percentile: Share of the values inside the range in %; only for `percentile`.

        Raises:
            ConfigError: Nothing was seen yet, the method is `learned`, or it needs the values and no histogram was kept.
        """
        if not self.count:
            raise config_error("calibration", "no data", allowed="at least one batch", fix="run calibrate_ with data")
        if method == RangeMethod.LEARNED or (method in NEEDS_HISTOGRAM and self.histogram is None):
            raise config_error(
                "range_method",
                str(method),
                allowed="max_abs, min_max, three_sigma, and with a histogram mse and percentile, for static activations",
                fix="use three_sigma",
            )
        if self.histogram is not None and method == RangeMethod.PERCENTILE:
            low, high = self.histogram.percentile_range(percentile)
            return max(low, self.low), min(high, self.high)
        if self.histogram is not None and method == RangeMethod.MSE:
            assert grid is not None
            return self.histogram.mse_range(self.low, self.high, grid)
        if method == RangeMethod.MAX_ABS:
            limit = max(-self.low, self.high)
            return -limit, limit
        if method == RangeMethod.MIN_MAX:
            return self.low, self.high
        return max(self.low, self.mean - 3 * self.std), min(self.high, self.mean + 3 * self.std)


def _compute_view(tensor: Tensor, layout: BlockLayout) -> Tensor:
    blocks = layout.split(tensor)
    return blocks if blocks.dtype == torch.float64 else blocks.float()


def finish_scale(scale: Tensor, scale_dtype: torch.dtype | None) -> Tensor:
    """`scale` rounded to `scale_dtype` (None leaves it), at least `MIN_SCALE`, in its own dtype.

    float16 is narrower than that: there the scale is at least `MIN_FLOAT16_SCALE` and at most 65504.
    """
    if scale_dtype is torch.float16:
        scale = scale.clamp(MIN_FLOAT16_SCALE, torch.finfo(torch.float16).max)
    if scale_dtype is not None:
        scale = scale.to(scale_dtype).to(scale.dtype)
    return scale.clamp(min=MIN_SCALE)
