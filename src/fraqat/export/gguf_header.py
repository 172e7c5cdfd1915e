"""The counts in a GGUF file's header, looked at before a reader believes them.

The `gguf` package reads as many elements of an array as the file says; one flipped bit makes that billions, until memory is
full.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value -> its bytes."""
_LEAST_TENSOR = 24
"""Bytes of the shortest description of a tensor: length of its name, number of axes, type, place."""
_DEEPEST = 8


def check_header(path: Path) -> None:
    """Refuses a file whose header counts more than its bytes can hold.

    Args:
        path: A little-endian GGUF file of version 2 or 3, as this program writes it.

    Raises:
        ValueError: It is none, or counts too much.
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        header = _Header(stream, path.stat().st_size)
        if header.take(4) != _MAGIC or header.number("<I") not in _VERSIONS:
            raise ValueError("it does not begin as a GGUF file of version 2 or 3")
        num_tensors, num_values = header.number("<Q"), header.number("<Q")
        for _ in range(num_values):
            header.skip_text()
            header.skip_value(header.number("<I"))
        header.check(num_tensors, _LEAST_TENSOR, "tensors")


class _Header:
    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._size = stream, size

    def take(self, length: int) -> bytes:
        self.check(length, 1, "bytes")
        return self._stream.read(length)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def check(self, count: int, size: int, what: str) -> None:
        left = self._size - self._stream.tell()
        if count * size > left:
            raise ValueError(f"its header counts {count} {what} where {left} bytes are left")

    def skip(self, length: int) -> None:
        self.check(length, 1, "bytes")
        self._stream.seek(length, 1)

    def skip_text(self) -> None:
        self.skip(self.number("<Q"))

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.skip_text()
        elif kind == _ARRAY and depth < _DEEPEST:
            kind, count = self.number("<I"), self.number("<Q")
            if kind in _SIZES:
                self.check(count, _SIZES[kind], "elements")
                self.skip(count * _SIZES[kind])
            else:
                self.check(count, 8, "elements")
                for _ in range(count):
                    self.skip_value(kind, depth + 1)
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"its header has a value of type {kind}")
