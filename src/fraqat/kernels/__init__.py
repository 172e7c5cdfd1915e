"""Engines that compute the scaled integer product, and the table that picks one per shape."""

from fraqat.kernels.blocks import row_blocks
from fraqat.kernels.engine import (
    EngineChoice,
    EngineName,
    EngineTable,
    PreparedWeight,
    ProductShape,
    engines_for,
    scaled_product,
)
from fraqat.kernels.gradients import centred_codes, has_native_gradients, input_gradient, weight_gradient
from fraqat.kernels.product import Engine, Operands
from fraqat.kernels.quantize import quantize_stochastic, quantize_tokens, quantize_weight

__all__ = [
    "Engine",
    "EngineChoice",
    "EngineName",
    "EngineTable",
    "Operands",
    "PreparedWeight",
    "ProductShape",
    "centred_codes",
    "engines_for",
    "has_native_gradients",
    "input_gradient",
    "quantize_stochastic",
    "quantize_tokens",
    "quantize_weight",
    "row_blocks",
    "scaled_product",
    "weight_gradient",
]
