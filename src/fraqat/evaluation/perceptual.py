"""Paired distance of images in the layers of a network: LPIPS-like (Zhang et al. 2018, arXiv 1801.03924).

LPIPS proper takes AlexNet's or VGG's layers and weights of the channels that were fitted to people's judgements. Here any
extractor's layers are taken and every channel counts the same: figures of one extractor compare with each other, and with no
published LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fraqat.errors import config_error


class LayerExtractor(Protocol):
    """Gives the outputs of several layers."""

    def layers(self, images: Tensor) -> Sequence[Tensor]:
        """Outputs [N, C, ...] of some layers for images [N, 3, H, W] in [-1, 1]."""
        ...


def layer_distances(layers: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Mean over layers and places of |f / |f| - g / |g||^2, with the lengths taken over the channels of one place.

    Args:
        layers: Outputs [N, C, ...], one per layer.
        reference: The same of the other images.

    Returns:
        Distances [N] in [0, 4], float64; 0 for equal images.

    Raises:
        ConfigError: Different layers, or none.
    """
    shapes = [[tuple(item.shape) for item in items] for items in (layers, reference)]
    if not layers or shapes[0] != shapes[1]:
        raise config_error("layers", shapes[0], allowed=f"the reference's {shapes[1]}", fix="use the same extractor")
    each = [(_unit(x) - _unit(y)).square().sum(1).flatten(1).mean(1) for x, y in zip(layers, reference, strict=True)]
    return torch.stack(each).mean(0).cpu()


@torch.no_grad()
def lpips_like(images: Tensor, reference: Tensor, extractor: LayerExtractor, *, batch_size: int = 64) -> Tensor:
    """`layer_distances` of paired images.

    Args:
        images, reference: [N, 3, H, W] in [-1, 1].
        extractor: Gives the layers.
        batch_size: Pairs computed at a time.

    Returns:
        Distances [N].

    Raises:
        ConfigError: Images of different shapes, or none.
    """
    if images.shape != reference.shape or not len(images):
        raise config_error(
            "images", tuple(images.shape), allowed=f"pairs of the reference's {tuple(reference.shape)}", fix="pair them"
        )
    pairs = zip(images.split(batch_size), reference.split(batch_size), strict=True)
    return torch.cat([layer_distances(extractor.layers(x), extractor.layers(y)) for x, y in pairs])


def _unit(values: Tensor) -> Tensor:
    values = values.double() if values.ndim > 2 else values.double()[..., None]
    return values / values.norm(dim=1, keepdim=True).clamp(min=1e-10)
