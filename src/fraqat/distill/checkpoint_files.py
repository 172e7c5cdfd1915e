"""What a checkpoint is on disk: a tree of plain values in JSON, and its tensors in safetensors files, one for each process.

A tensor of which processes hold rows each is in as many files; any other slice of rows can be read back from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_TENSOR = "__tensor__"
ROWS = "rows"


@dataclass(frozen=True)
class Rows:
    """Rows of the first axis of a tensor that several processes hold together.

    Args:
        tensor: Those of this process.
        shape: Of the whole.
        first: Number of the first one.
        is_copy: Another process holds the same rows, and writes them.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    first: int
    is_copy: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A state taken apart: what a process writes, in host memory that training does not touch.

    Args:
        tree: The state with tensors replaced by their names.
        tensors: Of this process, by name.
        places: Name -> shape of the whole and first row, of those that are rows.
    """

    tree: Any
    tensors: dict[str, Tensor]
    places: dict[str, tuple[tuple[int, ...], int]]


def snapshot(state: Any, *, is_first: bool = True) -> Snapshot:
    """Copies a state to the host.

    Args:
        state: Dicts with keys that are strings or whole numbers, lists, numbers, strings, None, tensors and `Rows`.
        is_first: Whether this process writes the tensors that all have.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, tuple[tuple[int, ...], int]] = {}

    def take(value: Any, name: str) -> Any:
        if isinstance(value, Rows):
            if value.tensor.numel() and not value.is_copy:
                tensors[name], places[name] = _host_copy(value.tensor), (value.shape, value.first)
            return {_TENSOR: name}
        if isinstance(value, Tensor):
            if is_first:
                tensors[name] = _host_copy(value)
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {str(key): take(part, f"{name}/{key}" if name else str(key)) for key, part in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [take(part, f"{name}/{number}") for number, part in enumerate(value)]
        return value

    return Snapshot(take(state, ""), tensors, places)


class SavedTensor:
    """A tensor of a checkpoint, whole or in rows; it is read when it is asked for.

    Args:
        name: In the files.
        pieces: File, first row (None where the file has the whole tensor) and shape of the whole.
    """

    def __init__(self, name: str, pieces: list[tuple[Path, int | None, tuple[int, ...]]]):
        self._name, self._pieces = name, sorted(pieces, key=lambda piece: piece[1] or 0)

    def whole(self) -> Tensor:
        """All of it.

        Raises:
            DamagedError: A file lacks it.
        """
        return self.rows(slice(None))

    def rows(self, rows: slice) -> Tensor:
        """Some rows of the first axis.

        Args:
            rows: With step 1.

        Raises:
            DamagedError: Files lack some of them.
        """
        try:
            path, first, shape = self._pieces[0]
            if first is None:
                with safe_open(path, "pt") as file:
                    return file.get_tensor(self._name)[rows] if rows != slice(None) else file.get_tensor(self._name)
            start, stop, _ = rows.indices(shape[0])
            found: list[Tensor] = []
            for path, first, _ in self._pieces:
                assert first is not None
                with safe_open(path, "pt") as file:
                    piece: Any = file.get_slice(self._name)
                    low, high = max(start, first), min(stop, first + piece.get_shape()[0])
                    if low < high:
                        found.append(piece[low - first : high - first])
            if sum(len(part) for part in found) != max(0, stop - start):
                raise DamagedError(f"rows {start} to {stop} of {self._name} are not all there")
            return torch.cat(found) if found else torch.empty(0, *shape[1:])
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedError(f"{self._name} cannot be read: {error}") from error


class DamagedError(Exception):
    """The checkpoint cannot be used; an older one may."""


def restore(tree: Any, files: Mapping[Path, Mapping[str, Any]]) -> Any:
    """Undoes `snapshot`: the tree with `SavedTensor` where a tensor was.

    Args:
        tree: From JSON.
        files: Path -> the entry of the manifest, with `rows` and `names`.

    Raises:
        DamagedError: A tensor is in no file.
    """
    pieces: dict[str, list[tuple[Path, int | None, tuple[int, ...]]]] = {}
    for path, entry in files.items():
        for name in entry["names"]:
            shape, first = entry[ROWS].get(name, ((), None))
            pieces.setdefault(name, []).append((path, first, tuple(shape)))

    def give(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR in value:
                name = value[_TENSOR]
                if name not in pieces:
                    raise DamagedError(f"{name} is in none of its files")
                return SavedTensor(name, pieces[name])
            return {key: give(part) for key, part in value.items()}
        return [give(part) for part in value] if isinstance(value, list) else value

    return give(tree)


def loaded(value: Any) -> Any:
    """A tree of `restore` with all of its tensors read, whole."""
    if isinstance(value, SavedTensor):
        return value.whole()
    if isinstance(value, dict):
        return {key: loaded(part) for key, part in cast("dict[str, Any]", value).items()}
    return [loaded(part) for part in cast("list[Any]", value)] if isinstance(value, list) else value


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy of its own, also where the tensor is on the host already."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach())
