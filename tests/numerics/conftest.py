"""References that share no code with the package: the paper's equations in plain float64, and every granularity as rows."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from fraqat.numerics import BlockLayout, Granularity

Array = NDArray[np.float64]


def equation_1(rows: Array, bits: float, *, narrow: bool = False) -> tuple[Array, Array, Array]:
    """S = max abs / (2^(b-1) - 1), Q = round(W / S) in [-floor(2^(b-1)), floor(2^(b-1)) - 1], value S Q; one S per row."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / (2.0 ** (bits - 1) - 1)
    half = math.floor(2.0 ** (bits - 1))
    codes = np.clip(np.rint(rows / scale), -half + (1 if narrow else 0), half - 1)
    return scale, codes, scale * codes


def equation_2(rows: Array, bits: float) -> tuple[Array, Array, Array]:
    """S = (max - min) / 2^b, Q = round((W - min) / S) in [0, floor(2^b) - 1], value S Q + min; one S per row."""
    low = rows.min(axis=1, keepdims=True)
    scale = (rows.max(axis=1, keepdims=True) - low) / 2.0**bits
    codes = np.clip(np.rint((rows - low) / scale), 0, math.floor(2.0**bits) - 1)
    return scale, codes, scale * codes + low


def _to_rows(tensor: Tensor, layout: BlockLayout) -> Tensor:
    """Every granularity as a matrix with one scale per row."""
    match layout.granularity:
        case Granularity.TENSOR:
            return tensor.reshape(1, -1)
        case Granularity.CHANNEL | Granularity.SAMPLE:
            return tensor.reshape(tensor.shape[0], -1)
        case Granularity.GROUP:
            return tensor.reshape(-1, layout.group_size)
        case Granularity.TOKEN:
            return tensor.movedim(layout.channel_axis, -1).reshape(-1, tensor.shape[layout.channel_axis])


def _from_rows(rows: Tensor, shape: tuple[int, ...], layout: BlockLayout) -> Tensor:
    if layout.granularity is not Granularity.TOKEN:
        return rows.reshape(shape)
    moved = [*shape]
    moved.append(moved.pop(layout.channel_axis))
    return rows.reshape(moved).movedim(-1, layout.channel_axis)


@pytest.fixture(scope="session")
def paper() -> SimpleNamespace:
    """`equation_1` and `equation_2`."""
    return SimpleNamespace(equation_1=equation_1, equation_2=equation_2)


@pytest.fixture(scope="session")
def to_rows() -> Callable[[Tensor, BlockLayout], Tensor]:
    return _to_rows


@pytest.fixture(scope="session")
def from_rows() -> Callable[[Tensor, tuple[int, ...], BlockLayout], Tensor]:
    return _from_rows
