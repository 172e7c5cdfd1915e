"""Where quantization hurts."""

from fraqat.analysis.bit_widths import DEFAULT_BITS, BitWidths, WidthLoss, losses_over_widths
from fraqat.analysis.layer_error import LayerError, layer_errors
from fraqat.analysis.layer_widths import LayerChoices, WidthChoice, choose_layer_widths, layer_width_rises
from fraqat.analysis.outliers import Outliers, OutlierStatistics, input_outliers, tensor_outliers
from fraqat.analysis.sensitivity import FamilySum, LayerSensitivity, Sensitivity, layer_sensitivity

__all__ = [
    "DEFAULT_BITS",
    "BitWidths",
    "FamilySum",
    "LayerChoices",
    "LayerError",
    "LayerSensitivity",
    "OutlierStatistics",
    "Outliers",
    "Sensitivity",
    "WidthChoice",
    "WidthLoss",
    "choose_layer_widths",
    "input_outliers",
    "layer_errors",
    "layer_sensitivity",
    "layer_width_rises",
    "losses_over_widths",
    "tensor_outliers",
]
