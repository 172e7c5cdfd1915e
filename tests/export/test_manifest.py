"""What is no export is refused in words, and the exports beside it are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fraqat.errors import ModelError
from fraqat.export import read_manifest, write_manifest


def test_a_run_folder_is_answered_with_its_exports(tmp_path: Path) -> None:
    for name in ("onnx", "gguf"):
        folder = tmp_path / "export" / name
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"1")
        write_manifest(folder, name, {})
    with pytest.raises(ModelError) as error:
        read_manifest(tmp_path)
    expected = (
        f"{tmp_path} is no export: it has no manifest.json. Fix: pass {tmp_path}/export/gguf or {tmp_path}/export/onnx."
    )
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "cannot be read: Expecting"), ("[]", "cannot be read: "), ("{}", "lacks 'format_version'")],
)
def test_a_damaged_manifest_says_what_is_wrong(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ModelError, match=f"manifest.json {reason}") as error:
        read_manifest(tmp_path)
    assert str(error.value).endswith("Fix: pass a folder of `fraqat export`.")
