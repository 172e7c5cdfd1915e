"""Which elements share a scale: tensor shape <-> scale shape.

Shape suffixes: O output channels, I input channels, G groups, g group size, N samples, T tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from fraqat.errors import config_error


class Granularity(StrEnum):
    """How many elements share one scale. Weights: tensor, channel, group. Activations: tensor, sample, token."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    SAMPLE = "sample"
    TOKEN = "token"  # noqa: S105


WEIGHT_GRANULARITIES = (Granularity.TENSOR, Granularity.CHANNEL, Granularity.GROUP)
ACTIVATION_GRANULARITIES = (Granularity.TENSOR, Granularity.SAMPLE, Granularity.TOKEN)


@dataclass(frozen=True)
class BlockLayout:
    """Cuts a tensor into blocks that share a scale.

    | granularity | tensor | blocks | scale |
    | --- | --- | --- | --- |
    | tensor | any shape | unchanged | [1, ..., 1] |
    | channel | weight [O, I, ...] | unchanged | [O, 1, ...] |
    | group | weight [O, I, 1, ...] | [O, G, g] | [O, G, 1] |
    | sample | activation [N, ...] | unchanged | [N, 1, ...] |
    | token | activation [..., C] (or [N, C, H, W] with channel_axis 1) | unchanged | [..., 1] |

    Args:
        granularity: Which elements share a scale.
        group_size: Elements along the input channels that share a scale; only with `group`.
        channel_axis: The axis of the features; only used by `token`.

    Raises:
        ConfigError: A group size without `group`, or `group` without a positive group size.
    """

    granularity: Granularity
    group_size: int | None = None
    channel_axis: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "granularity", Granularity(self.granularity))
        is_group = self.granularity is Granularity.GROUP
        if is_group and (self.group_size is None or self.group_size < 1):
            raise config_error(
                "group_size", self.group_size, allowed="a positive integer", fix="set group_size, e.g. 32"
            )
        if not is_group and self.group_size is not None:
            raise config_error(
                "group_size",
                self.group_size,
                allowed="None unless granularity is 'group'",
                fix="set granularity: group",
            )

    def split(self, tensor: Tensor) -> Tensor:
        """Returns the view of `tensor` whose `reduce_dims` hold the elements of one block.

        Raises:
            ConfigError: The number of input channels is not a multiple of the group size.
        """
        if self.group_size is None:
            return tensor
        width = tensor[0].numel()
        if width % self.group_size:
            raise config_error(
                "group_size",
                self.group_size,
                allowed=f"a divisor of the layer's input width {width}",
                fix=f"choose one of {_common_divisors(width)} or granularity: channel",
            )
        return tensor.reshape(tensor.shape[0], -1, self.group_size)

    def join(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undoes `split`: gives `blocks` the tensor's own `shape` back."""
        return blocks if self.group_size is None else blocks.reshape(shape)

    def reduce_dims(self, ndim: int) -> tuple[int, ...]:
        """The axes of a block view with `ndim` axes over which one scale is shared."""
        match self.granularity:
            case Granularity.TENSOR:
                return tuple(range(ndim))
            case Granularity.CHANNEL | Granularity.SAMPLE:
                return tuple(range(1, ndim))
            case Granularity.TOKEN:
                return (self.channel_axis % ndim,)
            case Granularity.GROUP:
                return (ndim - 1,)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scale for a tensor of `shape`; it broadcasts against `split(tensor)`."""
        if self.group_size is not None:
            width = 1
            for size in shape[1:]:
                width *= size
            return (shape[0], width // self.group_size, 1)
        reduced = self.reduce_dims(len(shape))
        return tuple(1 if axis in reduced else size for axis, size in enumerate(shape))


def _common_divisors(width: int) -> list[int]:
    return [size for size in (16, 32, 64, 128, 256) if width % size == 0] or [width]
