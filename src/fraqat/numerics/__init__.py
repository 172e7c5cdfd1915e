"""Pure tensor functions: the reference that every faster twin is tested against. Imports torch only."""

from fraqat.numerics.fake_quant import code_dtype, dequantize, fake_quantize, quantize
from fraqat.numerics.granularity import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES, BlockLayout, Granularity
from fraqat.numerics.grid import FLOAT32_EXACT_BITS, Grid
from fraqat.numerics.group_scales import GroupScales, integer_group_scales, largest_multiplier
from fraqat.numerics.histogram import Histogram
from fraqat.numerics.learned_scale import fake_quantize_learned, learned_scale_gradients
from fraqat.numerics.packing import pack_codes, unpack_codes
from fraqat.numerics.qparams import (
    DEFAULT_PERCENTILE,
    MIN_SCALE,
    NEEDS_HISTOGRAM,
    Levels,
    QParams,
    RangeMethod,
    RunningStatistics,
    choose_qparams,
    clamp_codes,
    covers_every_value,
    encode,
    estimate_range,
    finish_scale,
    mse_clip_ratio,
    qparams_from_range,
    round_to_codes,
)
from fraqat.numerics.zero_point import ZeroPoint, zero_point_qparams

__all__ = [
    "ACTIVATION_GRANULARITIES",
    "DEFAULT_PERCENTILE",
    "FLOAT32_EXACT_BITS",
    "MIN_SCALE",
    "NEEDS_HISTOGRAM",
    "WEIGHT_GRANULARITIES",
    "BlockLayout",
    "Granularity",
    "Grid",
    "GroupScales",
    "Histogram",
    "Levels",
    "QParams",
    "RangeMethod",
    "RunningStatistics",
    "ZeroPoint",
    "choose_qparams",
    "clamp_codes",
    "code_dtype",
    "covers_every_value",
    "dequantize",
    "encode",
    "estimate_range",
    "fake_quantize",
    "fake_quantize_learned",
    "finish_scale",
    "integer_group_scales",
    "largest_multiplier",
    "learned_scale_gradients",
    "mse_clip_ratio",
    "pack_codes",
    "qparams_from_range",
    "quantize",
    "round_to_codes",
    "unpack_codes",
    "zero_point_qparams",
]
