"""Integer grids for a real bit width: the paper's Eq. 1 (symmetric) and Eq. 2 (asymmetric), arXiv 2510.14823."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fraqat.errors import config_error

MAX_BITS = 32.0
FLOAT32_EXACT_BITS = 24.0
"""Above this width float32 cannot hold every code, so the computation moves to float64."""


@dataclass(frozen=True)
class Grid:
    """The set of integer codes that a real bit width `b` allows, and the divisor that turns a range into a scale.

    | | symmetric (Eq. 1) | asymmetric (Eq. 2) |
    | --- | --- | --- |
    | codes | [-floor(2^(b-1)), floor(2^(b-1)) - 1] | [0, floor(2^b) - 1] |
    | scale | max abs / (2^(b-1) - 1) | (max - min) / 2^b |

    The clamping rule is the floor in the first row: a fractional width gives the codes of the largest integer count that
    fits (5.5 bits -> [-22, 21]). The scale keeps the real-valued divisor, so the largest value may fall up to one step
    outside the codes and is clipped; this is the paper's definition and it is kept.

    Below log2(3) = 1.585 bits Eq. 1 rounds every value to zero, because its divisor is below one half.

    Args:
        bits: Real bit width: (1, 32] if symmetric, [1, 32] if asymmetric. At b = 1 Eq. 1 divides by zero.
        symmetric: Eq. 1 if true, Eq. 2 otherwise.
        narrow: Drop the most negative code, so that the grid is its own mirror image (4 bits -> [-7, 7]), which most
            integer accelerators need. Symmetric grids of at least 2 bits only.

    Raises:
        ConfigError: A width outside the range, or a narrow grid that cannot be.
    """

    bits: float
    symmetric: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | float) or not math.isfinite(self.bits):
            raise config_error("bits", self.bits, allowed="a finite number", fix="give a width such as 4 or 4.5")
        lowest_is_open = self.symmetric
        if self.bits > MAX_BITS or self.bits < 1 or (lowest_is_open and self.bits == 1):
            allowed = "1 < bits <= 32 (symmetric, Eq. 1)" if self.symmetric else "1 <= bits <= 32 (asymmetric, Eq. 2)"
            raise config_error(
                "bits", self.bits, allowed=allowed, fix="choose a wider grid, or symmetric=False for 1 bit"
            )
        if self.narrow and not (self.symmetric and self.bits >= 2):
            raise config_error(
                "narrow", True, allowed="a symmetric grid of at least 2 bits", fix="set narrow=False or widen the grid"
            )

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if not self.symmetric:
            return 0
        return -math.floor(2.0 ** (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """Largest code."""
        exponent = self.bits - 1 if self.symmetric else self.bits
        return math.floor(2.0**exponent) - 1

    @property
    def range_divisor(self) -> float:
        """What the range is divided by to give the scale: 2^(b-1) - 1 (Eq. 1) or 2^b (Eq. 2)."""
        return 2.0 ** (self.bits - 1) - 1.0 if self.symmetric else 2.0**self.bits

    @property
    def num_levels(self) -> int:
        """How many codes the grid has."""
        return self.qmax - self.qmin + 1

    @property
    def storage_bits(self) -> int:
        """Whole bits that one code needs in a file (5.5 bits: 44 codes, 6 bits)."""
        return max(1, math.ceil(math.log2(self.num_levels)))

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32 up to 24 bits; float64 above, where float32 would lose codes."""
        return torch.float32 if self.bits <= FLOAT32_EXACT_BITS else torch.float64
