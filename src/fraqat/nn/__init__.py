"""Quantized layers, and the functions that put them into any model."""

from fraqat.nn.adapters import LowRankAdapter, LowRankSpec
from fraqat.nn.branch import BranchSpec, LowRankBranch, RankSchedule
from fraqat.nn.branches import (
    BranchFit,
    add_branches_,
    fold_components_,
    initialize_branches_,
    remove_spent_branches_,
)
from fraqat.nn.families import ALL, LayerFamilies
from fraqat.nn.integer import why_not_integer
from fraqat.nn.integer_layers import EngineSpec, IntegerLayers
from fraqat.nn.layers import QuantizedLayer, QuantLinear, QuantPointwiseConv
from fraqat.nn.low_rank import add_adapters_, merge_adapters_
from fraqat.nn.packed import PackedLayer, packed_codes, to_packed_
from fraqat.nn.rotation import RotationSpec, ValuePath, rotate_value_paths_
from fraqat.nn.searching import without_search
from fraqat.nn.several_widths import kept_widths, scale_rates, scale_rates_by_name, serve_widths_, settle_at_
from fraqat.nn.smoothing import InputSmoothing, SmoothingSpec
from fraqat.nn.spec import STRICT_KEYS, ActivationSpec, LayerRule, QuantSpec, WeightSpec
from fraqat.nn.swap import (
    LayerRow,
    QuantReport,
    calibrate_,
    describe,
    granularity_label,
    quantize_,
    quantized_layers,
    scale_parameters,
    set_bits_,
    set_bypassed_,
    spec_label,
    unquantize_,
)

__all__ = [
    "ALL",
    "STRICT_KEYS",
    "ActivationSpec",
    "BranchFit",
    "BranchSpec",
    "EngineSpec",
    "InputSmoothing",
    "IntegerLayers",
    "LayerFamilies",
    "LayerRow",
    "LayerRule",
    "LowRankAdapter",
    "LowRankBranch",
    "LowRankSpec",
    "PackedLayer",
    "QuantLinear",
    "QuantPointwiseConv",
    "QuantReport",
    "QuantSpec",
    "QuantizedLayer",
    "RankSchedule",
    "RotationSpec",
    "SmoothingSpec",
    "ValuePath",
    "WeightSpec",
    "add_adapters_",
    "add_branches_",
    "calibrate_",
    "describe",
    "fold_components_",
    "granularity_label",
    "initialize_branches_",
    "kept_widths",
    "merge_adapters_",
    "packed_codes",
    "quantize_",
    "quantized_layers",
    "remove_spent_branches_",
    "rotate_value_paths_",
    "scale_parameters",
    "scale_rates",
    "scale_rates_by_name",
    "serve_widths_",
    "set_bits_",
    "set_bypassed_",
    "settle_at_",
    "spec_label",
    "to_packed_",
    "unquantize_",
    "why_not_integer",
    "without_search",
]
