"""Decodes stored images to one size.

Shape suffixes: C channels, H and W pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fraqat.data.bad_samples import BadSampleError
from fraqat.data.record_files import read_image_file

_WHITE = (255, 255, 255, 255)
_MAX_16_BIT = 65535


def decode_image(value: Any, height: int, width: int, *, min_side: int, folder: str | None = None) -> NDArray[np.uint8]:
    """Decodes an image, turns it upright, scales it (antialiased) and cuts the middle out.

    Transparent parts become white; 16-bit grey is scaled to 8 bits.

    Args:
        value: What a row has: bytes, the name of a file, or a mapping with `bytes` or `path`.
        height, width: Size of the result.
        min_side: Smallest allowed side of the stored image, in pixels.
        folder: Where relative file names start.

    Returns:
        [3, height, width] uint8.

    Raises:
        BadSampleError: The image is missing, empty, damaged, too large to be decoded safely or too small.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    stored = _stored_bytes(value, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata, which is not used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(stored)) as opened:
                if min(opened.size) < min_side:
                    raise BadSampleError(f"image has a side below {min_side} pixels")
                image = _to_rgb(ImageOps.exif_transpose(opened))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadSampleError(f"image has more than {Image.MAX_IMAGE_PIXELS} pixels") from None
        except UnidentifiedImageError:
            raise BadSampleError("image has an unknown format") from None
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, MemoryError):
            # What Pillow's readers raise for damaged files, not only OSError.
            raise BadSampleError("image is truncated or damaged") from None
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))


def to_model_range(image_CHW: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return torch.as_tensor(image_CHW).float().div_(127.5).sub_(1)


def _stored_bytes(value: Any, folder: str | None) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        raise BadSampleError("image is missing")
    if isinstance(value, str):
        try:
            value = read_image_file(value, folder)
        except OSError:
            raise BadSampleError("image file is missing") from None
    if not isinstance(value, bytes | bytearray):
        raise BadSampleError(f"image is a {type(value).__name__}, not bytes or a file name")
    if not value:
        raise BadSampleError("image is empty (0 bytes)")
    return bytes(value)


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray(
            (np.asarray(image).astype(np.float32) * (255 / _MAX_16_BIT)).round().astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadSampleError(f"image has pixels of mode {image.mode}, whose range is unknown")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")
