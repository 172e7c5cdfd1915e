"""Writing files so that nothing is lost: atomic replacement, checksums, and clear words for a full disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fraqat.errors import OutputError

_TEMPORARY_SUFFIX = ".part"
_OLD_SUFFIX = ".old"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Generator[Path]:
    """Yields a temporary folder that takes the place of `target` when the block ends well.

    A failure leaves `target` as it was and removes the temporary folder.

    Args:
        target: Folder to create.
        replace: Let it take the place of an existing folder.

    Raises:
        OutputError: `target` exists and `replace` is false, the disk is full, or the place is not writable.
    """
    if target.exists() and not replace:
        raise OutputError(
            f"{target} exists already: nothing was written. Fix: choose another place or pass --overwrite."
        )
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_path(target)
        temporary.mkdir()
        try:
            yield temporary
            sync_folder(temporary)
            if target.exists():
                old = target.parent / f".{target.name}{_OLD_SUFFIX}"
                if old.exists():  # of a process that was killed after its own replacement
                    shutil.rmtree(old)
                os.replace(target, old)
                try:
                    os.replace(temporary, target)
                except OSError:
                    os.replace(old, target)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(temporary, target)
            _sync_path(target.parent)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


@contextmanager
def atomic_file(target: Path) -> Generator[Path]:
    """Yields a temporary path that replaces the file `target` when the block ends well.

    Raises:
        OutputError: The disk is full or the place is not writable; `target` is as it was.
    """
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_path(target)
        try:
            yield temporary
            _sync_path(temporary)
            os.replace(temporary, target)
            _sync_path(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step; see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of indented JSON; NaN and infinity are refused."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file from tensors on any device, tied or not contiguous too.

    Tensors on the host that share no memory are written as they lie there, without a copy.

    Raises:
        OSError: What the operating system said, for `explain_os_errors`.
    """
    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in places:  # the format has no tied tensors
            value = value.clone()
        places.add(value.untyped_storage().data_ptr())
        plain[name] = value
    mode = _mode_of_new_file(path)
    try:
        save_file(plain, path, metadata=metadata)
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error
    path.chmod(mode)  # safetensors makes files that only their owner can read


def _mode_of_new_file(path: Path) -> int:
    """The permissions that a file gets where `path` is, as the system gives them: the umask cannot be read in a thread."""
    probe = _temporary_path(path)
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


@contextmanager
def folder_lock(folder: Path, *, wait: bool = False) -> Generator[None]:
    """Keeps other processes out of `folder` while the block runs.

    Args:
        folder: An existing folder.
        wait: Until another process is done, instead of giving up.

    Raises:
        OutputError: Another process is at work there.
    """
    with explain_os_errors(folder), (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise OutputError(
                f"another process is at work in {folder}: nothing was changed. Fix: wait for it, or choose another folder."
            ) from None
        yield


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def explain_os_errors(path: Path) -> Generator[None]:
    """Turns "no space left" and "permission denied" into an `OutputError` that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_parent(path)).free
            raise OutputError(
                f"the disk is full while writing {path} ({free / 1e6:.0f} MB free): files saved earlier are untouched. "
                "Fix: free space, then run the same command again."
            ) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{path} would be larger than a file may be here (ulimit -f, or the file system): files saved earlier are "
                "untouched. Fix: raise the limit or choose another place, then run the same command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"no permission to write {path}. Fix: choose a folder that you own.") from error
        if error.errno == errno.EISDIR:
            raise OutputError(f"{path} is a folder: a file was to be written there. Fix: add a file name.") from error
        if error.errno == errno.ENOENT:
            raise OutputError(f"{path} cannot be made: {error.strerror}. Fix: choose another place.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise OutputError(f"{path} cannot be a folder: a file is in its way. Fix: choose another place.") from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder`, and puts back what it was about to replace."""
    for path in folder.glob(f".*{_OLD_SUFFIX}"):
        target = folder / path.name.removeprefix(".").removesuffix(_OLD_SUFFIX)
        if target.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, target)
    for path in folder.glob(f".*{_TEMPORARY_SUFFIX}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _temporary_path(target: Path) -> Path:
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY_SUFFIX}"


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def sync_folder(folder: Path, *, recurse: bool = True) -> None:
    """Makes sure that a folder is on disk, with what is in it unless `recurse` is false."""
    for path in (*(folder.rglob("*") if recurse else ()), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
