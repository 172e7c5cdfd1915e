"""Laws of stored rows: every layout gives the same samples, and what is missing is named."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError
from stored import SIDE, caption, write_image_folder, write_keyed_json, write_parquet, write_tars

from fraqat.data.captioned import CaptionedData, DataSpec, held_out_prompts, open_captioned
from fraqat.data.records import RecordsSpec, open_records
from fraqat.data.samples import is_held_out
from fraqat.errors import ConfigError

pytestmark = [
    pytest.mark.usefixtures("collect_files"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]

NUM_ROWS = 12

LAYOUTS: dict[str, Any] = {
    "parquet": (lambda folder: write_parquet(folder, NUM_ROWS), {}),
    "metadata.csv": (lambda folder: write_image_folder(folder, NUM_ROWS, metadata="csv"), {}),
    "metadata.jsonl": (lambda folder: write_image_folder(folder, NUM_ROWS, metadata="jsonl"), {}),
    "text files": (lambda folder: write_image_folder(folder, NUM_ROWS, metadata="txt"), {}),
    "webdataset": (lambda folder: write_tars(folder, NUM_ROWS), {"image_column": "png", "caption_column": "txt"}),
    "keyed JSON": (
        lambda folder: write_keyed_json(folder, NUM_ROWS),
        {"image_column": "filename", "caption_column": "cogvlm_caption", "files": "images/*/*.json"},
    ),
    "keyed JSON, zip": (
        lambda folder: write_keyed_json(folder, NUM_ROWS, zipped=True),
        {"image_column": "filename", "caption_column": "cogvlm_caption", "files": "images/*/*.json"},
    ),
}


def data_of(path: Path | str, **arguments: Any) -> CaptionedData:
    names = (
        "streaming",
        "files",
        "split",
        "validation_split",
        "validation_share",
        "key_column",
        "name",
        "shuffle_buffer",
    )
    records = {name: arguments.pop(name) for name in names if name in arguments}
    records = {"validation_share": 0.3} | records
    spec = DataSpec(source="records", records=RecordsSpec(str(path), **records), **{"num_train": 5} | arguments)
    return open_captioned(spec, SIDE, SIDE)


def write_broken(folder: Path) -> Path:
    """A parquet file that is none."""
    folder.mkdir()
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    return folder


def numbers(samples: Any) -> list[int]:
    """The red value of each picture, which its caption names too."""
    found: list[int] = []
    for sample in samples:
        assert sample.image.shape == (3, SIDE, SIDE)
        found.append(round((sample.image[0, 0, 0].item() + 1) * 127.5))
        assert sample.prompt == caption(found[-1])
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_each_row_to_one_side_in_stored_order(offline: Path, layout: str, streaming: bool) -> None:
    write, arguments = LAYOUTS[layout]
    data = data_of(write(offline / "data"), streaming=streaming, **arguments)
    train, validation = numbers(data.train_samples()), numbers(data.validation_samples())
    assert train == sorted(train) and validation == sorted(validation)
    assert len(train) == 5 and not set(train) & set(validation) and validation


def test_a_row_is_on_the_same_side_whatever_the_order_the_size_and_the_way_of_reading(offline: Path) -> None:
    small = write_parquet(offline / "small", 40)
    large = write_parquet(offline / "large", 60, num_files=3)
    sides = [
        {sample.prompt for sample in data_of(folder, num_train=20, streaming=streaming, **by).validation_samples()}
        for by in ({}, {"key_column": "id"})
        for folder, streaming in ((small, False), (small, True), (large, False), (large, True))
    ]
    for same in (sides[:4], sides[4:]):
        assert same[0] == same[1] and same[2] == same[3] and same[0] < same[2]
    assert sides[0] != sides[4]  # by place, and by key


def test_the_held_out_share_is_the_share_that_was_asked_for() -> None:
    held_out = sum(is_held_out(f"key {i}", 0.025) for i in range(20_000))
    assert abs(held_out - 500) < 4 * 22.1  # four standard deviations
    smaller = {i for i in range(2000) if is_held_out(str(i), 0.1)}
    assert smaller < {i for i in range(2000) if is_held_out(str(i), 0.2)}


def test_a_named_validation_split_is_taken_whole(offline: Path) -> None:
    folder = write_parquet(offline / "data", 8)
    write_parquet(folder, 3, num_files=1, split="validation")
    for streaming in (False, True):
        data = data_of(folder, num_train=8, validation_split="validation", streaming=streaming)
        assert numbers(data.train_samples()) == list(range(8)) and numbers(data.validation_samples()) == [0, 1, 2]


def test_num_train_and_num_validation_take_the_first(offline: Path) -> None:
    folder = write_parquet(offline / "data", 40)
    for streaming in (False, True):
        whole, cut = (
            data_of(folder, num_train=n, num_validation=m, streaming=streaming) for n, m in ((20, 256), (7, 2))
        )
        assert numbers(cut.train_samples()) == numbers(whole.train_samples())[:7]
        assert numbers(cut.validation_samples()) == numbers(whole.validation_samples())[:2]


@pytest.mark.parametrize("streaming", [False, True])
def test_more_training_samples_than_there_are_is_an_error_with_the_number(offline: Path, streaming: bool) -> None:
    folder = write_parquet(offline / "data", 10)
    num = len(numbers(data_of(folder, num_train=1).validation_samples()))
    with pytest.raises(
        ConfigError, match=f"data.num_train = 4096 is not possible: allowed is 1 to {10 - num}, .*Fix: set"
    ):
        list(data_of(folder, num_train=4096, streaming=streaming).train_samples())


def test_a_share_that_holds_out_nothing_is_an_error(offline: Path) -> None:
    folder = write_parquet(offline / "data", 4)
    with pytest.raises(ConfigError, match=r"validation_share = 1e-06 .* holds out at least one of 4 rows"):
        data_of(folder, num_train=2, validation_share=1e-6)


def test_single_files_and_patterns_are_read_too(offline: Path) -> None:
    folder = write_parquet(offline / "data", 12, num_files=3)
    one, some = folder / "train-00000-of-00003.parquet", folder / "train-0000[01]-*.parquet"
    for path, expected in ((one, 4), (some, 8)):
        assert open_records(RecordsSpec(str(path)), "train", ["caption"]).num_rows == expected
    assert open_records(RecordsSpec(str(folder), files="train-00002*"), "train", ["caption"]).num_rows == 4


def test_json_lines_csv_and_text_have_columns(offline: Path) -> None:
    (offline / "a.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(3)))
    (offline / "b.csv").write_text("text\nt0\nt1\nt2\n")
    (offline / "c.txt").write_text("t0\nt1\nt2\n")
    (offline / "d.json").write_text(json.dumps([{"text": f"t{i}"} for i in range(3)]))
    for name in ("a.jsonl", "b.csv", "c.txt", "d.json"):
        records = open_records(RecordsSpec(str(offline / name)), "train", ["text"])
        assert records.values("text") == ["t0", "t1", "t2"]
        streamed = open_records(RecordsSpec(str(offline / name), streaming=True), "train", ["text"])
        assert [row["text"] for row in streamed.read()] == ["t0", "t1", "t2"]


@pytest.mark.parametrize("are_shown", [True, False])
def test_local_files_show_no_bars_of_the_library_and_leave_its_setting(
    offline: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, are_shown: bool
) -> None:
    import datasets

    monkeypatch.setattr(sys.modules["datasets.utils.tqdm"], "_hf_datasets_progress_bars_disabled", not are_shown)
    assert numbers(data_of(write_parquet(offline / "parquet", NUM_ROWS)).train_samples())
    assert numbers(data_of(write_image_folder(offline / "folder", NUM_ROWS, metadata="csv")).train_samples())
    with pytest.raises(ConfigError, match="cannot be read"):
        data_of(write_broken(offline / "broken"))
    assert capsys.readouterr() == ("", "")
    assert datasets.are_progress_bars_disabled() is not are_shown


def test_bars_that_the_user_asked_for_stay(
    offline: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = sys.modules["datasets.utils.tqdm"]
    for place in (sys.modules["datasets.config"], bars):
        monkeypatch.setattr(place, "HF_DATASETS_DISABLE_PROGRESS_BARS", False)
    monkeypatch.setattr(bars, "_hf_datasets_progress_bars_disabled", False)
    data_of(write_parquet(offline / "data", NUM_ROWS))
    assert "Generating train split" in capsys.readouterr().err


def test_a_field_of_a_column_can_be_the_caption(offline: Path) -> None:
    folder = write_tars(offline / "data", 12)
    data = data_of(folder, image_column="png", caption_column="json.long")
    assert next(iter(data.train_samples())).prompt.startswith("a picture ")
    assert next(iter(data.train_samples())).key.isdigit()  # the name in the archive


def test_sampling_paths_do_not_read_the_pictures(offline: Path) -> None:
    folder = write_parquet(offline / "data", 12, images=dict.fromkeys(range(12), b"no picture"))
    data = data_of(folder, learn_from="sampling_path")
    assert [sample.image for sample in data.train_samples()] == [None] * 5
    assert "image" not in open_records(data.spec.records, "train", ["caption"])[0]
    assert "image" not in data.source().validation_batches(2)[0]


def test_several_captions_give_the_first_or_one_that_the_seed_decides(offline: Path) -> None:
    lists = {i: ["", f"first {i}", f"second {i}", f"third {i}"] for i in range(40)}
    folder = write_parquet(offline / "data", 40, captions=lists)
    first = [sample.prompt for sample in data_of(folder, num_train=20).train_samples()]
    assert all(prompt.startswith("first ") for prompt in first)
    seeded = [
        [sample.prompt for sample in data_of(folder, num_train=20, caption_choice="seeded", seed=seed).train_samples()]
        for seed in (0, 0, 1)
    ]
    assert seeded[0] == seeded[1] != seeded[2]
    assert {prompt.split()[0] for prompt in seeded[0]} == {"first", "second", "third"}


def test_held_out_prompts_are_those_of_the_held_out_samples(offline: Path) -> None:
    folder = write_parquet(offline / "data", 20, images=dict.fromkeys(range(20), None))
    spec = DataSpec(source="records", records=RecordsSpec(str(folder), validation_share=0.3), num_train=5)
    prompts = held_out_prompts(spec, 3)
    assert len(prompts) == 3 and all(is_held_out(prompt.split()[1], 0.3) for prompt in prompts)
    many = held_out_prompts(spec, 50)
    assert many[:3] == prompts and len(set(many)) < 20 and many[len(set(many))] == many[0]


def test_the_description_changes_with_the_files_and_with_every_choice(offline: Path) -> None:
    folder = write_parquet(offline / "data", 12)
    before = data_of(folder).description
    assert json.loads(json.dumps(before)) == before == data_of(folder).description
    choices = [{"validation_share": 0.31}, {"key_column": "id"}, {"num_train": 4}, {"seed": 2}, {"min_image_side": 1}]
    described = [data_of(folder, **choice).description for choice in choices]
    assert all(values != before for values in described)
    assert len({json.dumps(values) for values in described}) == len(choices)
    write_parquet(folder, 13)
    assert data_of(folder).description != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RecordsSpec("./missing"), r"'./missing': there is no such file; .* has .*Fix: correct the path"),
        (
            RecordsSpec("{}/data", files="*.tar"),
            r"no file matches data.records.files = '\*.tar'; it has train-00000-of-00002",
        ),
        (RecordsSpec("{}/data", split="test"), r"split = 'test' is not possible: allowed is train"),
        (
            RecordsSpec("{}/data", key_column="number"),
            r"no column 'number': it has image, caption, id. Fix: name the right",
        ),
        (RecordsSpec("{}/empty"), r"it is empty; it has nothing"),
        (
            RecordsSpec("{}/data/train-0000*.parquet", validation_split="x"),
            r"validation_split = 'x' .* none for single files",
        ),
        (RecordsSpec("{}/odd.bin"), r"allowed is files of the types .parquet, .tar"),
        (RecordsSpec("{}/bad.parquet"), r"bad.parquet' cannot be read: .*Fix: a file is damaged or not of the format"),
        (RecordsSpec("{}/bad.json", layout="keyed_json"), r"bad.json is not JSON: .*Fix: copy it again"),
        (RecordsSpec("{}/list.json", layout="keyed_json"), r"list.json does not map names to rows"),
        (RecordsSpec("{}/pairs", split="test"), r"split = 'test' .* train alone for this layout"),
        (RecordsSpec("{}/pairs", key_column="number"), r"no column 'number': it has image, caption"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_missing_or_damaged_is_named_with_what_there_is(offline: Path, spec: RecordsSpec, message: str) -> None:
    write_parquet(offline / "data", 4)
    write_image_folder(offline / "pairs", 2, metadata="txt")
    (offline / "empty").mkdir()
    (offline / "odd.bin").touch()
    (offline / "bad.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    (offline / "bad.json").write_text('{"a": {"text": "x"}, ')
    (offline / "list.json").write_text("[1, 2]")
    spec = replace(spec, path=spec.path.replace("{}", str(offline)))
    with pytest.raises(ConfigError, match=message) as error:
        open_records(spec, spec.validation_split or spec.split, ["caption"])
    assert "\n" not in str(error.value)


def test_a_missing_column_is_named_with_those_that_there_are(offline: Path) -> None:
    for folder in (write_parquet(offline / "a", 4), write_image_folder(offline / "b", 4, metadata="txt")):
        with pytest.raises(ConfigError, match="no column 'text': it has image, caption"):
            data_of(folder, caption_column="text")


def test_a_damaged_file_met_while_streaming_is_named(offline: Path) -> None:
    folder = write_tars(offline / "data", 12)
    tar = folder / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:540])
    data = data_of(
        folder, streaming=True, num_train=12, image_column="png", caption_column="txt", validation_share=0.01
    )
    with pytest.raises(ConfigError, match="Fix: a file is damaged"):
        list(data.train_samples())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"validation_share": 0.0},
            "data.records.validation_share = 0.0 is not possible: allowed is a share in \\(0, 1\\)",
        ),
        ({"max_bad_share": 1.0}, "data.records.max_bad_share = 1.0"),
        ({"max_bad": -1}, "data.records.max_bad = -1"),
        ({"shuffle_buffer": 0}, "data.records.shuffle_buffer = 0"),
        ({"path": ""}, "data.records.path = ''"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecordsSpec(**({"path": "x"} | values))


def test_the_section_of_a_recipe_is_strict_and_nested() -> None:
    adapter = TypeAdapter(DataSpec)
    spec = adapter.validate_python({"source": "records", "records": {"path": "a/b", "streaming": True}})
    assert spec.records == RecordsSpec("a/b", streaming=True)
    assert adapter.validate_python(adapter.dump_python(spec, mode="json")) == spec
    for values, message in (
        ({"source": "records", "records": {"path": "a/b", "spilt": "x"}}, "spilt"),
        ({"source": "records"}, "data.records = None is not possible: allowed is at least a path"),
        ({"records": {"path": "a/b"}}, "data.source = 'color-digits' is not possible: allowed is records"),
        ({"source": "pictures"}, "allowed is color-digits, records"),
        ({"num_workers": -1}, "data.num_workers = -1"),
    ):
        with pytest.raises(ValidationError, match=message):
            adapter.validate_python(values)


def test_without_the_library_the_extra_is_named(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'fraqat\[data\]'"):
        open_records(RecordsSpec(str(write_parquet(offline / "data", 4))), "train", ["caption"])


def test_streamed_columns_that_nobody_asked_for_are_not_even_read(offline: Path) -> None:
    folder = write_parquet(offline / "data", 12, num_files=1)
    file = folder / "train-00000-of-00001.parquet"
    metadata = pq.ParquetFile(file).metadata.row_group(0)
    stored = bytearray(file.read_bytes())
    for column in (metadata.column(i) for i in range(metadata.num_columns)):
        if column.path_in_schema.startswith("image"):
            start = column.dictionary_page_offset or column.data_page_offset
            stored[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(stored)
    records = open_records(RecordsSpec(str(folder), streaming=True), "train", ["caption"])
    assert [row["caption"] for row in records.read()] == [caption(i) for i in range(12)]
    with pytest.raises(ConfigError, match="a file is damaged"):
        list(open_records(RecordsSpec(str(folder), streaming=True), "train", ["image"]).read())
