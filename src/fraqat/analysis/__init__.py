"""Where quantization hurts."""

from fraqat.analysis.layer_error import LayerError, layer_errors

__all__ = ["LayerError", "layer_errors"]
