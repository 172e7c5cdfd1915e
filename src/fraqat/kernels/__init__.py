"""Engines that compute the scaled integer product, and the table that picks one per shape."""

from fraqat.kernels.engine import (
    ENGINES,
    EngineChoice,
    EngineName,
    EngineTable,
    PreparedWeight,
    ProductShape,
    scaled_product,
)
from fraqat.kernels.product import Engine, Operands

__all__ = [
    "ENGINES",
    "Engine",
    "EngineChoice",
    "EngineName",
    "EngineTable",
    "Operands",
    "PreparedWeight",
    "ProductShape",
    "scaled_product",
]
