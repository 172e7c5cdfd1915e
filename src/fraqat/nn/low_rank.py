"""Puts low-rank adapters into a quantized model, and merges them."""

from __future__ import annotations

import torch
from torch import nn

from fraqat.errors import config_error
from fraqat.nn.adapters import LowRankAdapter, LowRankSpec
from fraqat.nn.swap import quantized_layers


def add_adapters_(model: nn.Module, spec: LowRankSpec | None = None) -> int:
    """Freezes a quantized model and gives every layer whose weight was trained an adapter instead.

    The scales follow the sum of weight and product, as its range method says; they are not trained. No mask of clipped
    weights is applied: a masked gradient is not a product of thin matrices.

    Args:
        model: Changed by `quantize_`; weights may be bfloat16.
        spec: The rank.

    Returns:
        How many layers have an adapter.

    Raises:
        ConfigError: Nothing would be trained, or a layer has a learned scale, a branch or a smoothed input.
    """
    chosen = [layer for _, layer in quantized_layers(model) if layer.weight.requires_grad]
    if not chosen:
        raise config_error(
            "low_rank", "no layer", allowed="a quantized model with a trained layer", fix="free a family"
        )
    if any(layer.weight_quantizer.scale is not None for layer in chosen):
        raise config_error(
            "weight.range_method", "learned", allowed="max_abs or mse in low-rank training", fix="choose another"
        )
    if any(layer.has_extras for layer in chosen):
        raise config_error(
            "low_rank", "beside a branch", allowed="layers without branch and smoothing", fix="train without low_rank"
        )
    model.requires_grad_(False)
    for layer in chosen:
        layer.adapter = LowRankAdapter(layer.weight, (spec or LowRankSpec()).rank)
    return len(chosen)


@torch.no_grad()
def merge_adapters_(model: nn.Module) -> int:
    """Adds every product to its weight for good, so that a plain quantized model is left.

    The weights are float32 then: rounded to bfloat16 they might get other codes than those that were trained.

    Returns:
        How many layers were merged.
    """
    merged = [layer for _, layer in quantized_layers(model) if layer.adapter is not None]
    for layer in merged:
        layer.weight = nn.Parameter(layer.master_weight(), requires_grad=False)
        layer.adapter = None
    return len(merged)
