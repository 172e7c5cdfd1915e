"""What every model made of the same prompts: images, texts or sounds, as the files that an evaluation leaves."""

from __future__ import annotations

import io
import struct
import sys
import wave
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from fraqat.errors import config_error

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_SIZE = slice(16, 24)  # width and height, the first words of the first chunk
_MIN_RATE, _MAX_RATE = 1_000, 384_000
_SHOWN_BYTES = 8  # of a file that is refused


class SampleKind(StrEnum):
    """What a model makes of a prompt, and so the format of its files."""

    IMAGES = "images"
    TEXTS = "texts"
    SOUNDS = "sounds"


@dataclass(frozen=True)
class SampleRow:
    """What one model made.

    Args:
        label: Name of the model: "original", "dynamic", "vanilla QAT", "FraQAT".
        files: One file per prompt, all made with the seeds that the other rows use.
    """

    label: str
    files: tuple[bytes, ...]


@dataclass(frozen=True)
class Samples:
    """What all models made.

    Args:
        kind: Images are PNG files, texts UTF-8, sounds WAV files of 16 bits and one channel.
        prompts: What the models were given.
        rows: One per model in the order to be read; texts are compared with those of the first row, the original.

    Raises:
        ConfigError: No prompt or no row, a row that has not one file per prompt, or a file of another format.
    """

    kind: SampleKind
    prompts: tuple[str, ...]
    rows: tuple[SampleRow, ...]

    def __post_init__(self) -> None:
        if not self.prompts or not self.rows:
            raise config_error(
                "samples",
                f"{len(self.prompts)} prompts, {len(self.rows)} rows",
                allowed="one or more of each",
                fix="pass None where there are no samples",
            )
        for row in self.rows:
            self._check(row)

    def _check(self, row: SampleRow) -> None:
        if len(row.files) != len(self.prompts):
            raise config_error(
                f"samples[{row.label!r}]",
                f"{len(row.files)} {self.kind}",
                allowed=f"one for each of the {len(self.prompts)} prompts",
                fix="give every model the same prompts",
            )
        read, allowed = _FORMATS[self.kind]
        for index, file in enumerate(row.files):
            try:
                read(file)
            except ValueError as error:
                raise config_error(
                    f"samples[{row.label!r}][{index}]",
                    file[:_SHOWN_BYTES],
                    allowed=f"{allowed} ({error})",
                    fix="write it in this format",
                ) from None


@dataclass(frozen=True)
class Sound:
    """A recording.

    Args:
        values: In [-32768, 32767].
        sample_rate: Values per second.
    """

    values: array[int]
    sample_rate: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.values) / self.sample_rate

    @property
    def is_silent(self) -> bool:
        """Whether nothing can be heard."""
        return not any(self.values)


def png_size(file: bytes) -> tuple[int, int]:
    """Width and height of a PNG file in pixels.

    Raises:
        ValueError: It is none.
    """
    if not file.startswith(_PNG_SIGNATURE) or len(file) < _PNG_SIZE.stop:
        raise ValueError("it does not begin as one")
    width, height = struct.unpack(">II", file[_PNG_SIZE])
    if not width or not height:
        raise ValueError("it has no pixels")
    return width, height


def read_text(file: bytes) -> str:
    """Decodes UTF-8.

    Raises:
        ValueError: It is another encoding.
    """
    return file.decode("utf-8")


def read_sound(file: bytes) -> Sound:
    """Decodes a WAV file of 16 bits and one channel. One that was cut short gives what is there.

    Raises:
        ValueError: It is no such file, or its sample rate is impossible.
    """
    try:
        with wave.open(io.BytesIO(file), "rb") as stream:
            width, num_channels, rate = stream.getsampwidth(), stream.getnchannels(), stream.getframerate()
            data = stream.readframes(stream.getnframes())
    except (EOFError, wave.Error) as error:
        raise ValueError(str(error) or "it ends too early") from None
    if (width, num_channels) != (2, 1):
        raise ValueError(f"it has {8 * width} bits and {num_channels} channels")
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise ValueError(f"{rate} samples per second are not within {_MIN_RATE} and {_MAX_RATE}")
    values = array("h", data[: len(data) // 2 * 2])
    if sys.byteorder == "big":
        values.byteswap()
    return Sound(values, rate)


_FORMATS: Mapping[SampleKind, tuple[Callable[[bytes], Any], str]] = MappingProxyType(
    {
        SampleKind.IMAGES: (png_size, "a PNG file"),
        SampleKind.TEXTS: (read_text, "UTF-8 text"),
        SampleKind.SOUNDS: (read_sound, "a WAV file of 16 bits and one channel"),
    }
)
