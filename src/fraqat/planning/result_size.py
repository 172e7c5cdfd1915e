"""Size of the exported result from shapes alone: the packed format's tensors, as `fraqat.export.packed` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fraqat.nn import QuantizedLayer, quantized_layers
from fraqat.numerics import code_dtype

_MAX_PACKED_BITS = 8
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ResultSize:
    """Bytes of the packed tensors; names and description add about 200 bytes per quantized layer.

    Args:
        num_code_bytes: Packed integer codes.
        num_scale_bytes: Scales and offsets of weights and static inputs.
        num_other_bytes: Everything that is not quantized.
        num_quantized_weights: Weights that became codes.
    """

    num_code_bytes: int
    num_scale_bytes: int
    num_other_bytes: int
    num_quantized_weights: int

    @property
    def num_bytes(self) -> int:
        """All tensors together."""
        return self.num_code_bytes + self.num_scale_bytes + self.num_other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Codes and scales over the quantized weights."""
        return 8 * (self.num_code_bytes + self.num_scale_bytes) / self.num_quantized_weights


def packed_size(model: nn.Module, float_dtype: torch.dtype = torch.float32, *, bits: float | None = None) -> ResultSize:
    """Size of the packed export of a quantized model at its final width; the meta device is enough.

    Args:
        model: A model changed by `quantize_`.
        float_dtype: Precision of everything that is not quantized.
        bits: Another width for all layers that end at the model's lowest or would fall below it; None is their own.
    """
    layers = dict(quantized_layers(model))
    lowest = min((layer.weight_quantizer.spec.bits for layer in layers.values()), default=None)

    def width(layer: QuantizedLayer) -> float:
        own = layer.weight_quantizer.spec.bits
        if bits is None:
            return own
        return bits if own == lowest else max(bits, own)

    return ResultSize(
        num_code_bytes=sum(_code_bytes(layer, width(layer)) for layer in layers.values()),
        num_scale_bytes=sum(_scale_bytes(layer) for layer in layers.values()),
        num_other_bytes=_other_bytes(model, layers, float_dtype),
        num_quantized_weights=sum(layer.weight.numel() for layer in layers.values()),
    )


def _code_bytes(layer: QuantizedLayer, bits: float) -> int:
    grid = layer.weight_quantizer.spec.grid(bits)
    num_rows, row_length = layer.weight.shape[0], layer.weight[0].numel()
    if grid.storage_bits > _MAX_PACKED_BITS:
        return layer.weight.numel() * code_dtype(grid).itemsize
    return num_rows * -(-row_length * grid.storage_bits // 8)


def _scale_bytes(layer: QuantizedLayer) -> int:
    spec = layer.weight_quantizer.spec
    num_scales = torch.Size(layer.weight_quantizer.layout.scale_shape(tuple(layer.weight.shape))).numel()
    computed = torch.promote_types(layer.weight.dtype, torch.float32)
    num_bytes = num_scales * (spec.rounding_dtype or computed).itemsize
    if not spec.symmetric:
        num_bytes += num_scales * computed.itemsize
    activation = layer.activation_quantizer
    if activation is not None and activation.scale is not None:
        num_bytes += _FLOAT32_BYTES * (1 if activation.zero_point is None else 2)
    return num_bytes


def _other_bytes(model: nn.Module, layers: dict[str, QuantizedLayer], dtype: torch.dtype) -> int:
    skipped = {f"{name}.weight" for name in layers}
    prefixes = tuple(f"{name}.{part}." for name in layers for part in ("weight_quantizer", "activation_quantizer"))
    prefixes += tuple(f"{name}.branch." for name, layer in layers.items() if _leaves(layer))
    tensors = {**dict(model.named_parameters()), **dict(_saved_buffers(model))}  # a tied parameter comes once
    return sum(
        tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize
        for name, tensor in tensors.items()
        if name not in skipped and not name.startswith(prefixes)
    )


def _leaves(layer: QuantizedLayer) -> bool:
    """Whether its branch is gone when training ends."""
    return layer.branch is not None and layer.branch.spec.rank_schedule.decays


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
