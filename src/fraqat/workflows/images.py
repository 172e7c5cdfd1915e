"""Tensors to PNG files."""

from __future__ import annotations

import io

import torch
from torch import Tensor


def to_png(image: Tensor) -> bytes:
    """PNG bytes of an image [3, H, W] in [0, 1]; values outside are clipped."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
