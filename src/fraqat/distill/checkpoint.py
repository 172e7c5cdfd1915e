"""Training checkpoints: written atomically, checksummed, the newest sound one found at start. Never a pickle of objects."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fraqat.distill.micro_batch import is_out_of_memory
from fraqat.errors import CheckpointError
from fraqat.files import atomic_folder, remove_leftovers, sha256_of, write_json_atomic

FORMAT_VERSION = 2
_STATE_FILE = "state.pt"
_MANIFEST_FILE = "manifest.json"
_SEAL = "manifest_sha256"
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, pickle.UnpicklingError),
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
)
"""What torch's reader raises at damaged bytes; fuzzing has met all of the second row."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A sound checkpoint: the step after which it was written, and its state."""

    step: int
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in `folder/step-00000123/`.

    Args:
        folder: Where the checkpoints lie.
        fingerprint: What must be equal for a checkpoint to be usable: the settings that decide the training's result.
        num_kept: How many checkpoints are kept; older ones are removed after a new one is safe on disk.
        warn: Receives one line for every checkpoint that is passed over.
    """

    def __init__(
        self, folder: Path, fingerprint: dict[str, Any], num_kept: int = 2, warn: Callable[[str], None] = print
    ):
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.num_kept = num_kept
        self.warn = warn

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the state after `step` optimizer steps.

        Args:
            step: Number of finished steps.
            state: Tensors, numbers, strings, lists and dicts only: it is read back with `weights_only=True`.

        Raises:
            OutputError: Disk full or no permission; earlier checkpoints are untouched.
        """
        target = self.folder / f"step-{step:08d}"
        with atomic_folder(target, replace=True) as folder:
            path = folder / _STATE_FILE
            _torch_save(state, path)
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "sha256": sha256_of(path),
                "num_bytes": path.stat().st_size,
                "fingerprint": self.fingerprint,
            }
            write_json_atomic(folder / _MANIFEST_FILE, sealed(manifest))
        for old in self._folders()[: -self.num_kept]:
            shutil.rmtree(old)
        return target

    def load_latest(self) -> LoadedCheckpoint | None:
        """The newest checkpoint that is whole; damaged ones are named and passed over.

        Returns:
            None if the run has no checkpoint yet.

        Raises:
            CheckpointError: Checkpoints exist but none is sound, or the newest belongs to other settings.
        """
        remove_leftovers(self.folder)
        folders = self._folders()
        damaged: list[Path] = []
        for folder in reversed(folders):
            try:
                loaded = self._load(folder)
                for path in damaged:
                    _set_aside(path)
                return loaded
            except _DamagedError as error:
                self.warn(f"checkpoint {folder.name} is damaged ({error}): trying the one before")
                damaged.append(folder)
        if folders:
            raise CheckpointError(
                f"{self.folder}: all {len(folders)} checkpoints are damaged. Fix: restore one from a backup, or delete the "
                "folder to start from the beginning."
            )
        return None

    @property
    def is_empty(self) -> bool:
        """Whether no checkpoint was written yet."""
        return not self._folders()

    def _load(self, folder: Path) -> LoadedCheckpoint:
        try:
            manifest = json.loads((folder / _MANIFEST_FILE).read_text(encoding="utf-8"))
            step, digest, version = int(manifest["step"]), manifest["sha256"], manifest["format_version"]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise _DamagedError(f"its manifest cannot be read: {error}") from error
        if manifest != sealed(manifest) and (version != 1 or _SEAL in manifest):  # format 1 had no seal
            raise _DamagedError("its manifest does not match its checksum")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has format {version}, this program reads {FORMAT_VERSION}. Fix: use its version."
            )
        if manifest.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{folder} belongs to other settings: {describe_difference(manifest.get('fingerprint'), self.fingerprint)}. "
                "Fix: train in a new folder, or use the recipe that made this one."
            )
        path = folder / _STATE_FILE
        try:
            if sha256_of(path) != digest:
                raise _DamagedError("its checksum does not match")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what damage has made of it
                state = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            if is_out_of_memory(error):  # no fault of the checkpoint
                raise
            raise _DamagedError((str(error) or repr(error)).splitlines()[0]) from error
        if not isinstance(state, dict):
            raise _DamagedError("it holds no state")
        return LoadedCheckpoint(step, state)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of everything else in it.

    Without it, a flipped bit in a setting would look like another recipe, and would not lead to the checkpoint before.
    """
    rest = {key: value for key, value in manifest.items() if key != _SEAL}
    return {**rest, _SEAL: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


class _DamagedError(Exception):
    """The checkpoint cannot be used; an older one may."""


def _torch_save(state: dict[str, Any], path: Path) -> None:
    """`torch.save` through a Python stream, so that a full disk shows as an OSError and not as a torch internal error."""
    with path.open("wb") as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _set_aside(folder: Path) -> None:
    """Renames a damaged checkpoint, so that it is never counted among the good ones and nothing of it is lost."""
    target = folder.with_name(f"damaged-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def describe_difference(old: Any, new: Any, path: str = "") -> str:
    """The first few fields in which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [
            describe_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        return "; ".join(parts[:5])
    return f"{path} was {old!r} and is now {new!r}"
