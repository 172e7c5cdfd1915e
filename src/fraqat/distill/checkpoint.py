"""Training checkpoints: written beside training, atomically, checksummed; the newest sound one is found at start. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fraqat.distill.checkpoint_files import ROWS, DamagedError, Snapshot, loaded, restore, snapshot
from fraqat.distill.workers import ALONE, Workers
from fraqat.errors import CheckpointError, FraqatError, OutputError
from fraqat.files import explain_os_errors, remove_leftovers, save_tensors, sha256_of, sync_folder, write_json_atomic

FORMAT_VERSION = 3
_STATE_FILE = "state.json"
_MANIFEST_FILE = "manifest.json"
_SEAL = "manifest_sha256"
_DAMAGED, _REWOUND = "damaged", "rewound"
_UNSEALED = (1, 2)
"""Older formats, refused as such: a manifest of theirs may have no checksum."""
_VERSIONS = ("fraqat", "torch")
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What damaged JSON leads to."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A sound checkpoint: the step after which it was written, and its state with `SavedTensor` in place of tensors."""

    step: int
    state: dict[str, Any]

    def whole(self) -> dict[str, Any]:
        """The state with all of its tensors."""
        return loaded(self.state)


class _Writing:
    """A checkpoint on its way to disk: this process' part is written by a thread.

    Args:
        step: Number of finished steps.
        folder: Temporary, of all processes.
        file_name: Of this process.
        taken: The state.
        loss: Held-out loss at that step, if this checkpoint may be kept for it.
    """

    def __init__(self, step: int, folder: Path, file_name: str, taken: Snapshot, loss: float | None):
        self.step, self.folder, self.taken, self.loss = step, folder, taken, loss
        self._path = folder / file_name
        self._entry: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=False)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to write here."""
        return not self._thread.is_alive()

    def finish(self) -> dict[str, Any]:
        """Waits, and gives the manifest's entry of this process' file, or `error`."""
        self._thread.join()
        if self._error is None:
            assert self._entry is not None
            return self._entry
        if isinstance(self._error, FraqatError):
            return {"error": str(self._error)}
        return {
            "error": f"{self._path} cannot be written: {self._error}. Fix: let all processes see the same run folder, on a "
            "disk with room."
        }

    def _run(self) -> None:
        try:
            with explain_os_errors(self._path):
                self._entry = self._write()
        except BaseException as error:  # noqa: BLE001 - `finish` tells all processes, in the thread that trains
            self._error = error

    def _write(self) -> dict[str, Any]:
        if not self.taken.tensors:
            return {}
        save_tensors(self.taken.tensors, self._path)
        with self._path.open("rb") as stream:
            os.fsync(stream.fileno())
        return {
            "name": self._path.name,
            "sha256": sha256_of(self._path),
            "num_bytes": self._path.stat().st_size,
            "names": sorted(self.taken.tensors),
            ROWS: {name: [list(shape), first] for name, (shape, first) in self.taken.places.items()},
        }


class CheckpointStore:
    """The checkpoints of one run, in `folder/step-00000123/`.

    Disk use is bounded: the newest `num_kept`, the best one, and one that is being written.

    Args:
        folder: Where the checkpoints lie; all processes see the same.
        fingerprint: What must be equal for a checkpoint to be usable: the settings that decide the training's result.
        num_kept: How many checkpoints are kept; older ones are removed after a new one is safe on disk.
        warn: Receives one line for every checkpoint that is passed over.
        workers: Every one writes its part and calls every method together with the others.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        num_kept: int = 2,
        warn: Callable[[str], None] = print,
        workers: Workers = ALONE,
    ):
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.num_kept = num_kept
        self.warn = warn
        self.workers = workers
        self._writing: _Writing | None = None

    def save(self, step: int, state: dict[str, Any], loss: float | None = None) -> Path:
        """Writes the state after `step` optimizer steps, and returns when it is safe on disk; see `begin`."""
        self.begin(step, state, loss)
        self.finish()
        return self.folder / _name(step)

    def begin(self, step: int, state: dict[str, Any], loss: float | None = None) -> None:
        """Copies the state after `step` optimizer steps to the host, and lets a thread write it.

        Args:
            step: Number of finished steps.
            state: See `snapshot`; this process' part of it.
            loss: Held-out loss, if the checkpoint with the lowest one shall be kept.

        Raises:
            OutputError: Disk full or no permission; earlier checkpoints are untouched.
        """
        self.finish()
        taken = snapshot(state, is_first=self.workers.is_first)
        temporary = self.folder / f".{_name(step)}.part"
        self.workers.first(lambda: _make_empty(temporary))
        file_name = f"part-{self.workers.rank:05d}-of-{self.workers.num:05d}.safetensors"
        self._writing = _Writing(step, temporary, file_name, taken, loss)

    @property
    def is_written(self) -> bool:
        """Whether this process has nothing more to write for the checkpoint begun last; true if there is none."""
        return self._writing is None or self._writing.is_done

    @property
    def pending_step(self) -> int | None:
        """Of the checkpoint that `finish` would make final."""
        return None if self._writing is None else self._writing.step

    def finish(self) -> int | None:
        """Waits until every process has written its part of the checkpoint begun last, and makes it one that counts.

        Returns:
            Its step; None if there was none.

        Raises:
            OutputError: As `begin`.
        """
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        entries = [json.loads(text) for text in self.workers.gather_text(json.dumps(writing.finish()))]
        errors = [entry["error"] for entry in entries if "error" in entry]
        if errors:
            self.workers.first(lambda: shutil.rmtree(writing.folder, ignore_errors=True))
            raise OutputError(errors[0])
        self.workers.first(lambda: self._make_final(writing, [entry for entry in entries if entry]))
        return writing.step

    def load_latest(self, before: int | None = None) -> LoadedCheckpoint | None:
        """The newest checkpoint that is whole; damaged ones are named and passed over.

        Args:
            before: Only those of earlier steps than this. Later ones are set aside, until a new one takes their place.

        Returns:
            None if the run has no checkpoint yet.

        Raises:
            CheckpointError: Checkpoints exist but none is sound, or the newest belongs to other settings.
        """
        self.workers.first(lambda: remove_leftovers(self.folder))
        names = self.workers.tell(lambda: [path.name for path in self._folders(before)])
        damaged: list[Path] = []
        for name in reversed(names):
            folder = self.folder / name
            try:
                found = self._load(folder)
            except DamagedError as error:
                self.warn(f"checkpoint {name} is damaged ({error}): trying the one before")
                damaged.append(folder)
                continue
            for path in damaged:
                self.workers.first(lambda p=path: _set_aside(p, _DAMAGED))
            if before is not None:
                self.workers.first(lambda: self._set_aside_from(before))
            return found
        if names:
            raise CheckpointError(
                f"{self.folder}: all {len(names)} checkpoints are damaged. Fix: restore one from a backup, or delete the "
                "folder to start from the beginning."
            )
        return None

    def steps(self) -> list[int]:
        """Steps of all checkpoints, rising, sound or not; the same in every process."""
        return self.workers.tell(lambda: [_step_of(path) for path in self._folders()])

    def _set_aside_from(self, step: int) -> None:
        for path in self._folders():
            if _step_of(path) >= step:
                _set_aside(path, _REWOUND)

    @property
    def is_empty(self) -> bool:
        """Whether no checkpoint was written yet."""
        return not self._folders()

    def best_loss(self) -> float | None:
        """The lowest held-out loss of a checkpoint that is kept, or on its way to disk; the same in every process."""
        found = [loss for folder in self._folders() if (loss := _loss_of(folder)) is not None]
        if self._writing is not None and self._writing.loss is not None:
            found.append(self._writing.loss)
        return json.loads(self.workers.gather_text(json.dumps(min(found, default=None)))[0])

    @property
    def best(self) -> Path | None:
        """The checkpoint with the lowest held-out loss of those that have one."""
        losses = {folder: loss for folder in self._folders() if (loss := _loss_of(folder)) is not None}
        return min(losses, key=lambda folder: losses[folder]) if losses else None

    def _make_final(self, writing: _Writing, entries: list[dict[str, Any]]) -> None:
        target = self.folder / _name(writing.step)
        with explain_os_errors(target):
            try:
                write_json_atomic(writing.folder / _STATE_FILE, writing.taken.tree)
                manifest = {
                    "format_version": FORMAT_VERSION,
                    "step": writing.step,
                    "validation_loss": writing.loss,
                    "versions": {name: metadata.version(name) for name in _VERSIONS},
                    "num_processes": self.workers.num,
                    "state_sha256": sha256_of(writing.folder / _STATE_FILE),
                    "files": entries,
                    "fingerprint": self.fingerprint,
                }
                write_json_atomic(writing.folder / _MANIFEST_FILE, sealed(manifest))
                sync_folder(writing.folder)
                old = target.with_name(f".{target.name}.old")  # what `remove_leftovers` puts back
                if target.exists():
                    os.replace(target, old)
                os.replace(writing.folder, target)
                shutil.rmtree(old, ignore_errors=True)
                sync_folder(self.folder, recurse=False)
            finally:
                shutil.rmtree(writing.folder, ignore_errors=True)
            best = self.best
            for old in self._folders()[: -self.num_kept]:
                if old != best:
                    shutil.rmtree(old)
            for old in self.folder.glob(f"{_REWOUND}-step-*"):
                if _step_of(old) <= writing.step:
                    shutil.rmtree(old)

    def _load(self, folder: Path) -> LoadedCheckpoint:
        manifest, tree, problem = self.workers.tell(lambda: self._read(folder))
        if not problem:
            problems = self.workers.gather_text(self._find_damage(folder, manifest))
            rank = next((rank for rank, text in enumerate(problems) if text), 0)
            problem = problems[rank]
            if rank:
                problem = f"{problem}, as process {rank} sees it"
        if problem:
            raise DamagedError(problem)
        try:
            state = restore(tree, {folder / entry["name"]: entry for entry in manifest["files"]})
        except _UNREADABLE as error:
            raise DamagedError(f"its state cannot be read: {error!r}") from error
        if not isinstance(state, dict):
            raise DamagedError("it holds no state")
        return LoadedCheckpoint(int(manifest["step"]), state)

    def _read(self, folder: Path) -> tuple[dict[str, Any], Any, str]:
        """Manifest and plain state as the first process reads them for all, and what is wrong with them; empty if nothing is.

        Raises:
            CheckpointError: It is sound, and of another run or program.
        """
        try:
            return *self._read_sound(folder), ""
        except DamagedError as error:
            return {}, None, str(error)

    def _read_sound(self, folder: Path) -> tuple[dict[str, Any], Any]:
        try:
            manifest = json.loads((folder / _MANIFEST_FILE).read_text(encoding="utf-8"))
            _, version = int(manifest["step"]), manifest["format_version"]
        except _UNREADABLE as error:
            raise DamagedError(f"its manifest cannot be read: {error}") from error
        if manifest != sealed(manifest) and (version not in _UNSEALED or _SEAL in manifest):  # format 1 had no seal
            raise DamagedError("its manifest does not match its checksum")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has format {version}, this program reads {FORMAT_VERSION}. Fix: use its version."
            )
        versions, own = manifest.get("versions"), metadata.version("fraqat")
        written = versions.get("fraqat") if isinstance(versions, dict) else None
        if written != own:
            raise CheckpointError(
                f"{folder} was written by fraqat {written}, this is {own}: it would go on by other rules. Fix: install "
                f"fraqat=={written}, or train in a new folder."
            )
        if manifest.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{folder} belongs to other settings: {describe_difference(manifest.get('fingerprint'), self.fingerprint)}. "
                "Fix: train in a new folder, or use the recipe that made this one."
            )
        try:
            text = (folder / _STATE_FILE).read_bytes()
            if hashlib.sha256(text).hexdigest() != manifest["state_sha256"]:
                raise DamagedError(f"the checksum of {_STATE_FILE} does not match")
            return manifest, json.loads(text)
        except _UNREADABLE as error:
            raise DamagedError(f"its state cannot be read: {error!r}") from error

    def _find_damage(self, folder: Path, manifest: dict[str, Any]) -> str:
        """What is wrong with the files as this process sees them; empty if nothing is.

        All must be there in full, since it may have to read rows of any of them; it reads its share to check the sums.
        """
        try:
            files = {entry["name"]: entry for entry in manifest["files"]}
            for number, name in enumerate(sorted(files)):
                if Path(name).name != name:
                    return f"{name} lies outside of it"
                if number % self.workers.num != self.workers.rank:
                    if (folder / name).stat().st_size != files[name]["num_bytes"]:
                        return f"{name} has another size than its manifest says"
                elif sha256_of(folder / name) != files[name]["sha256"]:
                    return f"the checksum of {name} does not match"
        except _UNREADABLE as error:
            return repr(error)
        return ""

    def _folders(self, before: int | None = None) -> list[Path]:
        found = sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []
        return [path for path in found if before is None or _step_of(path) < before]


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1  # a name that is not ours; its manifest will not be either


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of everything else in it.

    Without it, a flipped bit in a setting would look like another recipe, and would not lead to the checkpoint before.
    """
    rest = {key: value for key, value in manifest.items() if key != _SEAL}
    return {**rest, _SEAL: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _make_empty(folder: Path) -> None:
    with explain_os_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def _loss_of(folder: Path) -> float | None:
    try:
        loss = json.loads((folder / _MANIFEST_FILE).read_text(encoding="utf-8"))["validation_loss"]
        return None if loss is None else float(loss)
    except _UNREADABLE:
        return None


def _set_aside(folder: Path, why: str) -> None:
    """Renames a checkpoint, so that it is never counted among the good ones and nothing of it is lost."""
    target = folder.with_name(f"{why}-{folder.name}")
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
