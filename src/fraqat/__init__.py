"""Quantization-aware training by fractional bit widths (FraQAT, arXiv 2510.14823). This import needs torch alone."""

from fraqat.nn import (
    ActivationSpec,
    LayerFamilies,
    LayerRule,
    QuantReport,
    QuantSpec,
    WeightSpec,
    calibrate_,
    quantize_,
    set_bits_,
    unquantize_,
)
from fraqat.schedules import LearningRateSpec, Schedule, ScheduleSpec

__version__ = "0.1.0"

__all__ = [
    "ActivationSpec",
    "LayerFamilies",
    "LayerRule",
    "LearningRateSpec",
    "QuantReport",
    "QuantSpec",
    "Schedule",
    "ScheduleSpec",
    "WeightSpec",
    "__version__",
    "calibrate_",
    "quantize_",
    "set_bits_",
    "unquantize_",
]
