"""A GGUF header that counts more than its file holds is refused before a reader fills memory with it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fraqat.export.gguf_header import check_header

gguf: Any = pytest.importorskip("gguf")
HUGE = 2**40


def written(path: Path) -> bytes:
    """A file with a value of every kind, and a tensor."""
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("a.text", "words")
    writer.add_uint32("a.number", 7)
    writer.add_float64("a.real", 0.5)
    writer.add_bool("a.switch", True)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.texts", ["x", "yz"])
    writer.add_tensor("t", np.zeros((2, 3), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def array_count(content: bytes, name: bytes) -> int:
    """Where the number of elements of an array stands: behind its name, its type and that of its elements."""
    return content.index(name) + len(name) + 8


PLACES: dict[str, Callable[[bytes], int]] = {
    "tensors": lambda content: 8,
    "values": lambda content: 16,
    "numbers": lambda content: array_count(content, b"a.numbers"),
    "texts": lambda content: array_count(content, b"a.texts"),
    "length of a name": lambda content: content.index(b"a.number") - 8,
    "length of a text": lambda content: content.index(b"words") - 8,
}


def test_a_sound_file_passes(tmp_path: Path) -> None:
    written(tmp_path / "f")
    check_header(tmp_path / "f")


@pytest.mark.parametrize("place", PLACES)
def test_a_count_above_the_file_is_refused(tmp_path: Path, place: str) -> None:
    content = bytearray(written(tmp_path / "f"))
    at = PLACES[place](bytes(content))
    struct.pack_into("<Q", content, at, HUGE)
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match="its header"):
        check_header(tmp_path / "f")


@pytest.mark.parametrize("length", [0, 3, 10, 40])
def test_a_cut_header_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "f").write_bytes(written(tmp_path / "g")[:length])
    with pytest.raises(ValueError, match=r"its header|does not begin"):
        check_header(tmp_path / "f")


def test_another_byte_order_and_arrays_in_arrays_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(100))
    with pytest.raises(ValueError, match="does not begin"):
        check_header(tmp_path / "f")
    nested = struct.pack("<IQ", 9, 1) * 40
    (tmp_path / "f").write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + nested
    )
    with pytest.raises(ValueError, match="value of type 9"):
        check_header(tmp_path / "f")
