"""What a student quantized by `fraqat.nn.quantize_` asks of each layer, in words that another library's quantizer has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fraqat.errors import config_error
from fraqat.nn import QuantPointwiseConv, QuantSpec, quantized_layers
from fraqat.numerics import Granularity

_LEAST_BITS, _MOST_BITS = 2, 8
_FLOAT_FROM_BITS = 16


@dataclass(frozen=True)
class LayerScheme:
    """How a layer is quantized, as far as a peer can say it.

    Args:
        bits: Whole width of the weight, 2 to 8.
        group_size: Input channels that share a scale; None for one scale per output channel.
        has_int8_inputs: Whether inputs are quantized to 8 bits per token; else they stay in floating point.
    """

    bits: int
    group_size: int | None
    has_int8_inputs: bool


@dataclass(frozen=True)
class PeerLayer:
    """One layer that a peer quantizes.

    Args:
        name: Qualified name in the model.
        scheme: How.
        is_pointwise_conv: A 1x1 `nn.Conv2d`; else an `nn.Linear`.
        is_trained: Whether its weight wants a gradient.
    """

    name: str
    scheme: LayerScheme
    is_pointwise_conv: bool
    is_trained: bool


def peer_layers(student: nn.Module) -> tuple[PeerLayer, ...]:
    """The layers of a quantized student, in its order. What is not among them is in floating point, for the peer too.

    Args:
        student: Changed by `quantize_`; what counts is each layer's final width.

    Raises:
        ConfigError: The model is not quantized, has low-rank adapters, branches or smoothed inputs, or a layer asks for what
            torchao has no name for: a fractional or asymmetric weight, one scale per tensor, inputs other than 8 bits per token
            or 16 bits.
    """
    layers = list(quantized_layers(student))
    if not layers:
        raise config_error("student", type(student).__name__, allowed="a quantized model", fix="call quantize_ first")
    if any(layer.adapter is not None for _, layer in layers):
        raise config_error(
            "train.low_rank", "adapters", allowed="null: peers train the weights", fix="use a student without adapters"
        )
    if any(layer.has_extras for _, layer in layers):
        raise config_error(
            "student",
            "low-rank branches or smoothed inputs",
            allowed="quantized layers alone: peers have neither",
            fix="make the peer's student from a recipe without them",
        )
    return tuple(
        PeerLayer(name, _scheme(name, layer.spec), isinstance(layer, QuantPointwiseConv), layer.weight.requires_grad)
        for name, layer in layers
    )


def _scheme(name: str, spec: QuantSpec) -> LayerScheme:
    weight, activation = spec.weight, spec.activation
    if not (float(weight.bits).is_integer() and _LEAST_BITS <= weight.bits <= _MOST_BITS):
        raise _unnamed(name, "weight.bits", weight.bits, f"a whole number from {_LEAST_BITS} to {_MOST_BITS}")
    if not weight.symmetric:
        raise _unnamed(name, "weight.symmetric", False, "true")
    if weight.granularity not in (Granularity.CHANNEL, Granularity.GROUP):
        raise _unnamed(name, "weight.granularity", weight.granularity.value, "channel or group")
    if activation is None or activation.bits >= _FLOAT_FROM_BITS:
        return LayerScheme(int(weight.bits), weight.group_size, has_int8_inputs=False)
    is_per_token = activation.granularity is Granularity.TOKEN and not activation.static
    if activation.bits != _MOST_BITS or not is_per_token:
        label = f"{activation.bits:g} bits, {'static ' if activation.static else ''}{activation.granularity.value}"
        raise _unnamed(name, "activation", label, "8 bits per token at run time, or 16 bits and more")
    return LayerScheme(int(weight.bits), weight.group_size, has_int8_inputs=True)


def _unnamed(layer: str, name: str, value: object, allowed: str) -> Exception:
    return config_error(
        f"layer {layer}: {name}", value, allowed=f"{allowed} for a peer", fix="compare at another setting"
    )
