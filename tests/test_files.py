"""Laws of writing files: what is saved comes back, with the permissions that files have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fraqat import files
from fraqat.files import save_tensors


@pytest.fixture
def _private_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_tied_sliced_and_strided_tensors_come_back(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {
        "whole": whole,
        "tied": whole,
        "rows": whole[1:],
        "first": torch.arange(9.0)[:2],
        "columns": whole.t(),
        "none": torch.empty(0, 3),
        "nothing": torch.empty(0),
        "number": torch.tensor(7),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    save_tensors(tensors, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


def test_tensors_of_their_own_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, int] = {}
    monkeypatch.setattr(
        files, "save_file", lambda tensors, path, metadata: given.update({n: t.data_ptr() for n, t in tensors.items()})
    )
    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)
    tensors = {"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2))}
    save_tensors(tensors, tmp_path / "x.safetensors")
    assert given == {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.mark.usefixtures("_private_umask")
def test_files_have_the_permissions_of_other_files(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_saving_never_changes_the_umask_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one for all threads, and a checkpoint is written by one while others make files."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    save_tensors({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").exists()
