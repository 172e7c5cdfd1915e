"""Rotation of what an attention passes on, merged into the weights around it.

An attention adds up values with weights that come from queries and keys, so it is linear in the values: turning every head's
values by an orthogonal R and turning them back where they are read changes nothing, sum a (v R) R^T = sum a v. Both turns are
matrix products with weights that are there anyway, so layers and cost stay the same. Outliers of a channel are spread over its
head, which narrows the ranges that quantization has to cover (QuaRot, arXiv 2404.00456).

Shape suffixes: H heads, D and E channels of a head, I input channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fraqat.errors import check_seed, config_error
from fraqat.nn.spec import STRICT_KEYS

RotationKind = Literal["hadamard", "random"]


@dataclass(frozen=True)
class RotationSpec:
    """Which orthogonal matrix turns the channels of a head.

    Args:
        kind: `hadamard`: entries of one size with random signs, so that every channel takes an equal part; where the channels
            are no power of two, the product of a Hadamard matrix and a random one. `random`: drawn evenly from all rotations.
        seed: Of signs and random matrices.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    kind: RotationKind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(RotationKind):
            raise config_error(
                "rotation.kind", self.kind, allowed=", ".join(get_args(RotationKind)), fix="use hadamard"
            )
        check_seed("rotation.seed", self.seed)


@dataclass(frozen=True)
class ValuePath:
    """The layers between which one attention is linear.

    Args:
        name: Of the attention.
        values: Layers whose output channels are the values, head after head.
        readers: Layers that read the attention's result, each with the first of its input channels that are the heads'.
        head_size: Channels of a head, D.
        num_heads: Heads of the result; those of the values may be fewer (grouped queries).
    """

    name: str
    values: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]
    head_size: int
    num_heads: int


@torch.no_grad()
def rotate_value_paths_(model: nn.Module, paths: Sequence[ValuePath], spec: RotationSpec) -> None:
    """Turns the values of every path, and turns them back in the layers that read them; the model computes what it did.

    Args:
        model: Not quantized yet.
        paths: Of the model; every path gets a matrix of its own, the same for all its heads.
        spec: Which matrix.

    Raises:
        ConfigError: A layer that is no plain `nn.Linear`, has another shape than its path says, or shares its weight with
            another module; nothing is changed.

    Numerics: products in float64, rounded once to the weights' precision.
    """
    for path in paths:
        _check(model, path)
    generator = torch.Generator().manual_seed(spec.seed)
    for path in paths:
        rotation_DE = orthogonal(path.head_size, spec.kind, generator)
        for name in path.values:
            _turn_outputs_(_linear(model, name), rotation_DE)
        for name, first in path.readers:
            _turn_inputs_(_linear(model, name), rotation_DE, first, path.num_heads)


def orthogonal(size: int, kind: RotationKind, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size] in float64.

    Args:
        size: 1 or more.
        kind: See `RotationSpec`.
        generator: Of its signs or entries.
    """
    if kind == "random":
        return _random_orthogonal(size, generator)
    power = size & -size  # the largest power of two that divides it
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power.bit_length() - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = torch.kron(matrix / power**0.5, _random_orthogonal(size // power, generator))
    signs = torch.randint(2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * matrix


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """The Q of a normal matrix, with the signs that make it evenly distributed."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()


def _turn_outputs_(layer: nn.Linear, rotation_DE: Tensor) -> None:
    size = len(rotation_DE)
    weight_HDI = layer.weight.double().unflatten(0, (-1, size))
    layer.weight.copy_(torch.einsum("hdi,de->hei", weight_HDI, rotation_DE.to(layer.weight.device)).flatten(0, 1))
    bias = cast("Tensor | None", layer.bias)
    if bias is not None:
        bias_HD = bias.double().unflatten(0, (-1, size))
        bias.copy_((bias_HD @ rotation_DE.to(bias.device)).flatten())


def _turn_inputs_(layer: nn.Linear, rotation_DE: Tensor, first: int, num_heads: int) -> None:
    part = layer.weight[:, first : first + num_heads * len(rotation_DE)]
    weight_OHD = part.double().unflatten(1, (num_heads, -1))
    part.copy_((weight_OHD @ rotation_DE.to(part.device)).flatten(1))


def _check(model: nn.Module, path: ValuePath) -> None:
    width = path.num_heads * path.head_size
    for name in path.values:
        found = _linear(model, name).out_features
        if found % path.head_size or width % found:
            _refuse(name, f"{found} output channels", f"whole heads of {path.head_size} that divide {width}")
    for name, first in path.readers:
        if _linear(model, name).in_features < first + width:
            _refuse(name, f"{_linear(model, name).in_features} input channels", f"{first + width} or more")
    for name in (*path.values, *(name for name, _ in path.readers)):
        _check_alone(model, name)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    if type(layer) is not nn.Linear:
        _refuse(name, type(layer).__name__, "a plain nn.Linear that is not quantized yet")
    return cast(nn.Linear, layer)


def _check_alone(model: nn.Module, name: str) -> None:
    """A weight that another module uses too would be turned there as well."""
    weight = _linear(model, name).weight
    users = [user for user, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    if len(users) > 1:
        _refuse(name, f"shared by {', '.join(users)}", "a weight of its own")


def _refuse(name: str, found: str, allowed: str) -> None:
    raise config_error(f"rotation of {name}", found, allowed=allowed, fix="set quantization.rotation: null")
