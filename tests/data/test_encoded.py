"""Laws of encoded samples on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fraqat.data import encoded
from fraqat.data.encoded import EncodedShard, EncodedStore
from fraqat.data.loader import ShuffledBatches
from fraqat.data.shard_rows import row_places
from fraqat.errors import DataError
from fraqat.files import save_tensors

KEY = {"model": "a", "prompts": 6, "size": [8, 8], "dtype": "float32"}


def shard(number: int, num: int = 3) -> EncodedShard:
    values = torch.arange(num) + number * num
    return EncodedShard(
        rows={"latents": values.view(-1, 1).float()},
        shared={"text": torch.tensor([[10.0 * number], [10.0 * number + 1]])},
        index=torch.tensor([0, 1, 0][:num]),
        constants={"ids": torch.tensor([7.0, 8.0])},
    )


class Producer:
    """Makes shards, and remembers which were asked for."""

    def __init__(self, num: int = 2, fail_at: int | None = None):
        self.num, self.fail_at, self.made = num, fail_at, list[int]()

    def __call__(self, num_done: int) -> Iterator[EncodedShard]:
        for number in range(num_done, self.num):
            if number == self.fail_at:
                raise RuntimeError("the machine died")
            self.made.append(number)
            yield shard(number)


def test_rows_are_what_was_encoded(tmp_path: Path) -> None:
    rows = EncodedStore(tmp_path, KEY).build(Producer())
    assert [float(rows[i]["latents"]) for i in range(len(rows))] == [0, 1, 2, 3, 4, 5]
    assert [float(rows[i]["text"]) for i in range(len(rows))] == [0, 1, 0, 10, 11, 10]
    assert torch.equal(rows.constants["ids"], torch.tensor([7.0, 8.0]))


def test_what_is_stored_is_not_encoded_again(tmp_path: Path) -> None:
    EncodedStore(tmp_path, KEY).build(Producer())
    again = Producer()
    assert len(EncodedStore(tmp_path, KEY).build(again)) == 6
    assert again.made == []


@pytest.mark.parametrize("change", [{"model": "b"}, {"prompts": 7}, {"size": [8, 9]}, {"dtype": "bfloat16"}])
def test_any_change_of_the_key_encodes_anew(tmp_path: Path, change: dict[str, object]) -> None:
    EncodedStore(tmp_path, KEY).build(Producer())
    changed = Producer()
    EncodedStore(tmp_path, KEY | change).build(changed)
    assert changed.made == [0, 1]


def test_an_interrupted_encoding_goes_on_after_the_last_whole_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="died"):
        EncodedStore(tmp_path, KEY).build(Producer(4, fail_at=2))
    assert EncodedStore(tmp_path, KEY).open() is None
    rest = Producer(4)
    rows = EncodedStore(tmp_path, KEY).build(rest)
    assert rest.made == [2, 3]
    assert [float(rows[i]["latents"]) for i in range(12)] == list(range(12))


@pytest.mark.parametrize("damage", ["cut", "removed", "manifest"])
def test_a_damaged_store_is_made_anew(tmp_path: Path, damage: str) -> None:
    store = EncodedStore(tmp_path, KEY)
    store.build(Producer())
    path = store.folder / ("manifest.json" if damage == "manifest" else "shard-00001.safetensors")
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    assert store.open() is None
    rows = store.build(Producer())
    assert [float(rows[i]["latents"]) for i in range(6)] == [0, 1, 2, 3, 4, 5]


def test_large_stores_are_read_from_disk_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = EncodedStore(tmp_path, KEY).build(Producer())
    monkeypatch.setattr(encoded, "_MAX_IN_MEMORY_BYTES", 0)
    read = EncodedStore(tmp_path, KEY).open()
    assert read is not None
    for i in range(6):
        assert {k: v.tolist() for k, v in held[i].items()} == {k: v.tolist() for k, v in read[i].items()}


def test_batches_hold_every_row_once(tmp_path: Path) -> None:
    rows = EncodedStore(tmp_path, KEY).build(Producer())
    assert [len(batch["latents"]) for batch in rows.batches(4)] == [4, 2]
    assert [len(batch["latents"]) for batch in rows.batches(4, 5)] == [4, 1]
    stream = iter(ShuffledBatches(rows, 3, seed=0))
    epoch = torch.cat([next(stream)["latents"], next(stream)["latents"]]).flatten()
    assert sorted(epoch.tolist()) == [0, 1, 2, 3, 4, 5]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_noticed_and_encoded_again_from_there_on(tmp_path: Path) -> None:
    store = EncodedStore(tmp_path, KEY)
    store.build(Producer(3))
    flip(store.folder / "shard-00001.safetensors")
    again = Producer(3)
    with pytest.warns(encoded.DamagedShardWarning, match="its checksum does not match"):
        rows = store.build(again)
    assert again.made == [1, 2]
    assert [float(rows[i]["latents"]) for i in range(9)] == list(range(9))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flipped", "cut", "gone"])
@pytest.mark.parametrize("wants_all", [False, True])
def test_first_shards_that_were_damaged_are_encoded_again(
    tmp_path: Path, damage: Callable[[Path], None], wants_all: bool
) -> None:
    store = EncodedStore(tmp_path, KEY)
    assert len(store.build_first(Producer(2))) == 6
    damage(store.folder / "shard-00001.safetensors")
    again = Producer(3 if wants_all else 2)
    rows = store.build(again) if wants_all else store.build_first(again)
    assert again.made == ([1, 2] if wants_all else [1])
    assert [float(rows[i]["latents"]) for i in range(len(rows))] == list(range(len(rows)))
    assert store.open() is not None if wants_all else store.open() is None


def test_a_flipped_bit_in_a_large_store_is_noticed_at_the_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "_MAX_IN_MEMORY_BYTES", 0)
    store = EncodedStore(tmp_path, KEY)
    store.build(Producer())
    flip(store.folder / "shard-00001.safetensors")
    rows = store.open()
    assert rows is not None
    assert float(rows[2]["latents"]) == 2
    with pytest.raises(DataError, match=r"shard-00001.*its checksum does not match.*run the same command again"):
        rows[3]
    again = Producer()
    assert float(store.build(again)[3]["latents"]) == 3
    assert again.made == [1]


def test_names_in_a_manifest_cannot_leave_the_store(tmp_path: Path) -> None:
    store = EncodedStore(tmp_path, KEY)
    store.build(Producer())
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("shard-00000", "../../shard-00000"))
    rows = store.open()
    assert rows is not None
    assert {shard._path.parent for shard in rows._shards} == {store.folder}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_rows_are_read_as_they_were_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.arange(24).reshape(4, 2, 3) % 7 - 2).to(dtype)
    save_tensors({"row.a": values, "row.empty": torch.zeros(4, 0), "row.flat": torch.arange(4)}, tmp_path / "x")
    places = row_places(tmp_path / "x")
    with (tmp_path / "x").open("rb", buffering=0) as stream:
        rows = [places["row.a"].read(stream, i) for i in (3, 0, 2, 1)]
        assert places["row.empty"].read(stream, 2).shape == (0,)
        assert [int(places["row.flat"].read(stream, i)) for i in range(4)] == [0, 1, 2, 3]
    assert torch.equal(torch.stack(rows), values[[3, 0, 2, 1]])
    assert rows[0].dtype is dtype


def test_a_shard_that_is_cut_while_it_is_open_ends_in_an_error(tmp_path: Path) -> None:
    save_tensors({"row.a": torch.ones(4, 256)}, tmp_path / "x")
    place = row_places(tmp_path / "x")["row.a"]
    with (tmp_path / "x").open("rb", buffering=0) as stream:
        assert place.read(stream, 3).sum() == 256
        os.truncate(tmp_path / "x", place.offset + 3 * 1024 + 5)
        assert place.read(stream, 2).sum() == 256
        with pytest.raises(OSError, match="it ends too early"):
            place.read(stream, 3)


def test_a_large_store_whose_shard_goes_away_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_MAX_IN_MEMORY_BYTES", 0)
    store = EncodedStore(tmp_path, KEY)
    store.build(Producer())
    rows = store.open()
    assert rows is not None
    assert float(rows[4]["latents"]) == 4
    path = store.folder / "shard-00001.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(DataError, match=r"shard-00001.*it ends too early.*run the same command again"):
        [rows[i] for i in (3, 4, 5)]
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00001.*No such file.*run the same command again"):
        rows[4]


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_was_read_does_not_hang_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    monkeypatch.setattr(encoded, "_MAX_IN_MEMORY_BYTES", 2**31 if in_memory else 0)
    rows = EncodedStore(tmp_path, KEY).build(Producer())
    constants = rows.constants
    before = {name: value.clone() for name, value in constants.items()}
    for path in rows._shards[0]._path.parent.glob("shard-*"):
        with path.open("r+b") as stream:
            stream.write(bytes(path.stat().st_size))
    assert all(torch.equal(constants[name], value) for name, value in before.items())
    assert rows._shards[0]._index.tolist() == [0, 1, 0]
    if in_memory:
        assert [float(rows[i]["latents"]) for i in range(6)] == [0, 1, 2, 3, 4, 5]
