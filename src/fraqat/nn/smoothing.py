"""Smoothing of a layer's input: x / s before the quantizer, W diag(s) in place of W, so that outliers move into the weight.

The product stays what it was: (x / s) (W diag(s))^T = x W^T.

Shape suffixes: O output channels, K input channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fraqat.errors import config_error
from fraqat.nn.quantizers import KeepsBufferDtype
from fraqat.nn.spec import STRICT_KEYS

_EXPONENTS = tuple(step / 20 for step in range(1, 20))
_LEAST_FACTOR = 1e-4


@dataclass(frozen=True)
class SmoothingSpec:
    """How the factors of every layer are chosen: s = max|x|^a / max|w|^(1 - a) per input channel (SVDQuant, arXiv 2411.05007).

    Args:
        exponents: The grid of a; the one with the least error of the layer's output over the calibration data is taken.
        activation_only: Try s = max|x|^a for every a too, as SVDQuant's authors do.
        includes_none: Try s = 1 too.
        momentum: How max|x| is gathered. None: the maximum over all calibration data, as SVDQuant and the published code of
            DiTAS (arXiv 2409.07756) have it, whose data are all steps of the sampler. A number m: an exponential average
            over the calibration samples in their order, which for diffusion is that of the sampler's steps:
            m * average + (1 - m) * maximum of the next sample, so that no single step decides.
        num_tokens: Tokens of every layer's input that are kept to measure errors on, spread evenly over the data.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    exponents: tuple[float, ...] = _EXPONENTS
    activation_only: bool = False
    includes_none: bool = True
    momentum: float | None = None
    num_tokens: int = 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponents", tuple(float(value) for value in self.exponents))
        if not self.exponents or not all(0 <= value <= 1 for value in self.exponents):
            raise config_error(
                "smoothing.exponents", list(self.exponents), allowed="one or more numbers from 0 to 1", fix="use [0.5]"
            )
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise config_error(
                "smoothing.momentum", self.momentum, allowed="null, or from 0 up to but not 1", fix="use 0.9"
            )
        if self.num_tokens < 1:
            raise config_error("smoothing.num_tokens", self.num_tokens, allowed="1 or more", fix="use 1024")

    def candidates(self) -> tuple[tuple[float, float], ...]:
        """The pairs (a, b) of s = max|x|^a / max|w|^b that are tried, in order; (0, 0) is no smoothing."""
        none = ((0.0, 0.0),) if self.includes_none else ()
        alone = tuple((a, 0.0) for a in self.exponents if a > 0) if self.activation_only else ()
        return (*none, *alone, *((a, round(1 - a, 9)) for a in self.exponents))


class InputSmoothing(KeepsBufferDtype):
    """Divides the input of a layer by a factor per channel.

    Buffer: `scale`, float32 [K], saved; ones until `initialize_branches_` sets it.

    Args:
        spec: How it is chosen.
        weight: Of the layer, [O, K] or [O, K, 1, 1].
    """

    scale: Tensor

    def __init__(self, spec: SmoothingSpec, weight: Tensor):
        super().__init__()
        self.spec = spec
        self.shape = weight.shape[1:]
        self.register_buffer("scale", torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x / s, of the shape and dtype of x: [..., K], or [..., K, H, W] for a convolution; divided in float32 or wider."""
        return (x.to(torch.promote_types(x.dtype, torch.float32)) / self.scale.view(self.shape)).to(x.dtype)


def smoothing_factors(x_max_K: Tensor, w_max_K: Tensor, exponents: tuple[float, float]) -> Tensor:
    """s = max|x|^a / max|w|^b (SVDQuant, arXiv 2411.05007, section 4.2, after SmoothQuant, arXiv 2211.10438, Eq. 4).

    Args:
        x_max_K: Largest magnitude per input channel, float32.
        w_max_K: The same of the weight's columns.
        exponents: a and b.

    Returns:
        float32 [K], 10^-4 or more; 1 where the channel of input or weight is zero throughout.
    """
    a, b = exponents
    factors_K = (x_max_K.double() ** a / w_max_K.double() ** b).float().clamp(min=_LEAST_FACTOR)
    is_usable = (x_max_K > 0) & (w_max_K > 0) & torch.isfinite(factors_K)
    return torch.where(is_usable, factors_K, torch.ones_like(factors_K))


class ChannelMaximum:
    """Largest magnitude per input channel over the calibration data.

    Args:
        momentum: As in `SmoothingSpec`.
    """

    def __init__(self, momentum: float | None):
        self.momentum = momentum
        self.value_K: Tensor | None = None

    def update(self, x_TK: Tensor) -> None:
        """Takes in one batch."""
        largest_K = x_TK.detach().abs().amax(0).float()
        if self.value_K is None:
            self.value_K = largest_K
        elif self.momentum is None:
            self.value_K = torch.maximum(self.value_K, largest_K)
        else:
            self.value_K = self.momentum * self.value_K + (1 - self.momentum) * largest_K
