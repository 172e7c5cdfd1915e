"""Packed files of modules that no recipe describes: students of a training loop of one's own."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fraqat.errors import ModelError
from fraqat.export.packed import PackedSize, load_packed_, read_packed, write_packed
from fraqat.export.target import FloatDtype, ModelDescription
from fraqat.nn import quantized_layers


def save_packed(
    student: nn.Module, folder: str | Path, *, float_dtype: FloatDtype = "float32", overwrite: bool = False
) -> PackedSize:
    """Writes a student as packed codes, scales and everything that is not quantized, in safetensors.

    Args:
        student: Any module changed by `fraqat.quantize_`, at its final width.
        folder: Created; holds `model.safetensors` and `manifest.json` with a checksum.
        float_dtype: Precision of everything that is not quantized. float32 loses nothing.
        overwrite: Replace an existing folder.

    Returns:
        Bytes, and bits per quantized weight.

    Raises:
        ConfigError: A layer is not at its final width, or has a branch or a smoothed input.
        ModelError: Nothing is quantized.
        OutputError: The folder exists, the disk is full, or it is not writable.
    """
    if not any(True for _ in quantized_layers(student)):
        raise ModelError(f"{type(student).__qualname__} has no quantized layer. Fix: call fraqat.quantize_ first.")
    description = ModelDescription(type(student).__qualname__, {}, "")
    return write_packed(student, description, Path(folder), float_dtype=float_dtype, overwrite=overwrite)


def restore_packed_(model: nn.Module, folder: str | Path) -> nn.Module:
    """Turns a float module into the student that `save_packed` wrote, in place: its quantized layers hold codes.

    It computes the student's outputs bit for bit, by weights of scale times code. `fraqat.nn.IntegerLayers` gives it exact
    integer products instead.

    Args:
        model: Of the student's class, made as the student was before `quantize_`; its values are replaced.
        folder: Of `save_packed`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: The folder is missing, damaged, of a newer format, or of another class or size of model.
    """
    packed = read_packed(Path(folder))
    if packed.description.class_name != type(model).__qualname__:
        raise ModelError(
            f"{folder} holds a {packed.description.class_name}, the model is a {type(model).__qualname__}. "
            "Fix: build the class that was saved."
        )
    return load_packed_(model, packed)
