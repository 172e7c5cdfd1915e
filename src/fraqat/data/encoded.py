"""Encoded samples on disk: computed once, found again by a key over everything that they were computed from.

A store is a folder `DIGEST/` with `shard-00000.safetensors`, ... and `manifest.json` with size and checksum of each, or
`begun.json` where only the first shards were wanted so far. A shard holds columns with one value per row, and shared columns
that several rows point to (the text embedding of a prompt that gives several training rows).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from fraqat.data.shard_rows import row_places
from fraqat.errors import DataError, OutputError
from fraqat.files import explain_os_errors, folder_lock, save_tensors, sha256_of, write_json_atomic

FORMAT_VERSION = 2
_ROW, _SHARED, _INDEX, _CONSTANT = "row.", "shared.", "shared_index", "constant."
_MANIFEST, _BEGUN = "manifest.json", "begun.json"
_MAX_IN_MEMORY_BYTES = 2**31


@dataclass(frozen=True)
class EncodedShard:
    """A few encoded samples.

    Args:
        rows: Columns [N, ...].
        shared: Columns [M, ...] that rows point to.
        index: [N] int64, the row of `shared` that each row points to.
        constants: Tensors that are the same for every row, without a batch axis.
    """

    rows: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    index: Tensor
    constants: Mapping[str, Tensor]

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything under the names that a shard file has."""
        named = {_ROW + name: value for name, value in self.rows.items()}
        named |= {_SHARED + name: value for name, value in self.shared.items()}
        named |= {_CONSTANT + name: value for name, value in self.constants.items()}
        return {name: value.contiguous() for name, value in (named | {_INDEX: self.index}).items()}


class EncodedRows(Dataset[dict[str, Tensor]]):
    """The rows of all shards of a store, read from disk when they are asked for, or held in memory when they are small.

    A shard's checksum is compared when it is read for the first time.

    Args:
        shards: Files and their SHA-256.

    Raises:
        DataError: A shard that is read at once, because all are small, is damaged.
    """

    def __init__(self, shards: Mapping[Path, str]):
        in_memory = sum(path.stat().st_size for path in shards) <= _MAX_IN_MEMORY_BYTES
        self._shards = [_ShardReader(path, digest, in_memory) for path, digest in shards.items()]
        self._ends = [sum(len(s) for s in self._shards[: i + 1]) for i in range(len(self._shards))]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shard = bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        return self._shards[shard].row(index - start)

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that every row shares."""
        return self._shards[0].constants() if self._shards else {}

    def batches(self, batch_size: int, num_rows: int | None = None) -> list[dict[str, Tensor]]:
        """The first `num_rows` rows (None: all) in order; the last batch may be smaller."""
        total = len(self) if num_rows is None else min(num_rows, len(self))
        parts = [[self[j] for j in range(i, min(i + batch_size, total))] for i in range(0, total, batch_size)]
        return [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts]


class DamagedShardWarning(UserWarning):
    """An encoded shard was damaged and is computed again."""


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"the encoded shard {path} is missing or damaged: {reason}. Fix: run the same command again, which encodes anew "
        f"what is damaged; delete {path.parent} if that does not help."
    )


class _ShardReader:
    def __init__(self, path: Path, digest: str, in_memory: bool):
        self._path, self._digest = path, digest
        self._is_checked = False
        if in_memory:
            self._check()
        with safe_open(path, framework="pt") as stream:
            self._names = list(stream.keys())
            self._index: Tensor = stream.get_tensor(_INDEX).clone()  # what the library gives is the mapped file itself
            self._held = {name: stream.get_tensor(name).clone() for name in self._names} if in_memory else {}
        self._places = {} if in_memory else row_places(path)

    def __len__(self) -> int:
        return len(self._index)

    def row(self, index: int) -> dict[str, Tensor]:
        shared = int(self._index[index])
        places = {name: index for name in self._names if name.startswith(_ROW)}
        places |= {name: shared for name in self._names if name.startswith(_SHARED)}
        if self._held:
            return {name.partition(".")[2]: self._held[name][place] for name, place in places.items()}
        self._check()
        try:
            with self._path.open("rb", buffering=0) as stream:
                return {
                    name.partition(".")[2]: self._places[name].read(stream, place) for name, place in places.items()
                }
        except OSError as error:
            raise _damaged(self._path, str(error)) from error

    def _check(self) -> None:
        if self._is_checked:
            return
        try:
            is_whole = sha256_of(self._path) == self._digest
        except OSError as error:
            raise _damaged(self._path, str(error)) from error
        if not is_whole:
            with suppress(OSError):  # so that the next start finds it missing, whatever its size
                self._path.replace(self._path.with_name(f"damaged-{self._path.name}"))
            raise _damaged(self._path, "its checksum does not match")
        self._is_checked = True

    def constants(self) -> dict[str, Tensor]:
        with safe_open(self._path, framework="pt") as stream:
            names = [name for name in self._names if name.startswith(_CONSTANT)]
            return {name.removeprefix(_CONSTANT): stream.get_tensor(name).clone() for name in names}


class EncodedStore:
    """Encoded samples of one key.

    Args:
        root: Folder of all stores.
        key: Plain JSON values that identify model, data and settings; any change gives another store.
    """

    def __init__(self, root: Path, key: Mapping[str, Any]):
        self.key = {**key, "format_version": FORMAT_VERSION}
        text = json.dumps(self.key, sort_keys=True, separators=(",", ":"))
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]

    def open(self) -> EncodedRows | None:
        """The rows, or None where they are missing, unfinished or damaged."""
        return self._open(_MANIFEST)

    def _open(self, name: str) -> EncodedRows | None:
        try:
            manifest = json.loads((self.folder / name).read_text(encoding="utf-8"))
            listed = {self.folder / Path(name).name: entry for name, entry in manifest["shards"].items()}
            is_whole = manifest["key"] == json.loads(json.dumps(self.key)) and all(
                path.stat().st_size == entry["num_bytes"] for path, entry in listed.items()
            )
            return EncodedRows({path: entry["sha256"] for path, entry in listed.items()}) if is_whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            return None
        except DataError as error:
            warnings.warn(f"{error} It is encoded again.", DamagedShardWarning, stacklevel=2)
            return None

    def build(self, make_shards: Callable[[int], Iterator[EncodedShard]]) -> EncodedRows:
        """The rows, computed first where they are not there yet.

        An interrupted computation goes on after the last whole shard. While another process computes the same, this one waits.

        Args:
            make_shards: Called with the number of shards that are there already; yields the rest in order.

        Raises:
            OutputError: The folder cannot be written, or there is no sample.
        """
        return self._build(make_shards, is_all=True)

    def build_first(self, make_shards: Callable[[int], Iterator[EncodedShard]]) -> EncodedRows:
        """The rows of the first shards, for those that need no more; all of them where they are there. `build` adds the rest.

        Args:
            make_shards: As of `build`; it may end early.
        """
        return self._build(make_shards, is_all=False)

    def _build(self, make_shards: Callable[[int], Iterator[EncodedShard]], *, is_all: bool) -> EncodedRows:
        if (rows := self.open()) is not None:
            return rows
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder, wait=True):
            if (rows := self.open()) is not None:  # finished by another process in the meantime
                return rows
            for name in (_MANIFEST, _BEGUN):
                if (self.folder / name).exists():
                    self._keep_sound_shards(name)
            for number, shard in enumerate(make_shards(self._num_whole_shards()), self._num_whole_shards()):
                part = self.folder / f"part-{number:05d}"
                with explain_os_errors(self.folder):
                    save_tensors(shard.to_tensors(), part)
                    part.replace(self._shard_path(number))
            return self._finish(_MANIFEST if is_all else _BEGUN)

    def _finish(self, name: str) -> EncodedRows:
        shards = {
            path.name: {"num_bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in self._shard_paths()
        }
        write_json_atomic(self.folder / name, {"key": self.key, "shards": shards})
        rows = self._open(name)
        if rows is None or not len(rows):
            raise OutputError(
                f"{self.folder} holds {'no sample' if rows is not None else 'a damaged file'} after encoding. Fix: delete the "
                "folder, check that the data has samples, and start again."
            )
        return rows

    def _keep_sound_shards(self, name: str) -> None:
        """Removes the list of shards of this name, and all shards from the first damaged one on."""
        try:
            listed = json.loads((self.folder / name).read_text(encoding="utf-8"))["shards"]
            digests = {shard: entry["sha256"] for shard, entry in listed.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            digests = {}
        is_sound = True
        for number in range(max(len(digests), len(self._shard_paths()))):
            path = self._shard_path(number)
            is_sound = is_sound and path.exists() and sha256_of(path) == digests.get(path.name)
            if not is_sound:
                path.unlink(missing_ok=True)
        (self.folder / name).unlink()

    def _num_whole_shards(self) -> int:
        number = 0
        while self._shard_path(number).exists():
            number += 1
        return number

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _shard_paths(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))
