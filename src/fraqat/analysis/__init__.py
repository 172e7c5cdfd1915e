"""Where quantization hurts."""

from fraqat.analysis.bit_widths import DEFAULT_BITS, BitWidths, WidthLoss, losses_over_widths
from fraqat.analysis.layer_error import LayerError, layer_errors
from fraqat.analysis.layer_widths import LayerChoices, WidthChoice, choose_layer_widths, layer_width_rises
from fraqat.analysis.loss_law import LawRun, LossLaw, bootstrap_laws, fit_loss_law, held_out_errors, log_errors
from fraqat.analysis.outliers import Outliers, OutlierStatistics, input_outliers, tensor_outliers
from fraqat.analysis.pilot import PilotLaw, PilotRun, fit_pilot, pilot_table
from fraqat.analysis.sensitivity import FamilySum, LayerSensitivity, Sensitivity, layer_sensitivity

__all__ = [
    "DEFAULT_BITS",
    "BitWidths",
    "FamilySum",
    "LawRun",
    "LayerChoices",
    "LayerError",
    "LayerSensitivity",
    "LossLaw",
    "OutlierStatistics",
    "Outliers",
    "PilotLaw",
    "PilotRun",
    "Sensitivity",
    "WidthChoice",
    "WidthLoss",
    "bootstrap_laws",
    "choose_layer_widths",
    "fit_loss_law",
    "fit_pilot",
    "held_out_errors",
    "input_outliers",
    "layer_errors",
    "layer_sensitivity",
    "layer_width_rises",
    "log_errors",
    "losses_over_widths",
    "pilot_table",
    "tensor_outliers",
]
