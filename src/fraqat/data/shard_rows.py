"""Single rows of a safetensors file, read without mapping it into memory.

Where a mapped file was cut or its disk gives an error, the operating system ends the process (SIGBUS) without a word; a read
says what is wrong.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

_LENGTH_BYTES = 8
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True)
class RowPlace:
    """Where the rows of one tensor lie in a file.

    Args:
        offset: Of the first one, bytes.
        dtype: Of the tensor.
        shape: Of one row.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, stream: FileIO, index: int) -> Tensor:
        """One row.

        Raises:
            OSError: The disk gives an error, or the file ends before the row does.
        """
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        if num_bytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        buffer = bytearray(num_bytes)
        view, place = memoryview(buffer), self.offset + index * num_bytes
        while view:
            count = os.preadv(stream.fileno(), [view], place)
            if count == 0:
                raise OSError("it ends too early")
            view, place = view[count:], place + count
        return torch.frombuffer(buffer, dtype=self.dtype).reshape(self.shape)


def row_places(path: Path) -> dict[str, RowPlace]:
    """Where the rows of every tensor lie that has any.

    Raises:
        ValueError: It is no safetensors file, or has a type of numbers that is not known.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
    found: dict[str, RowPlace] = {}
    for name, entry in header.items():
        if name == "__metadata__" or not entry["shape"]:
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}; allowed are {', '.join(_DTYPES)}")
        start = _LENGTH_BYTES + length + entry["data_offsets"][0]
        found[name] = RowPlace(start, _DTYPES[entry["dtype"]], tuple(entry["shape"][1:]))
    return found
