"""The one place where peers touch torchao: its fake quantizers, its PARQ optimizer and its quantized tensors.

Shape suffixes: N samples, H and W pixels, I and O channels in and out, T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.baselines.layers import LayerScheme, PeerLayer
from fraqat.distill import TrainSpec
from fraqat.errors import config_error
from fraqat.nn.layers import pointwise_forward
from fraqat.quiet import quiet_torchao


@dataclass(frozen=True)
class ParqSpec:
    """Settings of PARQ (piecewise-affine regularized quantization, arXiv 2503.15748).

    Args:
        anneal_start, anneal_end: Shares of the run, 0 <= start < end <= 1, between which the proximal map turns from the
            identity into rounding; from the end on, weights are on their levels.
        steepness: Of the sigmoid between the two; torchao's default.
        quant_period: Steps between two computations of the levels; 1 in torchao's `create_optimizer`.
    """

    anneal_start: float = 0.0
    anneal_end: float = 0.3
    steepness: float = 10.0
    quant_period: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.anneal_start < self.anneal_end <= 1:
            shares = (self.anneal_start, self.anneal_end)
            raise config_error("parq.anneal", shares, allowed="0 <= start < end <= 1", fix="try 0 and 0.3")
        if self.steepness <= 0:
            raise config_error("parq.steepness", self.steepness, allowed="more than 0", fix="try 10")
        if self.quant_period < 1:
            raise config_error("parq.quant_period", self.quant_period, allowed="1 or more", fix="use 1")


class FakeQuantizedPointwiseConv(nn.Conv2d):
    """A 1x1 convolution with torchao's fake quantizers, which has none of its own: a pixel is a token.

    Attributes:
        activation_fake_quantizer: Takes [N, H, W, I]; None leaves inputs as they are.
        weight_fake_quantizer: Takes [O, I]; None leaves the weight as it is.
    """

    activation_fake_quantizer: nn.Module | None
    weight_fake_quantizer: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        """Returns [N, O, H', W'] for input [N, I, H, W] or [I, H, W]."""
        return pointwise_forward(self, self._operands, input)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        if self.weight_fake_quantizer is not None:
            weight = self.weight_fake_quantizer(weight.flatten(1)).view_as(weight)
        return x, weight


def prepare_qat_(model: nn.Module, layers: Sequence[PeerLayer], *, has_weights: Callable[[PeerLayer], bool]) -> None:
    """torchao's prepare step (`QATConfig`), in place: layers fake-quantize their weight and their input.

    Weights: symmetric, scale = largest magnitude / 7.5, codes -8 to 7 at 4 bits. Inputs: int8 per token, asymmetric with an
    integer zero point (torchao has no symmetric one).

    Args:
        model: With float layers. Linear layers are replaced by torchao's, which hold the same parameters.
        layers: What is quantized and how.
        has_weights: Whether the weight of a layer is fake-quantized; else its input alone.

    Raises:
        ConfigError: torchao is not installed.
    """
    _check_torchao()
    with quiet_torchao():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
        from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    def weight_config(scheme: LayerScheme) -> Any:
        dtype = getattr(torch, f"int{scheme.bits}")
        if scheme.group_size is None:
            return IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True)
        return IntxFakeQuantizeConfig(dtype, group_size=scheme.group_size, is_symmetric=True)

    for (scheme, with_weight, is_conv), names in _grouped(layers, has_weights).items():
        weight = weight_config(scheme) if with_weight else None
        inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if scheme.has_int8_inputs else None
        if weight is None and inputs is None:
            continue
        if is_conv:
            for name in names:
                conv = cast(Any, model.get_submodule(name))
                conv.__class__ = FakeQuantizedPointwiseConv
                conv.activation_fake_quantizer = None if inputs is None else FakeQuantizerBase.from_config(inputs)
                conv.weight_fake_quantizer = None if weight is None else FakeQuantizerBase.from_config(weight)
            continue
        config: Any = QATConfig(activation_config=inputs, weight_config=weight, step=cast(Any, "prepare"))
        with quiet_torchao():  # it imports more at the first call
            quantize_(model, config, filter_fn=_is_one_of(names))
    _unfuse_encoders_(model)


def quantize_tensors_(model: nn.Module, layers: Sequence[PeerLayer]) -> None:
    """torchao's post-training quantization, in place: weights become its tensors of integers.

    `Int8DynamicActivationIntxWeightConfig` where inputs have 8 bits, else `IntxWeightOnlyConfig`, both in the format
    `unpacked_to_int8`, whose arithmetic runs everywhere: integers times scales, and the product in floating point. The
    grids are those of `prepare_qat_`, zero points in int8. 1x1 convolutions get `prepare_qat_`'s fake quantizers: torchao's
    tensor would take a row of pixels of one channel for a token.

    Args:
        model: With float layers.
        layers: What is quantized and how.

    Raises:
        ConfigError: torchao is not installed.
    """
    _check_torchao()
    with quiet_torchao():
        from torchao.quantization import (
            Int8DynamicActivationIntxWeightConfig,
            IntxWeightOnlyConfig,
            PerAxis,
            PerGroup,
            quantize_,
        )

    linear = [layer for layer in layers if not layer.is_pointwise_conv]
    for (scheme, _, _), names in _grouped(linear, lambda _: True).items():
        dtype = getattr(torch, f"int{scheme.bits}")
        granularity = PerAxis(0) if scheme.group_size is None else PerGroup(scheme.group_size)
        config: Any = (
            Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
            if scheme.has_int8_inputs
            else IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
        )
        quantize_(model, config, filter_fn=_is_one_of(names))
    prepare_qat_(model, [layer for layer in layers if layer.is_pointwise_conv], has_weights=lambda _: True)


class ParqOptimizer:
    """torchao's `QuantOptimizer` with `ProxPARQ` around AdamW, with what the training loop calls.

    It keeps a float copy of every quantized weight; the model holds what the proximal map makes of it.

    Args:
        model: Its parameters that want a gradient are trained.
        layers: Those whose weights are quantized; frozen ones are left alone.
        spec: AdamW's settings.
        parq: PARQ's settings.
        num_steps: Length of the run, 2 or more.

    Raises:
        ConfigError: torchao is not installed; another optimizer than AdamW beside the model; fewer than 2 steps; a weight
            that a module outside `layers` uses too; group scales in a convolution.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PeerLayer], spec: TrainSpec, parq: ParqSpec, num_steps: int):
        _check_torchao()
        _check_parq(model, layers, spec, num_steps)
        with quiet_torchao():
            from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
            from torchao.prototype.parq.quant import UnifTorchaoQuantizer
        groups, schemes = _parq_groups(model, layers)
        base = torch.optim.AdamW(
            groups,
            lr=spec.learning_rate.peak,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        # The last step, counted from 0, must be at the end of the annealing or behind it.
        end = min(num_steps - 1, max(1, round(parq.anneal_end * num_steps)))
        start = min(end - 1, round(parq.anneal_start * num_steps))
        quantizers = {
            index: UnifTorchaoQuantizer(quant_min=-(2 ** (scheme.bits - 1)), quant_max=2 ** (scheme.bits - 1) - 1)
            for index, scheme in enumerate(schemes)
        }
        self._inner: Any = QuantOptimizer(
            base,
            UnifTorchaoQuantizer(),  # of no group: each has its own
            ProxPARQ(start, end, parq.steepness),
            quant_period=parq.quant_period,
            quant_per_channel=True,
            group_quantizer_map=cast(Any, quantizers),
        )

    def set_learning_rate_(self, learning_rate: float) -> None:
        """Takes effect at the next step."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate

    def zero_grad(self) -> None:
        """Lets the gradients leave memory."""
        self._inner.zero_grad(set_to_none=True)

    def step(self) -> None:
        """AdamW on the float copies, then the proximal map."""
        self._inner.step()


def _check_torchao() -> None:
    if find_spec("torchao") is None:
        raise config_error(
            "peer", "torchao", allowed="peers whose library is installed", fix="pip install 'fraqat[optimizers]'"
        )


def _grouped(
    layers: Sequence[PeerLayer], has_weights: Callable[[PeerLayer], bool]
) -> dict[tuple[LayerScheme, bool, bool], set[str]]:
    """(scheme, whether the weight is fake-quantized, whether a convolution) -> names: torchao takes one config at a time."""
    groups: dict[tuple[LayerScheme, bool, bool], set[str]] = defaultdict(set)
    for layer in layers:
        groups[layer.scheme, has_weights(layer), layer.is_pointwise_conv].add(layer.name)
    return groups


def _is_one_of(names: set[str]) -> Callable[[nn.Module, str], bool]:
    return lambda module, name: name in names


def _unfuse_encoders_(model: nn.Module) -> None:
    """In evaluation `nn.TransformerEncoderLayer` reads the weights of its linear layers and would skip fake quantizers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def _check_parq(model: nn.Module, layers: Sequence[PeerLayer], spec: TrainSpec, num_steps: int) -> None:
    if spec.optimizer != "adamw" or spec.optimizer_device != "same":
        value = f"{spec.optimizer} on the {spec.optimizer_device} device"
        raise config_error(
            "train.optimizer", value, allowed="adamw, same, around which PARQ is", fix="use these for all methods"
        )
    if num_steps <= 1:
        raise config_error("num_steps", num_steps, allowed="2 or more with PARQ", fix="train longer")
    if any(layer.is_pointwise_conv and layer.scheme.group_size is not None for layer in layers if layer.is_trained):
        raise config_error(
            "weight.granularity", "group", allowed="channel for convolutions with PARQ", fix="compare at channel"
        )
    quantized = {f"{layer.name}.weight" for layer in layers}
    chosen = {id(model.get_parameter(name)) for name in quantized}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in chosen and name not in quantized:
            raise config_error(
                "peer", f"{name} is tied to a quantized weight", allowed="weights with one user", fix="skip that layer"
            )


def _parq_groups(model: nn.Module, layers: Sequence[PeerLayer]) -> tuple[list[dict[str, Any]], list[LayerScheme]]:
    """Groups of parameters, the quantized ones first, and the schemes of these."""
    by_scheme: dict[LayerScheme, list[nn.Parameter]] = defaultdict(list)
    for layer in layers:
        if layer.is_trained:
            by_scheme[layer.scheme].append(model.get_parameter(f"{layer.name}.weight"))
    if not by_scheme:
        raise config_error("peer", "parq", allowed="a student with a trained quantized layer", fix="free a family")
    groups: list[dict[str, Any]] = []
    for scheme, parameters in by_scheme.items():
        unique = list({id(parameter): parameter for parameter in parameters}.values())
        block = {} if scheme.group_size is None else {"quant_block_size": scheme.group_size}
        groups.append({"params": unique, "quant_bits": scheme.bits, **block})
    chosen = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return [*groups, *([{"params": rest}] if rest else [])], list(by_scheme)
