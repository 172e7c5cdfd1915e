"""Laws of checkpoints: atomic, checksummed, the newest sound one wins, and a full disk loses nothing."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from fraqat.distill import CheckpointStore
from fraqat.distill.checkpoint import sealed
from fraqat.distill.checkpoint_files import DamagedError, Rows, loaded, restore, snapshot
from fraqat.errors import CheckpointError, OutputError

PART = "part-00000-of-00001.safetensors"


def make_store(folder: Path, warnings: list[str] | None = None, **fingerprint) -> CheckpointStore:
    return CheckpointStore(folder, fingerprint or {"a": 1}, 2, (warnings if warnings is not None else []).append)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def state(value: float) -> dict:
    return {"x": torch.full((3,), value), "n": value, "nested": {"list": [1, "a", None]}}


def test_latest_state_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.load_latest() is None
    for step in (1, 2, 3):
        store.save(step, state(step))
    loaded = make_store(tmp_path).load_latest()
    assert loaded is not None
    assert loaded.step == 3
    assert torch.equal(loaded.whole()["x"], torch.full((3,), 3.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / PART).write_bytes((folder / PART).read_bytes()[:-7]),
        lambda folder: (folder / PART).write_bytes(b"\0" + (folder / PART).read_bytes()[1:]),
        lambda folder: (folder / PART).unlink(),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text().replace("1", "2")),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: replace(folder / "manifest.json", '"fingerprint"', '"fingerprinu"'),
        lambda folder: replace(folder / "manifest.json", '"a": 1', '"a": 3'),
        lambda folder: replace(folder / "manifest.json", '"format_version": 3', '"format_version": 6'),
        lambda folder: replace(folder / "manifest.json", "manifest_sha256", "manifest_sha257"),
        lambda folder: (folder / "manifest.json").unlink(),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path, damage) -> None:
    store = make_store(tmp_path)
    store.save(1, state(1))
    store.save(2, state(2))
    damage(tmp_path / "step-00000002")
    warnings: list[str] = []
    loaded = make_store(tmp_path, warnings).load_latest()
    assert loaded is not None
    assert loaded.step == 1
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]


def test_only_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    make_store(tmp_path).save(1, state(1))
    (tmp_path / "step-00000001" / PART).write_bytes(b"no")
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        make_store(tmp_path).load_latest()


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    import pickle

    from fraqat.files import sha256_of

    class Attack:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "owned", "x"))

    make_store(tmp_path / "c").save(1, state(1))
    path = tmp_path / "c" / "step-00000001" / PART
    path.write_bytes(pickle.dumps(Attack(), protocol=2))
    manifest = path.with_name("manifest.json")
    values = json.loads(manifest.read_text())
    values["files"][0]["sha256"] = sha256_of(path)
    manifest.write_text(json.dumps(sealed(values)))
    found = make_store(tmp_path / "c").load_latest()
    assert found is not None
    with pytest.raises(DamagedError):
        found.whole()
    assert not (tmp_path / "owned").exists()


def test_a_file_outside_of_the_checkpoint_is_never_read(tmp_path: Path) -> None:
    make_store(tmp_path / "c").save(1, state(1))
    manifest = tmp_path / "c" / "step-00000001" / "manifest.json"
    values = json.loads(manifest.read_text().replace(PART, "../../elsewhere.safetensors"))
    manifest.write_text(json.dumps(sealed(values)))
    with pytest.raises(CheckpointError, match="damaged"):
        make_store(tmp_path / "c").load_latest()


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path, bits=4, rate={"peak": 1}).save(1, state(1))
    with pytest.raises(CheckpointError, match=r"rate\.peak was 1 and is now 2"):
        make_store(tmp_path, bits=4, rate={"peak": 2}).load_latest()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path).save(1, state(1))
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.write_text(json.dumps(sealed({**json.loads(manifest.read_text()), "format_version": 99})))
    with pytest.raises(CheckpointError, match="format 99"):
        make_store(tmp_path).load_latest()


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EACCES])
def test_a_failing_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int) -> None:
    store = make_store(tmp_path)
    store.save(1, state(1))
    before = sorted(tmp_path.rglob("*"))

    def fail(tensors, path) -> None:
        path.write_bytes(b"half")
        raise OSError(failure, "no")

    monkeypatch.setattr("fraqat.distill.checkpoint.save_tensors", fail)
    message = (
        "the disk is full while writing .*files saved earlier are untouched"
        if failure == errno.ENOSPC
        else "no permission"
    )
    with pytest.raises(OutputError, match=message):
        store.save(2, state(2))
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert make_store(tmp_path).load_latest().step == 1


def test_a_really_full_device_is_reported() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    from fraqat.files import explain_os_errors

    with pytest.raises(OutputError, match="the disk is full"), explain_os_errors(Path("/dev/full")):
        Path("/dev/full").write_bytes(b"0" * 100_000)


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(1, state(1))
    (tmp_path / ".step-00000002.abc.part").mkdir()
    (tmp_path / ".step-00000002.abc.part" / PART).write_bytes(b"half")
    assert make_store(tmp_path).load_latest().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_damaged_checkpoint_never_pushes_a_good_one_out(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(10, state(10))
    store.save(20, state(20))
    (tmp_path / "step-00000020" / PART).write_bytes(b"no")
    tight = CheckpointStore(tmp_path, {"a": 1}, 1, lambda text: None)
    assert tight.load_latest().step == 10
    tight.save(12, state(12))
    assert make_store(tmp_path).load_latest().step == 12
    assert (tmp_path / "damaged-step-00000020").is_dir()


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from fraqat.files import atomic_folder

    target = tmp_path / "x"
    target.mkdir()
    (target / "a").write_text("mine")
    replace = os.replace

    def fail(source, destination) -> None:
        if Path(destination) == target and str(source).endswith(".part"):
            raise PermissionError(13, "no")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError), atomic_folder(target, replace=True) as folder:
        (folder / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (target / "a").read_text() == "mine"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    make_store(tmp_path).save(3, state(3))
    (tmp_path / "step-00000003").rename(tmp_path / ".step-00000003.old")
    assert make_store(tmp_path).load_latest().step == 3


def test_another_version_is_refused_with_both_named(tmp_path: Path) -> None:
    make_store(tmp_path).save(1, state(1))
    manifest = tmp_path / "step-00000001" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(sealed({**values, "versions": {**values["versions"], "fraqat": "0.0.1"}})))
    with pytest.raises(CheckpointError, match=r"was written by fraqat 0\.0\.1, this is"):
        make_store(tmp_path).load_latest()


def test_training_may_change_a_state_that_is_being_written(tmp_path: Path) -> None:
    store, values = make_store(tmp_path), state(1)
    store.begin(1, values)
    values["x"].fill_(7)
    assert store.pending_step == 1
    assert store.finish() == 1
    assert make_store(tmp_path).load_latest().whole()["x"].tolist() == [1, 1, 1]


def test_a_checkpoint_that_was_begun_alone_does_not_count(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(1, state(1))
    store.begin(2, state(2))  # and the process dies
    while not store.is_written:
        pass
    assert make_store(tmp_path).load_latest().step == 1


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step, loss in enumerate((None, 0.5, 0.3, None, 0.4, None, None), 1):
        store.save(step, state(step), loss)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006", "step-00000007"]
    assert store.best == tmp_path / "step-00000003"
    assert store.best_loss() == 0.3


@pytest.mark.parametrize("num_readers", [1, 2, 3, 5])
@pytest.mark.parametrize("num_writers", [1, 2, 4])
def test_rows_come_back_however_they_are_cut(tmp_path: Path, num_writers: int, num_readers: int) -> None:
    from safetensors.torch import save_file

    whole = torch.arange(21.0).view(7, 3)
    files = {}
    for rank, rows in enumerate(torch.chunk(whole, num_writers)):
        first = rank * len(torch.chunk(whole, num_writers)[0])
        taken = snapshot({"w": Rows(rows, (7, 3), first), "b": whole[0], "n": 1}, is_first=rank == 0)
        path = tmp_path / f"{rank}.safetensors"
        save_file(taken.tensors, path)
        rows_of = {name: [list(shape), start] for name, (shape, start) in taken.places.items()}
        files[path] = {"names": sorted(taken.tensors), "rows": rows_of}
    found = restore(taken.tree, files)
    size = -(-7 // num_readers)
    parts = [found["w"].rows(slice(start, min(7, start + size))) for start in range(0, num_readers * size, size)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(loaded(found)["w"], whole)
    assert torch.equal(found["b"].whole(), whole[0])
    assert found["n"] == 1


def test_missing_rows_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2, 3)}, tmp_path / "a")
    found = restore({"w": {"__tensor__": "w"}}, {tmp_path / "a": {"names": ["w"], "rows": {"w": [[7, 3], 0]}}})
    with pytest.raises(DamagedError, match="rows 0 to 7 of w are not all there"):
        found["w"].whole()
