"""What a layer is quantized to (`QuantSpec`), and rules that change it for some layers (`LayerRule`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fraqat.errors import config_error, parse_choice
from fraqat.numerics import (
    ACTIVATION_GRANULARITIES,
    DEFAULT_PERCENTILE,
    NEEDS_HISTOGRAM,
    WEIGHT_GRANULARITIES,
    BlockLayout,
    Granularity,
    Grid,
    RangeMethod,
    ZeroPoint,
)

STRICT_KEYS: dict[str, Any] = {"extra": "forbid"}
"""For recipe readers (pydantic): a key that a section does not know is an error."""

ScaleDtype = Literal["float32", "bfloat16", "float16"]
GroupScale = Literal["float", "integer"]
_SCALE_DTYPES: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_GROUP_SCALES: tuple[GroupScale, ...] = ("float", "integer")


@dataclass(frozen=True)
class WeightSpec:
    """How the weight of a layer is quantized.

    Args:
        bits: Width of the finished model; during training a schedule may set any width from 32 down to it.
        granularity: `tensor`, `channel` (one scale per output channel) or `group`.
        group_size: Input channels that share a scale, with granularity `group`.
        symmetric: Eq. 1 if true, Eq. 2 otherwise.
        narrow: Drop the lowest code: [-7, 7] at 4 bits.
        range_method: `max_abs` (the paper's), `min_max`, `three_sigma`, or `mse`: the share of max-abs that minimises the
            squared error, searched at the start and at every change of the width, and kept in between; `learned`: scales
            that start from `mse` and are trained with the weights (LSQ), on symmetric grids.
        scale_dtype: `bfloat16` rounds the scale so that it is exact in fp32, bf16 and, from 2^-17 on, fp16 targets; `float16`
            rounds less and is exact in fp16 whatever the scale (GGUF), but not in bf16.
        group_scale: With granularity `group`: `float`, a scale of its own for every group; `integer`, a float scale per output
            channel times a small whole number per group, so that code * multiplier fits in int8 and the layer can be one
            integer product (see `fraqat.numerics.integer_group_scales`). Symmetric grids only, and not with `learned`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    bits: float = 4.0
    granularity: Granularity = Granularity.CHANNEL
    group_size: int | None = None
    symmetric: bool = True
    narrow: bool = False
    range_method: RangeMethod = RangeMethod.MAX_ABS
    scale_dtype: ScaleDtype = "float32"
    group_scale: GroupScale = "float"

    def __post_init__(self) -> None:
        object.__setattr__(self, "granularity", parse_choice("granularity", self.granularity, Granularity))
        object.__setattr__(self, "range_method", parse_choice("range_method", self.range_method, RangeMethod))
        _check_granularity("weight.granularity", self.granularity, WEIGHT_GRANULARITIES)
        _check_scale_dtype(self.scale_dtype)
        self.grid(self.bits)
        self.layout()
        if self.range_method is RangeMethod.PERCENTILE:
            raise config_error(
                "weight.range_method",
                "percentile",
                allowed="max_abs, min_max, three_sigma, mse, learned",
                fix="use mse; percentile is for static activations",
            )
        if self.range_method is RangeMethod.LEARNED and not self.symmetric:
            raise config_error(
                "weight.range_method", "learned", allowed="symmetric grids", fix="set symmetric: true, or use mse"
            )
        self._check_group_scale()

    def _check_group_scale(self) -> None:
        name = "weight.group_scale"
        if self.group_scale not in _GROUP_SCALES:
            raise config_error(name, self.group_scale, allowed=", ".join(_GROUP_SCALES), fix="choose one of these")
        if self.group_scale == "float":
            return
        if self.granularity is not Granularity.GROUP:
            raise config_error(
                name, "integer", allowed="granularity: group", fix="set granularity: group and group_size"
            )
        if not self.symmetric:
            raise config_error(name, "integer", allowed="symmetric grids", fix="set symmetric: true")
        if self.range_method is RangeMethod.LEARNED:
            raise config_error(
                name, "integer", allowed="scales that are measured", fix="use range_method: mse, or group_scale: float"
            )

    def grid(self, bits: float) -> Grid:
        """The grid of this spec at another width."""
        return Grid(bits, self.symmetric, self.narrow)

    def layout(self) -> BlockLayout:
        """Which weights share a scale."""
        return BlockLayout(self.granularity, self.group_size)

    @property
    def rounding_dtype(self) -> torch.dtype | None:
        """The dtype that scales are rounded to, None for float32."""
        return _SCALE_DTYPES[self.scale_dtype]


@dataclass(frozen=True)
class ActivationSpec:
    """How the input of a layer is quantized.

    Args:
        bits: Width, 8 by default; 16 stands for the accelerators' 16-bit integers.
        granularity: `token` (one scale per position), `sample` (one per element of the batch) or `tensor`.
        static: Scale fixed by `calibrate_` before training instead of measured at run time; granularity must be `tensor`.
        symmetric: Eq. 1 if true. If false: Eq. 2 when dynamic, an integer zero point when static (accelerators' uint8).
        range_method: `max_abs`, `min_max` or `three_sigma` (the paper's inlier rule for static scales); for static inputs
            also `percentile`, or `mse`: the extremes shrunk so that the error over the calibration samples is least.
        percentile: Share of the values inside the range in %, with range method `percentile`; either end loses as much.
        scale_dtype: As for weights.
        zero_point: Of an asymmetric dynamic input: `float` (Eq. 2), or an integer as the target computes it, `integer`
            (torchao) or `xnnpack`; see `fraqat.numerics.ZeroPoint`. Their scales are float32.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    bits: float = 8.0
    granularity: Granularity = Granularity.TOKEN
    static: bool = False
    symmetric: bool = True
    range_method: RangeMethod = RangeMethod.MAX_ABS
    scale_dtype: ScaleDtype = "float32"
    zero_point: ZeroPoint = ZeroPoint.FLOAT
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        object.__setattr__(self, "granularity", parse_choice("granularity", self.granularity, Granularity))
        object.__setattr__(self, "range_method", parse_choice("range_method", self.range_method, RangeMethod))
        _check_granularity("activation.granularity", self.granularity, ACTIVATION_GRANULARITIES)
        _check_scale_dtype(self.scale_dtype)
        if self.static and self.granularity is not Granularity.TENSOR:
            raise config_error(
                "activation.granularity",
                self.granularity.value,
                allowed="'tensor' when static",
                fix="set granularity: tensor",
            )
        self._check_range_method()
        self._check_zero_point()
        self.grid()

    def _check_range_method(self) -> None:
        needs_static = self.range_method in NEEDS_HISTOGRAM
        if self.range_method is RangeMethod.LEARNED or (needs_static and not self.static):
            raise config_error(
                "activation.range_method",
                self.range_method.value,
                allowed="max_abs, min_max, three_sigma; with static: true also percentile and mse",
                fix="use three_sigma",
            )
        if not 50 < self.percentile <= 100:
            raise config_error("activation.percentile", self.percentile, allowed="above 50, up to 100", fix="use 99.99")

    def _check_zero_point(self) -> None:
        object.__setattr__(self, "zero_point", parse_choice("activation.zero_point", self.zero_point, ZeroPoint))
        if self.zero_point is ZeroPoint.FLOAT:
            return
        if self.symmetric or self.static or self.scale_dtype != "float32":
            raise config_error(
                "activation.zero_point",
                self.zero_point.value,
                allowed="symmetric: false, static: false, scale_dtype: float32",
                fix="set these, or leave zero_point out (a static asymmetric input has an integer zero point anyway)",
            )

    def grid(self) -> Grid:
        """The grid of the activations."""
        return Grid(self.bits, self.symmetric)

    def layout(self, channel_axis: int) -> BlockLayout:
        """Which activations share a scale, for an input whose features lie on `channel_axis`."""
        return BlockLayout(self.granularity, channel_axis=channel_axis)

    @property
    def rounding_dtype(self) -> torch.dtype | None:
        """The dtype that scales are rounded to, None for float32."""
        return _SCALE_DTYPES[self.scale_dtype]


@dataclass(frozen=True)
class QuantSpec:
    """Weight and input of one layer. The default is W4A8: 4 bits per output channel, 8 bits per token.

    Args:
        weight: The weight's quantizer.
        activation: The input's quantizer; None leaves the input in floating point.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    weight: WeightSpec = field(default_factory=WeightSpec)
    activation: ActivationSpec | None = field(default_factory=ActivationSpec)


@dataclass(frozen=True)
class LayerRule:
    """Changes what happens to the layers that match every condition given. Rules apply in order; a later one wins.

    Args:
        pattern: Shell-style pattern on the layer's qualified name, `*` also crosses dots: `transformer_blocks.0.*`.
        module_type: `Linear` or `PointwiseConv`.
        family: `FF`, `Attn`, `TF`, `All`, or another family of the model.
        skip: Leave the layers in floating point.
        spec: A whole new specification; the single fields below then change it further.
        weight_bits, weight_granularity, group_size, activation_bits, activation_granularity: Change one field.
        trainable: False keeps the layers quantized but frozen.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    pattern: str | None = None
    module_type: Literal["Linear", "PointwiseConv"] | None = None
    family: str | None = None
    skip: bool = False
    spec: QuantSpec | None = None
    weight_bits: float | None = None
    weight_granularity: Granularity | None = None
    group_size: int | None = None
    activation_bits: float | None = None
    activation_granularity: Granularity | None = None
    trainable: bool | None = None

    def __post_init__(self) -> None:
        if self.pattern is None and self.module_type is None and self.family is None:
            raise config_error(
                "rule", self.to_text(), allowed="at least one of pattern, module_type, family", fix="add pattern: '*'"
            )

        if self.skip and not self.keeps_spec:
            raise config_error(
                "rule.skip", True, allowed="no change of bits in the same rule", fix="write a second rule for the rest"
            )

    @property
    def keeps_spec(self) -> bool:
        """Whether the rule changes nothing about how a layer is quantized, only whether it trains."""
        changes = (self.spec, self.weight_bits, self.weight_granularity, self.group_size)
        return all(c is None for c in (*changes, self.activation_bits, self.activation_granularity))

    def to_text(self) -> str:
        """The fields that are set, for messages."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shown = (
            f"{name}={value!r}" for name, value in given.items() if value not in (None, False) or name == "trainable"
        )
        return ", ".join(text for text in shown if not text.endswith("=None")) or "empty"

    def apply(self, spec: QuantSpec) -> QuantSpec:
        """Returns `spec` as this rule changes it.

        Raises:
            ConfigError: The changed specification is impossible, or an activation field is set where inputs stay float.
        """
        base = self.spec or spec
        weight_changes: dict[str, Any] = {}
        if self.weight_bits is not None:
            weight_changes["bits"] = self.weight_bits
        if self.weight_granularity is not None:
            weight_changes["granularity"] = self.weight_granularity
            weight_changes["group_size"] = self.group_size
            if self.weight_granularity is not Granularity.GROUP:
                weight_changes["group_scale"] = "float"
        elif self.group_size is not None:
            weight_changes |= {"granularity": Granularity.GROUP, "group_size": self.group_size}
        activation_changes: dict[str, Any] = {}
        if self.activation_bits is not None:
            activation_changes["bits"] = self.activation_bits
        if self.activation_granularity is not None:
            activation_changes["granularity"] = self.activation_granularity
        if activation_changes and base.activation is None:
            name, value = next(iter(activation_changes.items()))
            raise config_error(
                f"rule.activation_{name}", value, allowed="layers with quantized inputs", fix="give a whole spec"
            )
        activation = dataclasses.replace(base.activation, **activation_changes) if base.activation else None
        return QuantSpec(dataclasses.replace(base.weight, **weight_changes), activation)


def _check_granularity(name: str, value: Granularity, allowed: tuple[Granularity, ...]) -> None:
    if value not in allowed:
        names = ", ".join(item.value for item in allowed)
        raise config_error(name, value.value, allowed=names, fix=f"choose one of {names}")


def _check_scale_dtype(value: str) -> None:
    if value not in _SCALE_DTYPES:
        raise config_error("scale_dtype", value, allowed=", ".join(_SCALE_DTYPES), fix="choose one of these")
