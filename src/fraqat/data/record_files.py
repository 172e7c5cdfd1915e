"""Local files with samples: finding them, and the layouts that `datasets` has no reader for."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fraqat.data.hub import is_hub_id
from fraqat.errors import ConfigError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_DATA_SUFFIXES = (".parquet", ".tar", ".json", ".jsonl", ".csv", ".txt", ".arrow", ".gz", ".zst")
_METADATA = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
_CAPTION_SUFFIXES = (".txt", ".caption")
_NUM_SHOWN = 8
_HEAD_CHARACTERS = 2**16


@dataclass(frozen=True)
class LocalFiles:
    """Files of one data set.

    Args:
        root: Folder that the names are relative to.
        paths: The files, sorted.
        is_folder: A folder was named, not files.
    """

    root: Path
    paths: tuple[Path, ...]
    is_folder: bool


@dataclass(frozen=True)
class FileRows:
    """Rows that were read from files.

    Args:
        keys: Name of each row.
        packed: Each row as JSON.
        columns: Names of all columns.
    """

    keys: list[str]
    packed: list[str]
    columns: tuple[str, ...]


def is_local_path(path: str) -> bool:
    """Whether a path means local files; otherwise it is a hub id."""
    if Path(path).expanduser().exists() or path.startswith((".", "~", "/")) or glob.has_magic(path):
        return True
    return not is_hub_id(path) or path.endswith(_DATA_SUFFIXES)


def find_local_files(path: str, pattern: str | None, field: str = "data.records.path") -> LocalFiles:
    """The files that a path names.

    Args:
        path: Folder, file or glob pattern.
        pattern: Glob pattern of files in a folder; None takes all but hidden ones.
        field: Of the recipe, for messages.

    Raises:
        ConfigError: There is no such file; the message names what there is.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = place.glob(pattern) if pattern else place.rglob("*")
        paths = tuple(sorted(p for p in found if p.is_file() and not _is_hidden(p.relative_to(place))))
        if not paths:
            what = f"no file matches data.records.files = {pattern!r}" if pattern else "it is empty"
            raise ConfigError(
                f"{field} = {path!r}: {what}; it has {_shown(place)}. Fix: correct the path or the files."
            )
        return LocalFiles(place, paths, is_folder=True)
    if glob.has_magic(path):
        paths = tuple(sorted(p for p in map(Path, glob.glob(str(place), recursive=True)) if p.is_file()))
    else:
        paths = (place,) if place.is_file() else ()
    if not paths:
        near = next(parent for parent in place.absolute().parents if parent.is_dir())
        raise ConfigError(
            f"{field} = {path!r}: there is no such file; {near} has {_shown(near)}. Fix: correct the path."
        )
    return LocalFiles(paths[0].parent, paths, is_folder=False)


def describe_files(files: LocalFiles) -> dict[str, Any]:
    """Number of files, and a digest of their names, sizes and times."""
    digest = hashlib.sha256()
    for path in files.paths:
        stat = path.stat()
        name = path.relative_to(files.root) if path.is_relative_to(files.root) else path
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return {"num_files": len(files.paths), "files_digest": digest.hexdigest()[:32]}


def pair_images_with_texts(files: LocalFiles) -> FileRows | None:
    """Rows of a folder that has a text file of the same name beside its images, or None where it has another layout.

    An image without a text has an empty caption, which is counted as a bad sample later.
    """
    if any(path.name in _METADATA for path in files.paths):
        return None
    images = [path for path in files.paths if path.suffix.lower() in IMAGE_SUFFIXES]
    texts = {path.with_suffix(""): path for path in files.paths if path.suffix.lower() in _CAPTION_SUFFIXES}
    if not images or not any(path.with_suffix("") in texts for path in images):
        return None
    rows = [{"image": str(path), "caption": _read_text(texts.get(path.with_suffix("")))} for path in images]
    keys = [path.relative_to(files.root).as_posix() for path in images]
    return FileRows(keys, [json.dumps(row) for row in rows], ("image", "caption"))


def is_keyed_json(path: Path) -> bool:
    """Whether a file is one JSON object that maps names to rows, as opposed to a list of rows or one row per line."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        head = stream.read(_HEAD_CHARACTERS).lstrip()
    if not head.startswith("{"):
        return False
    try:
        value, end = json.JSONDecoder().raw_decode(head)
    except ValueError:
        return re.match(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{', head) is not None
    return not head[end:].strip() and bool(value) and all(isinstance(item, dict) for item in value.values())


def read_keyed_json(files: LocalFiles, columns: Sequence[str]) -> FileRows:
    """Rows of files that map names to rows.

    Args:
        files: The JSON files; others in the folder are passed over.
        columns: Those to keep, `a.b` for a field of `a`.

    Raises:
        ConfigError: A file is not of this layout.
    """
    keys, packed, known = list[str](), list[str](), dict[str, None]()
    heads = {column for name in columns for column in (name, name.partition(".")[0])}
    for path in files.paths:
        if path.suffix != ".json":
            continue
        for key, row in _keyed_rows(path):
            known.update(dict.fromkeys(row))
            keys.append(key)
            packed.append(
                json.dumps({name: row[name] for name in row if name in heads} | {"__folder__": str(path.parent)})
            )
    if not keys:
        raise ConfigError(
            f"data.records.path = {str(files.root)!r}: no .json file in {_shown(files.root)}. Fix: correct data.records.files."
        )
    return FileRows(keys, packed, tuple(known))


def read_image_file(name: str, folder: str | None) -> bytes:
    """The bytes of an image that a row names.

    Args:
        name: Path, relative to `folder` or absolute, or the name of a file in a zip file in `folder`.
        folder: Where relative names start; None on the hub.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(name) if folder is None else Path(folder, name)
    if path.is_file():
        return path.read_bytes()
    if folder is None or (place := _zip_members(folder).get(Path(name).name)) is None:
        raise FileNotFoundError(name)
    return _read_member(*place)


@lru_cache(maxsize=64)
def _zip_members(folder: str) -> Mapping[str, tuple[Path, zipfile.ZipInfo]]:
    """File name -> zip file and member, for all zip files in a folder."""
    members: dict[str, tuple[Path, zipfile.ZipInfo]] = {}
    for archive in sorted(Path(folder).glob("*.zip")):
        with zipfile.ZipFile(archive) as stream:
            members.update({Path(info.filename).name: (archive, info) for info in stream.infolist()})
    return members


def _read_member(archive: Path, info: zipfile.ZipInfo) -> bytes:
    """Reads one member without the table of contents, which is long, and without a file that processes would share."""
    with archive.open("rb") as stream:
        stream.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", stream.read(30))
        stream.seek(name_length + extra_length, 1)
        data = stream.read(info.compress_size)
    return zlib.decompress(data, -zlib.MAX_WBITS) if info.compress_type == zipfile.ZIP_DEFLATED else data


def _keyed_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON: {error}. Fix: copy it again, or leave it out by data.records.files."
        ) from None
    if not isinstance(values, dict) or not all(isinstance(row, dict) for row in values.values()):
        raise ConfigError(
            f"{path} does not map names to rows. Fix: leave it out by data.records.files, or set layout: auto."
        )
    yield from values.items()


def _read_text(path: Path | None) -> str | None:
    return None if path is None else path.read_text(encoding="utf-8", errors="replace").strip()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _shown(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return (", ".join(names[:_NUM_SHOWN]) or "nothing") + more
