"""Laws of hub data sets, on a hub of this machine: what is loaded, and what is said when it cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from fake_hub import COMMIT, serve_hub
from stored import SIDE, caption, write_keyed_json, write_parquet

from fraqat.data.captioned import DataSpec, open_captioned
from fraqat.data.prompts import PROMPT_SETS, PromptSpec, load_prompts
from fraqat.data.records import RecordsSpec, describe_records, open_records
from fraqat.errors import ConfigError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "hub"
    with serve_hub(root, tmp_path / "cache", monkeypatch):
        yield root


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_gives_the_rows_of_its_splits(hub: Path, streaming: bool) -> None:
    write_parquet(hub / "someone" / "pictures" / "data", 6)
    write_parquet(hub / "someone" / "pictures" / "data", 2, num_files=1, split="validation")
    records = RecordsSpec("someone/pictures", validation_split="validation", streaming=streaming)
    data = open_captioned(DataSpec(source="records", records=records, num_train=6), SIDE, SIDE)
    assert [sample.prompt for sample in data.train_samples()] == [caption(i) for i in range(6)]
    assert [sample.prompt for sample in data.validation_samples()] == [caption(i) for i in range(2)]
    assert data.description["records"]["commit"] == COMMIT


def test_captions_alone_are_read_from_keyed_json_without_the_pictures(hub: Path) -> None:
    folder = write_keyed_json(hub / "Ejafa" / "ye-pop", 12)
    (folder / "images" / "chunk_0" / "chunk_0.zip").write_bytes(b"eleven gigabytes")
    records = RecordsSpec("Ejafa/ye-pop", files="images/*/*.json", layout="keyed_json", validation_share=0.3)
    spec = DataSpec(
        source="records", records=records, caption_column="cogvlm_caption", learn_from="sampling_path", num_train=5
    )
    data = open_captioned(spec, SIDE, SIDE)
    samples = list(data.train_samples())
    assert len(samples) == 5 and all(sample.image is None for sample in samples)
    assert not any(hub.parent.joinpath("cache").rglob("*.zip"))
    assert data.description["records"]["commit"] == COMMIT


@pytest.mark.parametrize("source", PROMPT_SETS)
def test_a_named_prompt_list_is_one_file_of_its_data_set(hub: Path, source: str) -> None:
    entry = PROMPT_SETS[source]
    folder = hub / entry.path
    folder.mkdir(parents=True)
    rows = [{entry.column: f"prompt {i}", "category": "people"} for i in range(5)]
    keyed = {f"{i:04x}": row for i, row in enumerate(rows)}
    (folder / entry.file).write_text(json.dumps(keyed if source == "mjhq-30k" else rows))
    (folder / "images.zip").write_bytes(b"0")
    assert load_prompts(PromptSpec(source)) == tuple(f"prompt {i}" for i in range(5))
    assert not any(hub.parent.joinpath("cache").rglob("images.zip"))


def test_prompts_are_rows_of_a_hub_data_set_when_no_file_is_named(hub: Path) -> None:
    write_parquet(hub / "someone" / "pictures" / "data", 4, split="test")
    spec = PromptSpec("someone/pictures", split="test", column="caption")
    assert load_prompts(spec) == tuple(caption(i) for i in range(4))


def prepared(hub: Path, kind: str) -> RecordsSpec:
    folder = write_parquet(hub / "someone" / "pictures", 4)
    if kind == "gated":
        (folder / ".gated").touch()
    if kind == "program":
        (folder / "pictures.py").write_text("raise SystemExit('ran')")
    values = {"split": {"split": "test"}, "revision": {"revision": "v2"}, "files": {"files": "data/*.parquet"}}
    path = "someone/missing" if kind == "missing" else "someone/pictures"
    return RecordsSpec(path, **values.get(kind, {}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "'someone/missing' cannot be read: .* Fix: correct the hub id or the local path"),
        ("gated", "Fix: accept the terms on https://huggingface.co/datasets/someone/pictures in your browser"),
        ("revision", "Fix: correct data.records.revision = 'v2'"),
        ("files", "Fix: correct data.records.path or data.records.files"),
        ("split", "data.records.split = 'test' is not possible: allowed is train"),
        ("program", "Fix: use a copy of the data as parquet files: no code of a data set is ever run"),
    ],
)
def test_what_cannot_be_had_is_one_line_with_the_fix(hub: Path, kind: str, message: str) -> None:
    spec = prepared(hub, kind)
    with pytest.raises(ConfigError, match=message) as error:
        open_records(spec, spec.split, ["caption"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["auto", "keyed_json"])
def test_a_missing_gated_data_set_of_keyed_json_is_explained_too(
    hub: Path, layout: Literal["auto", "keyed_json"]
) -> None:
    (hub / "someone" / "secret").mkdir(parents=True)
    (hub / "someone" / "secret" / ".gated").touch()
    with pytest.raises(ConfigError, match="accept the terms"):
        open_records(RecordsSpec("someone/secret", layout=layout, files="*.json"), "train", ["caption"])


def test_offline_says_how_to_go_on(offline: Path) -> None:
    for layout in ("auto", "keyed_json"):
        with pytest.raises(ConfigError, match="Fix: unset HF_HUB_OFFLINE, or set the path to a local copy"):
            open_records(RecordsSpec("someone/pictures", layout=layout), "train", ["caption"])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The hub cannot be reached; the list holds after how many tries that was found."""
    asked: list[int] = []

    def refuse(method: str, url: str, *, max_retries: int, **arguments: object) -> None:
        asked.append(1 + max_retries)
        raise OSError(f"no route to {url}.")

    monkeypatch.setattr("huggingface_hub.utils.http_backoff", refuse)
    return asked


def test_without_a_network_it_is_said_before_the_library_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[int]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("the library was asked"))
    for ask in (lambda spec: open_records(spec, "train", ["caption"]), describe_records):
        with pytest.raises(ConfigError) as caught:
            ask(RecordsSpec("someone/pictures"))
        assert str(caught.value) == (
            "data.records.path = 'someone/pictures' cannot be had: it is not in the local cache, and http://hub cannot be "
            "reached (no route to http://hub). Fix: check the network, or set the path to a local copy; there is no local "
            "folder 'someone/pictures' here."
        )
    assert no_network == [3, 3]


def test_a_data_set_that_was_prepared_is_left_to_the_library_without_a_network(
    hub: Path, no_network: list[int]
) -> None:
    write_parquet(hub / "someone" / "MyPictures" / "data", 6)
    spec = RecordsSpec("someone/MyPictures")
    with pytest.raises(ConfigError, match="it is not in the local cache"):
        open_records(spec, "train", ["caption"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.utils.http_backoff", lambda *_, **__: None)
        first = open_records(spec, "train", ["caption"]).values("caption")
    assert open_records(spec, "train", ["caption"]).values("caption") == first
    assert no_network == [3]


def test_what_was_loaded_once_is_there_offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    write_parquet(hub / "someone" / "pictures", 6)
    spec = RecordsSpec("someone/pictures")
    first = open_records(spec, "train", ["caption"]).values("caption")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_records(spec, "train", ["caption"]).values("caption") == first
    assert describe_records(spec)["commit"] == COMMIT
