"""Encodings as JSON beside the float graph, in the three versions that Qualcomm's tools read (AIMET's format)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fraqat.export.onnx.encodings import Array, Encoding, Encodings, WeightEncoding

DEFAULT_VERSION = "1.0.0"
Json = dict[str, Any]


def encodings_json(encodings: Encodings, version: str = DEFAULT_VERSION) -> Json:
    """The grids of a float graph by tensor name.

    Args:
        encodings: Of every tensor.
        version: A key of `VERSIONS`.
    """
    return VERSIONS[version](encodings)


def _version_0_6_1(encodings: Encodings) -> Json:
    return {
        "version": "0.6.1",
        "activation_encodings": {name: [_activation_0(item)] for name, item in encodings.activations.items()},
        "param_encodings": {name: _weight_0(item) for name, item in encodings.weights.items()},
    }


def _activation_0(item: Encoding) -> Json:
    return {
        "bitwidth": item.bits,
        "dtype": "int",
        "is_symmetric": "False",
        "min": item.low,
        "max": item.high,
        "scale": item.scale,
        "offset": -item.zero_point,
    }


def _weight_0(item: WeightEncoding) -> list[Json]:
    lowest = -(2 ** (item.bits - 1))
    return [
        {
            "bitwidth": item.bits,
            "dtype": "int",
            "is_symmetric": "True",
            "min": lowest * scale,
            "max": (-lowest - 1) * scale,
            "scale": scale,
            "offset": lowest,
        }
        for scale in _floats(item.scale_O)
    ]


def _version_1_0_0(encodings: Encodings) -> Json:
    return {
        "version": "1.0.0",
        "activation_encodings": [
            {
                "name": name,
                "dtype": "INT",
                "bw": item.bits,
                "is_sym": False,
                "enc_type": "PER_TENSOR",
                "scale": [item.scale],
                "offset": [-item.zero_point],
            }
            for name, item in encodings.activations.items()
        ],
        "param_encodings": [
            {
                "name": name,
                "dtype": "INT",
                "bw": item.bits,
                "is_sym": True,
                "enc_type": "PER_CHANNEL",
                "scale": _floats(item.scale_O),
                "offset": [-(2 ** (item.bits - 1))] * len(item.scale_O),
            }
            for name, item in encodings.weights.items()
        ],
    }


def _version_2_0_0(encodings: Encodings) -> Json:
    weights = [
        {"name": name, "output_dtype": f"int{item.bits}", "y_scale": _floats(item.scale_O), "axis": item.axis}
        for name, item in encodings.weights.items()
    ]
    activations = [
        {"name": name, "output_dtype": f"uint{item.bits}", "y_scale": item.scale, "y_zero_point": item.zero_point}
        for name, item in encodings.activations.items()
    ]
    return {"version": "2.0.0", "encodings": [*weights, *activations]}


def _floats(scale_O: Array) -> list[float]:
    return [float(scale) for scale in scale_O]


VERSIONS: Mapping[str, Callable[[Encodings], Json]] = MappingProxyType(
    {"0.6.1": _version_0_6_1, "1.0.0": _version_1_0_0, "2.0.0": _version_2_0_0}
)
