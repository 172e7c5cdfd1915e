"""The list of an export's files with their checksums, so that what was edited, cut or made by a newer program is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fraqat.errors import ModelError
from fraqat.files import sha256_of, write_json_atomic

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
"""Of folders that other targets than `packed` write."""


def write_manifest(folder: Path, target: str, values: Mapping[str, Any]) -> None:
    """Writes `manifest.json` over everything that lies in the folder.

    Args:
        folder: A finished export.
        target: Name of the target.
        values: More to record, plain JSON.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    manifest = {
        "format": target,
        "format_version": MANIFEST_VERSION,
        "num_bytes": sum(path.stat().st_size for path in files),
        **values,
        "files": {path.relative_to(folder).as_posix(): sha256_of(path) for path in files},
    }
    write_json_atomic(folder / MANIFEST_FILE, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export whose files are as they were written.

    Raises:
        ModelError: It is missing or damaged, a file is missing or was changed, or a newer program wrote it.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ModelError(f"{folder} is no export: it has no {path.name}. {_fix(folder)}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, files = int(manifest["format_version"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise ModelError(f"{folder} is no export: {path.name} {reason}. {_fix(folder)}") from error
    if version > MANIFEST_VERSION:
        raise ModelError(
            f"{folder} has format {version}, this program reads up to {MANIFEST_VERSION}. Fix: update fraqat."
        )
    for name, digest in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ModelError(f"{path} names {name!r}, outside of the export. Fix: do not use this export.")
        if not file.is_file():
            raise ModelError(f"{file} is missing. Fix: export again.")
        if sha256_of(file) != digest:
            raise ModelError(f"{file} was changed or cut after it was written (checksum). Fix: export again.")
    return manifest


def _fix(folder: Path) -> str:
    """What to pass instead: the exports of a run, where its folder was passed."""
    found = [str(path.parent) for path in sorted(folder.glob(f"export/*/{MANIFEST_FILE}"))]
    return f"Fix: pass {' or '.join(found)}." if found else "Fix: pass a folder of `fraqat export`."
