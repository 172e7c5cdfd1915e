"""From a trained student to files for a target."""

from fraqat.export.packed import (
    FloatDtype,
    ModelDescription,
    PackedModel,
    PackedSize,
    load_packed_,
    read_packed,
    write_packed,
)

__all__ = [
    "FloatDtype",
    "ModelDescription",
    "PackedModel",
    "PackedSize",
    "load_packed_",
    "read_packed",
    "write_packed",
]
