"""What the models made, as the template needs it: a grid of images, texts below each other, or recordings with pictures."""

from __future__ import annotations

import base64
from typing import Any

from fraqat.report.samples import SampleKind, Samples, png_size, read_sound, read_text
from fraqat.report.spectrogram import spectrogram_pngs
from fraqat.report.word_differences import TextPart, compare_words, count_words

_MAX_HEAD_CHARACTERS = 90  # longer prompts are cut in the grid's head and listed in full below
_MAX_PIXELATED_PX = 128
_GRID_WIDTH_PX = 880  # room for the images of one row on a wide screen
_MIN_CELL_PX, _MAX_TINY_CELL_PX, _MAX_CELL_PX = 64, 128, 208
_MAX_TOOLTIP_CHARACTERS = 200
# Of control characters a browser shows nothing, or worse; Unicode has a picture of each.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}


def samples_view(samples: Samples) -> dict[str, Any]:
    """The section of the samples; `kind` tells the template which."""
    view = {
        SampleKind.IMAGES: _grid_view,
        SampleKind.TEXTS: _texts_view,
        SampleKind.SOUNDS: _sounds_view,
    }[samples.kind](samples)
    return {"kind": samples.kind.value, **view}


def _grid_view(samples: Samples) -> dict[str, Any]:
    widest = max(png_size(image)[0] for row in samples.rows for image in row.files)
    room = _GRID_WIDTH_PX // len(samples.prompts) - 8
    cell = min(max(room, _MIN_CELL_PX), _MAX_CELL_PX)
    if widest <= _MAX_PIXELATED_PX:  # whole multiples keep the pixels square and equal
        cell = max(1, min(cell, _MAX_TINY_CELL_PX) // widest) * widest
    return {
        "prompts": samples.prompts,
        "cell_px": cell,
        "is_pixelated": widest <= _MAX_PIXELATED_PX,
        "is_cut": any(len(prompt) > _MAX_HEAD_CHARACTERS for prompt in samples.prompts),
        "rows": [
            {"label": row.label, "images": list(zip(samples.prompts, map(_image_view, row.files), strict=True))}
            for row in samples.rows
        ],
    }


def _image_view(image: bytes) -> dict[str, Any]:
    width, height = png_size(image)
    return {"width": width, "height": height, "url": _data_url("image/png", image)}


def _texts_view(samples: Samples) -> dict[str, Any]:
    labels = [row.label for row in samples.rows]
    prompts: list[dict[str, Any]] = []
    for prompt, *files in zip(samples.prompts, *(row.files for row in samples.rows), strict=True):
        original, *others = (_shown(read_text(file)) for file in files)
        texts = [_text_view((TextPart(original),), ""), *(_student_view(text, original) for text in others)]
        prompts.append({"prompt": _shown(prompt), "texts": list(zip(labels, texts, strict=True))})
    return {"prompts": prompts, "is_compared": len(labels) > 1}


def _shown(text: str) -> str:
    return text.translate(_CONTROL_PICTURES).strip()


def _student_view(text: str, original: str) -> dict[str, Any]:
    parts = compare_words(text, original)
    if not any(part.is_departure for part in parts):
        return _text_view(parts, "the same words")
    num_agreeing = 0 if parts[0].is_departure else count_words(parts[0].text)
    words = "1 word" if num_agreeing == 1 else f"{num_agreeing} words"
    return _text_view(parts, f"departs after {words}" if num_agreeing else "departs at once")


def _text_view(parts: tuple[TextPart, ...], detail: str) -> dict[str, Any]:
    return {
        "parts": [(part, _tooltip(part)) for part in parts],
        "detail": detail,
        "is_empty": not any(p.text for p in parts),
    }


def _tooltip(part: TextPart) -> str:
    original = " ".join(part.original.split())
    is_long = len(original) > _MAX_TOOLTIP_CHARACTERS
    return original[:_MAX_TOOLTIP_CHARACTERS] + " …" if is_long else original


def _sounds_view(samples: Samples) -> dict[str, Any]:
    prompts: list[dict[str, Any]] = []
    for prompt, *files in zip(samples.prompts, *(row.files for row in samples.rows), strict=True):
        sounds = [read_sound(file) for file in files]
        longest_s = max(sound.duration_s for sound in sounds)
        views = [
            {
                "label": row.label,
                "url": _data_url("audio/wav", file),
                "picture": _image_view(picture),
                "duration": f"{sound.duration_s:.2f} s",
                "is_silent": sound.is_silent,
                "share": f"{100 * sound.duration_s / longest_s if longest_s else 100:.1f}",
            }
            for row, file, sound, picture in zip(samples.rows, files, sounds, spectrogram_pngs(sounds), strict=True)
        ]
        prompts.append({"prompt": _shown(prompt), "sounds": views})
    return {"prompts": prompts}


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
