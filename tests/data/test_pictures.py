"""Laws of decoding: upright, opaque, cut to the middle, and no damaged file gets through."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stored import BROKEN_PNG, png

from fraqat.data.bad_samples import BadSampleError
from fraqat.data.pictures import decode_image, to_model_range


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(value: Any, height: int = 8, width: int = 8, min_side: int = 1) -> np.ndarray[Any, Any]:
    return decode_image(value, height, width, min_side=min_side)


def halves(left: tuple[int, ...], right: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def test_an_image_of_the_right_size_is_kept_pixel_by_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels))), pixels.transpose(2, 0, 1))


def test_the_middle_is_kept_and_the_sides_are_cut() -> None:
    wide = Image.new("RGB", (32, 8), "red")
    wide.paste("blue", (12, 0, 20, 8))
    assert (decode(encoded(wide))[2] == 255).all()
    tall = wide.rotate(90, expand=True)
    assert (decode(encoded(tall))[2] == 255).all()
    assert decode(encoded(wide), 4, 6).shape == (3, 4, 6)


def test_scaling_down_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = decode(encoded(Image.fromarray(stripes)))
    assert abs(small.astype(int) - 128).max() < 20


def test_pictures_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    red_left = halves((255, 0, 0), (0, 0, 255))
    turned = decode(encoded(red_left, "JPEG", quality=95, exif=exif))
    assert turned[2, 4, 0] > 200 and turned[0, 4, 7] > 200


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    image = halves((0, 0, 0, 255), (0, 0, 0, 0), "RGBA")
    stored = encoded(image.convert(mode)) if mode != "P" else encoded(image.quantize(4), "PNG")
    decoded = decode(stored)
    assert (decoded[:, :, 0] < 5).all() and (decoded[:, :, 7] > 250).all()


def test_other_modes_become_rgb() -> None:
    for mode, value in (("L", 100), ("1", 1), ("CMYK", (0, 0, 0, 0)), ("P", 0)):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        assert decode(encoded(Image.new(mode, (8, 8), value), kind)).shape == (3, 8, 8)
    grey = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))
    assert abs(int(decode(encoded(grey))[0, 0, 0]) - 128) <= 1


def test_the_range_of_models_is_minus_one_to_one() -> None:
    values = to_model_range(np.array([0, 255], dtype=np.uint8))
    assert values.tolist() == [-1, 1] and values.dtype == torch.float32


JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "image is missing"),
        ({"bytes": None, "path": None}, "image is missing"),
        (b"", "image is empty \\(0 bytes\\)"),
        ({"bytes": b"", "path": "a.png"}, "image is empty"),
        (b"no picture at all", "image has an unknown format"),
        (BROKEN_PNG, "image is truncated or damaged"),
        (png(3)[:-30], "image is truncated or damaged"),
        (JPEG[: len(JPEG) // 2], "image is truncated or damaged"),
        ({"bytes": None, "path": "/nowhere/a.png"}, "image file is missing"),
        (17, "image is a int, not bytes"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "mode F, whose range is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_decoded_has_a_reason(value: Any, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        decode(value)


def test_any_cut_of_a_picture_is_refused_or_whole() -> None:
    whole, stored = decode(JPEG), [JPEG[:n] for n in range(0, len(JPEG) - 2, 97)]
    for data in stored:
        with pytest.raises(BadSampleError):
            decode(data)
    assert np.array_equal(decode(JPEG), whole)


def test_too_small_and_too_large_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadSampleError, match="image has a side below 9 pixels"):
        decode(png(0, (64, 8)), min_side=9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (11, 64):  # a warning of Pillow's, and an error
        with pytest.raises(BadSampleError, match="image has more than 100 pixels"):
            decode(png(0, (side, side)))
