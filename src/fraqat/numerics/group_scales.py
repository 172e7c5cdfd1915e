"""Group scales as small integers: one float scale per output channel times a whole number per group.

code * multiplier stays within int8, so that the product of a layer with groups is one int8 product with scales per output
channel, as fast as without groups.

Shape suffixes: O output channels, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqat.numerics.granularity import BlockLayout
from fraqat.numerics.qparams import Levels, QParams, decode, encode, finish_scale

_INT8 = torch.iinfo(torch.int8)
_CLOSE = 2.0**-20
"""A quotient as close to a whole number as this is that number: two roundings of float32 made the difference."""


@dataclass(frozen=True)
class GroupScales:
    """Scales of groups: channel * multiplier.

    Args:
        channel: Positive step size of an output channel, [O, 1, 1].
        multiplier: Whole numbers in [1, `largest_multiplier`] in the dtype of `channel`, [O, G, 1].
    """

    channel: Tensor
    multiplier: Tensor

    @property
    def product(self) -> Tensor:
        """The step size of every group, [O, G, 1]; one rounding."""
        return self.channel * self.multiplier


def largest_multiplier(levels: Levels) -> Tensor:
    """M = max(1, min(floor(128 / -qmin), floor(127 / max(qmax, 1)))): the largest with code * M in [-128, 127] for every code.

    | bits | 2 | 3 | 4 | 4.5 | 5 | 5.5 | 6 | 7 | 8 |
    | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
    | M | 64 | 32 | 16 | 11 | 8 | 5 | 4 | 2 | 1 |

    Args:
        levels: Symmetric.

    Returns:
        0-dim float32. 1 above 8 bits, where codes do not fit in int8 themselves.
    """
    qmin, qmax = (torch.as_tensor(value, dtype=torch.float32) for value in (levels.qmin, levels.qmax))
    below = torch.floor(_INT8.min / qmin)
    above = torch.floor(_INT8.max / qmax.clamp(min=1.0))
    return torch.minimum(below, above).clamp(min=1.0)


@torch.no_grad()
def integer_group_scales(
    tensor: Tensor, scale: Tensor, levels: Levels, layout: BlockLayout, *, scale_dtype: torch.dtype | None = None
) -> GroupScales:
    """The integer group scales beside given ones.

    channel = max over groups(scale) / M,  multiplier = scale / channel rounded down or up, in [1, M]: what gives the group the
    smaller squared error

    Rounding to the nearest clips too much where M is small: at 6 bits (M = 4) it loses more than having no groups at all.
    Always rounding up costs up to 0.8 dB more. A search of the channel's scale and of all multipliers gains at most 0.06 dB
    over this beside scales from `mse` (docs/results/group_scales.md).

    Args:
        tensor: Weight, [O, I, ...].
        scale: Wanted scales, [O, G, 1].
        levels: The grid, symmetric.
        layout: Granularity `group`.
        scale_dtype: Round the channel's scale to this dtype.

    Returns:
        Scales of the dtype of `scale`; `channel` is at least `MIN_SCALE`.

    Numerics: two passes over the tensor. The largest group has the multiplier M and keeps its scale; with M = 1 (8 bits and
        more) every group has the scale of the largest one, bit for bit. NaN and infinity in one group make the scales of its
        output channel NaN or infinite.
    """
    blocks = layout.split(tensor).to(scale.dtype)
    largest = largest_multiplier(levels).to(device=scale.device, dtype=scale.dtype)
    channel = finish_scale(scale.amax(dim=1, keepdim=True) / largest, scale_dtype)
    ratio = scale / channel
    lower = torch.minimum(torch.floor(ratio * (1 + _CLOSE)).clamp(min=1.0), largest)
    upper = torch.minimum(torch.ceil(ratio * (1 - _CLOSE)).clamp(min=1.0), largest)
    is_lower_better = _squared_error(blocks, channel * lower, levels) < _squared_error(blocks, channel * upper, levels)
    return GroupScales(channel, torch.where(is_lower_better, lower, upper))


def _squared_error(blocks: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    qparams = QParams(scale)
    return (blocks - decode(encode(blocks, qparams, levels), qparams)).square_().sum(dim=-1, keepdim=True)
