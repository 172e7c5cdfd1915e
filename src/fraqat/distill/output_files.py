"""Recorded outputs of a teacher on disk: safetensors files, and a manifest that lists them with their checksums."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fraqat.distill.checkpoint import describe_difference, sealed
from fraqat.distill.task import Prediction
from fraqat.distill.workers import Workers
from fraqat.errors import DataError, OutputError
from fraqat.files import atomic_file, explain_os_errors, remove_leftovers, save_tensors, sha256_of, write_json_atomic

FORMAT_VERSION = 1
_NUM_OPEN = 8
_MANIFEST_FILE = "manifest.json"
_INPUTS, _STRIDES, _NOT_FINITE = "inputs", "strides", "not_finite"
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What damaged JSON leads to."""


@dataclass(frozen=True)
class Recorded:
    """What one call of the teacher gave.

    Args:
        outputs: By name. On the host where they are on their way to disk.
        inputs: Identity of what the teacher was called with.
        is_finite: Whether every output is.
    """

    outputs: Prediction
    inputs: str
    is_finite: bool = True

    @property
    def num_bytes(self) -> int:
        """Of the outputs."""
        return sum(value.numel() * value.itemsize for value in self.outputs.values())


@dataclass(frozen=True)
class OutputFile:
    """A file as the manifest has it.

    Args:
        name: In the folder.
        sha256: Of its bytes.
        num_bytes: Its size.
        keys: Of the calls whose outputs it holds.
    """

    name: str
    sha256: str
    num_bytes: int
    keys: tuple[str, ...]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> OutputFile:
        """Undoes `asdict`, from JSON."""
        return cls(str(entry["name"]), str(entry["sha256"]), int(entry["num_bytes"]), tuple(entry["keys"]))


class OutputFiles:
    """The recorded outputs of one run. Every process writes files of its own, and reads those of all.

    Args:
        folder: Where they lie; all processes see the same.
        identity: What outputs must share to be of use: JSON values.
        workers: Call `load`, `add` and `remove` together.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], workers: Workers):
        self.folder, self._workers = folder, workers
        self._identity = json.loads(json.dumps(identity))
        self._files: dict[str, OutputFile] = {}
        self._file_of: dict[str, str] = {}
        self._sound: set[str] = set()
        self._open: dict[str, tuple[Any, dict[str, Any]]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.num_bytes for file in self._files.values())

    def load(self) -> str | None:
        """Finds what an earlier process has recorded; files that are damaged, of something else or not listed are removed.

        Returns:
            What was removed and why, in words; None if nothing was.
        """
        reason = self._workers.first(self._load)
        told = json.loads(self._workers.gather_text(json.dumps([asdict(file) for file in self._files.values()]))[0])
        self._index([OutputFile.of(entry) for entry in told])
        own = list(self._files.values())[self._workers.rank :: self._workers.num]
        damaged = [file.name for file in own if not self._is_sound(file)]
        damaged = [name for text in self._workers.gather_text(json.dumps(damaged)) for name in json.loads(text)]
        if damaged:
            self._index([file for name, file in self._files.items() if name not in damaged])
            reason = f"{len(damaged)} files with recorded outputs are damaged, such as {damaged[0]}"
        self._workers.first(self._remove_unlisted)
        return self._workers.gather_text(reason or "")[0] or None

    def add(self, name: str, calls: Mapping[str, Recorded]) -> None:
        """Writes outputs to a new file of this process, and lists the files of all processes.

        Args:
            name: Of the file, without suffix; another one in every process.
            calls: By key.

        Raises:
            OutputError: The disk of one of the processes is full or not writable.
        """
        entries = [json.loads(text) for text in self._workers.gather_text(self._write(name, calls))]
        errors = [entry["error"] for entry in entries if "error" in entry]
        if errors:
            raise OutputError(errors[0])
        new = [OutputFile.of(entry) for entry in entries if entry]
        self._index([*(file for file in self._files.values() if file.name not in {f.name for f in new}), *new])
        self._workers.first(self._write_manifest)

    def read(self, key: str, device: torch.device) -> Recorded:
        """Recorded outputs, with the strides that they had.

        Args:
            key: Of the call.
            device: Of the outputs.

        Raises:
            DataError: There are none, or their file is damaged.
        """
        if key not in self:
            raise DataError(
                f"{self.folder} has no outputs of the teacher for {key}, and the teacher has left memory. Fix: load it again, "
                "or set train.teacher.outputs: computed."
            )
        path = self.folder / self._file_of[key]
        if not self._is_sound(self._files[path.name]):
            raise DataError(
                f"{path}, with outputs of the teacher, is damaged. Fix: run the same command again, which records them anew."
            )
        outputs: dict[str, Tensor] = {}
        try:
            handle, notes = self._opened(path.name)
            for name in notes["names"][key]:
                full_name = f"{key}/{name}"
                stored: Tensor = handle.get_tensor(full_name)
                stride = notes[_STRIDES].get(full_name, stored.stride())
                whole = torch.empty_strided(stored.shape, stride, dtype=stored.dtype, device=device)
                outputs[name] = whole.copy_(stored)
            return Recorded(outputs, notes[_INPUTS][key], key not in notes[_NOT_FINITE])
        except (SafetensorError, *_UNREADABLE) as error:
            raise DataError(
                f"{path} is not what this program wrote: {error!r}. Fix: remove {self.folder} and run the same command again."
            ) from error

    def remove(self) -> None:
        """Removes the folder."""
        self._index([])
        self._workers.first(lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _load(self) -> str | None:
        """Reads the manifest, in the first process."""
        self._files = {}
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        path = self.folder / _MANIFEST_FILE
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest != sealed(manifest):
                return "the manifest of the recorded outputs does not match its checksum"
            if manifest["format_version"] != FORMAT_VERSION:
                return f"the recorded outputs have format {manifest['format_version']}"
            if manifest["identity"] != self._identity:
                difference = describe_difference(manifest["identity"], self._identity)
                return f"the recorded outputs belong to other settings: {difference}"
            files = [OutputFile.of(entry) for entry in manifest["files"]]
        except _UNREADABLE as error:
            return f"the manifest of the recorded outputs cannot be read: {error!r}"
        self._index([file for file in files if Path(file.name).name == file.name])
        return None

    def _index(self, files: list[OutputFile]) -> None:
        self._open.clear()
        self._files = {file.name: file for file in files}
        self._file_of = {key: file.name for file in files for key in file.keys}

    def _remove_unlisted(self) -> None:
        with explain_os_errors(self.folder):
            for path in self.folder.iterdir():
                if path.name not in self._files:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._write_manifest()

    def _write_manifest(self) -> None:
        files = [asdict(file) for file in self._files.values()]
        manifest = {"format_version": FORMAT_VERSION, "identity": self._identity, "files": files}
        write_json_atomic(self.folder / _MANIFEST_FILE, sealed(manifest))

    def _write(self, name: str, calls: Mapping[str, Recorded]) -> str:
        """Writes a file; gives its entry, or `error`."""
        if not calls:
            return "{}"
        path = self.folder / f"{name}.safetensors"
        tensors = dict(_named(calls))
        notes = {
            "names": {key: list(call.outputs) for key, call in calls.items()},
            _INPUTS: {key: call.inputs for key, call in calls.items()},
            _STRIDES: {
                full_name: list(value.stride()) for full_name, value in tensors.items() if not value.is_contiguous()
            },
            _NOT_FINITE: [key for key, call in calls.items() if not call.is_finite],
        }
        try:
            with atomic_file(path) as temporary:
                save_tensors(tensors, temporary, {name: json.dumps(value) for name, value in notes.items()})
                entry = OutputFile(path.name, sha256_of(temporary), temporary.stat().st_size, tuple(calls))
        except OutputError as error:
            return json.dumps({"error": str(error)})
        except OSError as error:
            return json.dumps({"error": f"{path} cannot be written: {error}. Fix: choose another place for the run."})
        return json.dumps(asdict(entry))

    def _is_sound(self, file: OutputFile) -> bool:
        """Whether a file is as it was written; looked at once."""
        if file.name not in self._sound:
            path = self.folder / file.name
            try:
                if os.path.getsize(path) != file.num_bytes or sha256_of(path) != file.sha256:
                    return False
            except OSError:
                return False
            self._sound.add(file.name)
        return True

    def _opened(self, name: str) -> tuple[Any, dict[str, Any]]:
        """A file and what it says of its tensors. Those of the last few calls stay open."""
        if name not in self._open:
            handle: Any = safe_open(self.folder / name, "pt")
            notes = {key: json.loads(text) for key, text in handle.metadata().items()}
            while len(self._open) >= _NUM_OPEN:
                del self._open[next(iter(self._open))]
            self._open[name] = handle, notes
        return self._open[name]


def _named(calls: Mapping[str, Recorded]) -> Iterator[tuple[str, Tensor]]:
    for key, call in calls.items():
        for name, value in call.outputs.items():
            yield f"{key}/{name}", value
