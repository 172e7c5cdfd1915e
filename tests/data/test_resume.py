"""Laws of interrupted training on stored rows: each sample once per pass, and the resumed order is the uninterrupted one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from stored import BROKEN_PNG, SIDE, write_parquet, write_tars

from fraqat.data.bad_samples import SkippedSamplesWarning
from fraqat.data.captioned import CaptionedData, DataSpec, load_training_images, open_captioned
from fraqat.data.records import RecordsSpec
from fraqat.errors import CheckpointError, ConfigError

NUM_ROWS, BATCH = 22, 4


def open_data(
    folder: Path, *, layout: str = "parquet", streaming: bool, num_workers: int = 0, **changes: Any
) -> CaptionedData:
    """All rows of the split `train`, with a split `validation` beside it."""
    columns = {"image_column": "png", "caption_column": "txt"} if layout == "webdataset" else {}
    if not folder.exists():
        if layout == "webdataset":
            write_tars(folder / "train", NUM_ROWS, num_files=3)
            write_tars(folder / "validation", 3, num_files=1)
        else:
            write_parquet(folder, NUM_ROWS, num_files=3, images=changes.pop("images", None))
            write_parquet(folder, 3, num_files=1, split="validation")
    changes.pop("images", None)
    limits = {"max_bad_share": changes.pop("max_bad_share", 0.0)}
    records = RecordsSpec(str(folder), validation_split="validation", streaming=streaming, shuffle_buffer=5, **limits)
    spec = DataSpec(
        source="records", records=records, num_workers=num_workers, **{"num_train": NUM_ROWS} | columns | changes
    )
    return open_captioned(spec, SIDE, SIDE)


def take(stream: Any, num: int) -> list[list[str]]:
    return [names(batch) for batch in islice(iter(stream), num)]


def names(batch: dict[str, Any]) -> list[str]:
    return [f"{key}: {prompt}" for key, prompt in zip(batch["key"], batch["prompt"], strict=True)]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint does it: without pickled objects."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_sample_comes_once_per_pass_in_a_new_order_that_the_seed_decides(offline: Path, streaming: bool) -> None:
    source = open_data(offline / "data", streaming=streaming).source()
    num_batches = 3 * NUM_ROWS // BATCH
    batches = take(source.train_stream(BATCH, seed=1), num_batches)
    prompts = [prompt for batch in batches for prompt in batch]
    passes = [prompts[i * NUM_ROWS : (i + 1) * NUM_ROWS] for i in range(2)]
    assert all(len(set(one)) == NUM_ROWS for one in passes)
    assert passes[0] != passes[1] != sorted(passes[1])
    assert take(source.train_stream(BATCH, seed=1), num_batches) == batches
    assert take(source.train_stream(BATCH, seed=2), num_batches) != batches


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("layout", "streaming"), [("parquet", False), ("parquet", True), ("webdataset", True)])
def test_an_interrupted_run_goes_on_with_the_next_sample(
    offline: Path, layout: str, streaming: bool, num_workers: int
) -> None:
    source = open_data(offline / "data", layout=layout, streaming=streaming, num_workers=num_workers).source()
    whole = take(source.train_stream(BATCH, seed=3), 14)  # two and a half passes
    points = (1, 2, 5, 6, 11) if num_workers == 0 else (2, 6)
    for num_seen in points:
        stream = source.train_stream(BATCH, seed=3)
        iterator = iter(stream)
        seen = [names(next(iterator)) for _ in range(num_seen)]
        state = saved_and_loaded(stream.state_dict())
        del iterator
        resumed = source.train_stream(BATCH, seed=3)
        resumed.load_state_dict(state)
        assert seen + take(resumed, 14 - num_seen) == whole


def test_an_interrupted_run_keeps_to_its_side_of_the_split(offline: Path) -> None:
    folder = write_parquet(offline / "data", 40, num_files=3)
    records = RecordsSpec(str(folder), validation_share=0.3, streaming=True, shuffle_buffer=7)
    data = open_captioned(DataSpec("records", 20, records=records), SIDE, SIDE)
    source, stored = data.source(), [f"{sample.key}: {sample.prompt}" for sample in data.train_samples()]
    whole = take(source.train_stream(BATCH, seed=3), 10)  # two passes
    assert sorted(name for batch in whole[:5] for name in batch) == sorted(stored)
    for num_seen in (1, 3, 7):
        stream = source.train_stream(BATCH, seed=3)
        seen = take(stream, num_seen)
        resumed = source.train_stream(BATCH, seed=3)
        resumed.load_state_dict(stream.state_dict())
        assert seen + take(resumed, 10 - num_seen) == whole


def test_the_order_does_not_depend_on_the_number_of_workers(offline: Path) -> None:
    for streaming in (False, True):
        sources = [open_data(offline / "data", streaming=streaming, num_workers=n).source() for n in (0, 2)]
        first, second = (take(source.train_stream(BATCH, seed=3), 8) for source in sources)
        assert first == second


def test_a_place_that_was_counted_by_other_workers_is_refused(offline: Path) -> None:
    state = open_data(offline / "data", streaming=True).source().train_stream(BATCH, seed=0).state_dict()
    other = open_data(offline / "data", streaming=True, num_workers=2).source().train_stream(BATCH, seed=0)
    with pytest.raises(CheckpointError, match=r"data.num_workers = 2, .* made with 0.* Fix: set data.num_workers: 0"):
        other.load_state_dict(state)


def test_a_batch_larger_than_the_data_is_refused(offline: Path) -> None:
    source = open_data(offline / "data", streaming=True).source()
    with pytest.raises(ConfigError, match=f"train.batch_size = 23 .* at most data.num_train = {NUM_ROWS}"):
        source.train_stream(NUM_ROWS + 1, seed=0)
    assert source.steps_per_epoch(BATCH) == NUM_ROWS // BATCH


def test_the_first_and_the_held_out_batches_are_in_stored_order(offline: Path) -> None:
    source = open_data(offline / "data", streaming=True).source()
    assert [batch["prompt"] for batch in source.validation_batches(2)] == [["picture 0", "picture 1"], ["picture 2"]]
    first = source.first_batches(3, 2)
    assert [batch["key"] for batch in first] == [["0", "1"], ["2"]]
    assert first[0]["image"].shape == (2, 3, SIDE, SIDE) and first[0]["image"].dtype == torch.float32


def test_colour_digits_are_a_source_like_the_others(offline: Path) -> None:
    spec = DataSpec(num_train=12, num_validation=3)
    data = open_captioned(spec, 32, 32)
    samples = list(data.train_samples())
    images = load_training_images(spec)
    assert [sample.prompt for sample in samples] == list(images.prompts)
    assert all(torch.equal(sample.image, image) for sample, image in zip(samples, images.images, strict=True))
    stream = islice(data.source().train_stream(4, seed=0), 3)
    prompts = [prompt for batch in stream for prompt in batch["prompt"]]
    assert sorted(prompts) == sorted(images.prompts) and prompts != list(images.prompts)


def test_a_run_that_is_interrupted_again_and_again_sees_each_sample_once(offline: Path) -> None:
    source = open_data(offline / "data", streaming=True).source()
    state, seen = None, list[str]()
    for _ in range(11):  # two passes of 22 in batches of 4
        stream = source.train_stream(BATCH, seed=5)
        if state is not None:
            stream.load_state_dict(state)
        seen += names(next(iter(stream)))
        state = stream.state_dict()
    assert len(set(seen[:NUM_ROWS])) == len(set(seen[NUM_ROWS:])) == NUM_ROWS


def test_the_shuffle_buffer_of_the_library_loses_samples_where_ours_does_not(offline: Path) -> None:
    """Why streamed rows are shuffled by block and not by `IterableDataset.shuffle`."""
    rows = datasets.Dataset.from_dict({"n": list(range(NUM_ROWS))}).to_iterable_dataset(num_shards=2)

    def after_interruption() -> Iterator[int]:
        shuffled = rows.shuffle(seed=0, buffer_size=5)
        iterator = iter(shuffled)
        yield from (next(iterator)["n"] for _ in range(9))
        state = shuffled.state_dict()
        resumed = rows.shuffle(seed=0, buffer_size=5)
        resumed.load_state_dict(state)
        yield from (row["n"] for row in resumed)

    assert len(set(after_interruption())) < NUM_ROWS


@pytest.mark.filterwarnings("ignore::fraqat.data.bad_samples.SkippedSamplesWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_samples_are_left_out_of_every_pass_and_counted_across_an_interruption(
    offline: Path, streaming: bool
) -> None:
    images: dict[int, bytes | None] = {3: BROKEN_PNG, 17: b""}
    data = open_data(offline / "data", streaming=streaming, images=images, max_bad_share=0.1)
    source = data.source()
    whole = take(source.train_stream(BATCH, seed=3), 10)
    assert len({prompt for batch in whole[:5] for prompt in batch}) == NUM_ROWS - 2
    stream = source.train_stream(BATCH, seed=3)
    iterator = iter(stream)
    for _ in range(4):
        next(iterator)
    resumed = source.train_stream(BATCH, seed=3)
    resumed.load_state_dict(saved_and_loaded(stream.state_dict()))
    assert resumed.state_dict()["bad"] == stream.state_dict()["bad"]
    assert take(resumed, 6) == whole[4:]


def test_a_pass_in_stored_order_goes_on_after_the_last_sample_seen(offline: Path) -> None:
    for streaming in (False, True):
        data = open_data(offline / "data", streaming=streaming)
        places = [sample.place for sample in data.train_samples()]
        assert places == list(range(NUM_ROWS))
        assert [sample.place for sample in data.train_samples(after=12)] == places[13:]
        assert list(data.train_samples(after=NUM_ROWS - 1)) == []


def test_batches_leave_the_global_generator_alone(offline: Path) -> None:
    source = open_data(offline / "data", streaming=True).source()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(source.train_stream(BATCH, seed=0), 3)
    assert torch.equal(torch.rand(3), expected)


def test_skipping_warns_once_and_not_in_every_pass(offline: Path) -> None:
    data = open_data(offline / "data", streaming=False, images={3: BROKEN_PNG}, max_bad_share=0.1)
    with pytest.warns(SkippedSamplesWarning) as seen:
        take(data.source().train_stream(BATCH, seed=0), 20)
    assert len(seen) == 2  # the sample, and the total of the first pass
