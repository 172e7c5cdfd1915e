"""Laws of bad samples: every one is counted, named and left out, and too many stop the run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from stored import BROKEN_PNG, SIDE, png, write_image_folder, write_keyed_json, write_parquet, write_tars

from fraqat.data.bad_samples import BadSamples, SkippedSamplesWarning
from fraqat.data.captioned import CaptionedData, DataSpec, open_captioned
from fraqat.data.records import RecordsSpec
from fraqat.errors import ConfigError

BAD_IMAGES: dict[int, bytes | None] = {2: BROKEN_PNG, 5: b"", 9: png(9, (3, 8)), 11: None}
BAD_CAPTIONS: dict[int, object] = {4: None, 7: "  ", 20: ""}


def data_of(folder: Path, num_rows: int, images: dict[int, bytes | None]) -> CaptionedData:
    """Rows of the split `train`, with the limits that a recipe has by itself."""
    write_parquet(folder, num_rows, images=images)
    write_parquet(folder, 2, num_files=1, split="validation")
    spec = RecordsSpec(str(folder), validation_split="validation")
    return open_captioned(DataSpec("records", num_rows, records=spec), SIDE, SIDE)


def open_bad(folder: Path, num_rows: int = 40, **records: Any) -> CaptionedData:
    if not folder.exists():
        write_parquet(folder, num_rows, images=BAD_IMAGES, captions=BAD_CAPTIONS)
        write_parquet(folder, 2, num_files=1, split="validation")
    spec = RecordsSpec(str(folder), validation_split="validation", **records)
    return open_captioned(DataSpec("records", records=spec, num_train=num_rows), SIDE, SIDE)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_samples_are_left_out_named_and_counted(offline: Path, streaming: bool, num_workers: int) -> None:
    open_bad(offline / "data")
    records = RecordsSpec(
        str(offline / "data"),
        validation_split="validation",
        key_column="id",
        max_bad=7,
        max_bad_share=0.5,
        streaming=streaming,
    )
    data = open_captioned(DataSpec("records", 40, records=records, num_workers=num_workers), SIDE, SIDE)
    with pytest.warns(SkippedSamplesWarning) as caught:
        places = [sample.place for sample in data.train_samples()]
    bad = {*BAD_IMAGES, *BAD_CAPTIONS}
    assert places == [i for i in range(40) if i not in bad]
    texts = [str(warning.message) for warning in caught]
    for place in bad:
        assert sum(f": sample id{place} is skipped: " in text for text in texts) == 1
    assert "sample id5 is skipped: image is empty (0 bytes)" in "\n".join(texts)
    assert "sample id9 is skipped: image has a side below 4 pixels" in "\n".join(texts)
    assert "7 of 40 samples skipped: 2 caption is empty (id7, id20)" in texts[-1]


@pytest.mark.filterwarnings("ignore::fraqat.data.bad_samples.SkippedSamplesWarning")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("limits", "name"),
    [({"max_bad": 6, "max_bad_share": 0.5}, "max_bad = 6"), ({"max_bad_share": 0.15}, "max_bad_share = 0.15")],
)
def test_more_than_the_limit_stop_the_run_with_counts_and_examples(
    offline: Path, limits: dict[str, Any], name: str, streaming: bool
) -> None:
    data = open_bad(offline / "data", streaming=streaming, **limits)
    with pytest.raises(ConfigError) as error:
        list(data.train_samples())
    text = str(error.value)
    assert f"7 of the first 21 samples cannot be used, more than the 6 that data.records.{name} allows" in text
    assert "2 caption is empty (7, 20)" in text and "1 image is missing (11)" in text and "Fix: " in text


def test_without_limits_of_its_own_one_sample_in_a_hundred_may_be_bad(offline: Path) -> None:
    data = data_of(offline / "data", 200, {3: b"", 150: b""})
    with pytest.warns(SkippedSamplesWarning):
        assert len(list(data.train_samples())) == 198
    data = data_of(offline / "more", 200, {3: b"", 150: b"", 199: b""})
    with pytest.warns(SkippedSamplesWarning), pytest.raises(ConfigError, match="3 of the first 200"):
        list(data.train_samples())


def test_missing_captions_and_files_are_bad_samples_in_every_layout(offline: Path) -> None:
    tars = write_tars(offline / "tars", 12, without_text=[7])
    pairs = write_image_folder(offline / "pairs", 12, metadata="txt")
    (pairs / "0007.txt").unlink()
    keyed = write_keyed_json(offline / "keyed", 12)
    (keyed / "images" / "chunk_1" / "000000007.png").unlink()
    cases = (
        (tars, {"image_column": "png", "caption_column": "txt"}, {}, "0007 is skipped: caption is missing"),
        (pairs, {}, {}, "0007.png is skipped: caption is missing"),
        (
            keyed,
            {"image_column": "filename", "caption_column": "cogvlm_caption"},
            {"files": "images/*/*.json"},
            "000000007 is skipped: image file is missing",
        ),
    )
    for folder, columns, files, message in cases:
        spec = RecordsSpec(str(folder), validation_share=0.15, max_bad_share=0.5, **files)
        data = open_captioned(DataSpec("records", 9, records=spec, **columns), SIDE, SIDE)
        with pytest.warns(SkippedSamplesWarning) as caught:
            assert len([*data.train_samples(), *data.validation_samples()]) <= 11
        assert message in str(caught[0].message)


def test_good_data_says_nothing(offline: Path) -> None:
    data = data_of(offline / "data", 30, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(data.train_samples())) == 30


def count(share: float, number: int | None, num_samples: int | None) -> BadSamples:
    return BadSamples("data", share, number, num_samples)


def test_a_share_of_an_unknown_number_is_taken_of_a_thousand_at_the_least() -> None:
    bad = count(0.01, None, None)
    for i in range(10):
        with pytest.warns(SkippedSamplesWarning) if i < 3 else warnings.catch_warnings():
            bad.add(0, str(i), "reason")
    with pytest.raises(ConfigError, match=r"11 of the first 11 .* more than the 10 that"):
        bad.add(0, "10", "reason")


def test_at_the_end_of_a_pass_the_share_is_taken_of_what_was_there() -> None:
    bad = count(0.01, None, None)
    with pytest.warns(SkippedSamplesWarning):
        bad.add(0, "a", "reason")
    for i in range(20):
        bad.add(0, str(i), None)
    with pytest.warns(SkippedSamplesWarning, match="1 of 21"), pytest.raises(ConfigError, match="more than the 0 that"):
        bad.finish()


def test_every_pass_is_counted_for_itself() -> None:
    bad = count(0.5, 1, 4)
    bad.load_state_dict(count(0.5, 1, 4).state_dict() | {"epoch": 1})  # later passes do not warn again
    for epoch in range(1, 4):
        for key, reason in (("a", "reason"), ("b", None), ("c", None), ("d", None)):
            bad.add(epoch, key, reason)
    assert bad.counts == {"reason": 1}
