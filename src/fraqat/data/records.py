"""Rows of the Hugging Face hub or of local files, in the order in which they are stored. The only home of `datasets`."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from fraqat.data.hub import check_answers, explain_hub_errors, snapshot
from fraqat.data.record_files import (
    FileRows,
    LocalFiles,
    describe_files,
    find_local_files,
    is_keyed_json,
    is_local_path,
    pair_images_with_texts,
    read_keyed_json,
)
from fraqat.errors import ConfigError, config_error
from fraqat.nn import STRICT_KEYS

KEY = "__key__"
"""Column that identifies a row where the format has names for its rows (webdataset, image folder, keyed JSON)."""

FOLDER = "__folder__"
"""Column with the folder that a row's own relative file names are in."""

_FIELD = "data.records.path"
_PACKED = "__row__"
_MODULES = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}


@dataclass(frozen=True)
class RecordsSpec:
    """Where samples come from, and what is done about those that cannot be used.

    Args:
        path: Hub id, or a local folder, file or glob pattern: parquet, webdataset tar, an image folder with metadata.csv or
            metadata.jsonl, images with a text file beside each, JSON, JSON lines, CSV, plain text.
        name: Configuration of a data set that has several.
        split: Rows to train on.
        validation_split: Held-out rows; None holds out `validation_share` of `split`.
        validation_share: Share of the keys that is held out, by a hash of the key alone.
        revision: Branch, tag or commit of a hub data set.
        files: Glob pattern, relative to `path`, of the files to read; None reads all.
        layout: `keyed_json` for JSON files that map a name to a row (found by itself in local files).
        streaming: Read while training, instead of downloading everything first.
        shuffle_buffer: Rows that are read ahead and shuffled together when streaming.
        key_column: Column that identifies a row; None takes the row's own name, or else its place.
        max_bad_share: Share of the samples that may be broken and skipped; more stop the run.
        max_bad: The same as a number; both limits count.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    path: str
    name: str | None = None
    split: str = "train"
    validation_split: str | None = None
    validation_share: float = 0.025
    revision: str | None = None
    files: str | None = None
    layout: Literal["auto", "keyed_json"] = "auto"
    streaming: bool = False
    shuffle_buffer: int = 1024
    key_column: str | None = None
    max_bad_share: float = 0.01
    max_bad: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise config_error("data.records.path", self.path, allowed="a hub id or a local path", fix="set it")
        if not 0 < self.validation_share < 1:
            raise config_error(
                "data.records.validation_share", self.validation_share, allowed="a share in (0, 1)", fix="use 0.025"
            )
        if not 0 <= self.max_bad_share < 1:
            raise config_error(
                "data.records.max_bad_share", self.max_bad_share, allowed="a share in [0, 1)", fix="use 0.01"
            )
        if self.max_bad is not None and self.max_bad < 0:
            raise config_error(
                "data.records.max_bad", self.max_bad, allowed="0 or more", fix="leave it out for no limit"
            )
        if self.shuffle_buffer < 1:
            raise config_error("data.records.shuffle_buffer", self.shuffle_buffer, allowed="1 or more", fix="use 1024")


@dataclass(frozen=True)
class Records:
    """The rows of one split.

    Args:
        path: Where they are, for messages.
        columns: Names that the rows have.
        rows: Rows that can be had by number; None when they are streamed.
        stream: Rows in order; None when they are not streamed.
        folder: Where relative file names in the rows start; None on the hub.
    """

    path: str
    columns: tuple[str, ...]
    rows: Any = None
    stream: Any = None
    folder: str | None = None

    @property
    def num_rows(self) -> int | None:
        """How many there are, or None while nobody has counted them."""
        return None if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._unpack(self.rows[index])

    def values(self, column: str) -> list[Any]:
        """One column of all rows that can be had by number."""
        if _PACKED in self.rows.column_names and column != KEY:
            return [self[index].get(column) for index in range(len(self.rows))]
        return list(self.rows[column])

    def read(self, position: dict[str, Any] | None = None) -> RecordReader:
        """Streams the rows in order, from a position of an earlier reader or from the start."""
        return RecordReader(self, position)

    def _unpack(self, row: Mapping[str, Any]) -> dict[str, Any]:
        unpacked = {FOLDER: self.folder, **row}
        packed = unpacked.pop(_PACKED, None)
        return unpacked if packed is None else unpacked | json.loads(packed)


class RecordReader(Iterator[dict[str, Any]]):
    """Streamed rows whose position can be saved.

    Args:
        records: What to read.
        position: What another reader's `position` gave; None starts at the first row.
    """

    def __init__(self, records: Records, position: dict[str, Any] | None):
        self._path, self._folder = records.path, records.folder
        self._stream, self._position = copy.deepcopy(records.stream), position
        self._has_started = False
        if position is not None:
            self._stream.load_state_dict(position)
        self._iterator = iter(self._stream)

    def __next__(self) -> dict[str, Any]:
        self._has_started = True
        with explain_hub_errors(_FIELD, self._path, None):
            return {FOLDER: self._folder, **next(self._iterator)}

    def position(self) -> dict[str, Any] | None:
        """Plain values that say which row comes next; None is the first."""
        return self._stream.state_dict() if self._has_started else self._position


def open_records(spec: RecordsSpec, split: str, columns: Sequence[str], *, image_column: str | None = None) -> Records:
    """Opens the rows of one split; images stay as they are stored.

    Args:
        spec: Where they are.
        split: A name that the data has.
        columns: Columns to read, `a.b` for a field of a column; the key is read in any case.
        image_column: One of `columns` that holds images.

    Raises:
        ConfigError: A missing or unreachable data set, file, configuration, split or column; the message lists what there is.
    """
    wanted = [*columns, *([spec.key_column] if spec.key_column else [])]
    is_local = is_local_path(spec.path)
    if is_local or spec.layout == "keyed_json":
        folder = spec.path if is_local else snapshot(_FIELD, spec.path, spec.revision, spec.files)
        files = find_local_files(folder, spec.files)
        if (rows := _read_file_rows(spec, files, wanted)) is not None:
            return _from_file_rows(spec, split, rows, wanted)
        if not files.is_folder:
            return _from_builder(spec, split, _open_files(spec, split, files), wanted, image_column, str(files.root))
    builder = _open_builder(spec)
    return _from_builder(spec, split, builder, wanted, image_column, spec.path if is_local else None)


def check_records(section: str, source: str, records: RecordsSpec | None) -> None:
    """Refuses stored rows that are not named, or that the source would not read.

    Raises:
        ConfigError: `records` is missing or superfluous.
    """
    if source == "records" and records is None:
        raise config_error(
            f"{section}.records",
            None,
            allowed="at least a path",
            fix=f"set {section}.records.path to a hub id or a folder",
        )
    if source != "records" and records is not None:
        raise config_error(
            f"{section}.source",
            source,
            allowed="records, as there is a section records",
            fix=f"set {section}.source: records",
        )


def describe_records(spec: RecordsSpec) -> dict[str, Any]:
    """Plain values that identify the stored rows: the commit on the hub, or names, sizes and times of local files.

    Raises:
        ConfigError: The data set is missing or cannot be reached.
    """
    values: dict[str, Any] = {"path": spec.path, "name": spec.name, "split": spec.split, "files": spec.files}
    values |= {"validation_split": spec.validation_split, "key_column": spec.key_column}
    if spec.validation_split is None:
        values["validation_share"] = spec.validation_share
    if is_local_path(spec.path):
        return values | describe_files(find_local_files(spec.path, spec.files))
    if spec.layout == "keyed_json":
        return values | {"commit": Path(snapshot(_FIELD, spec.path, spec.revision, spec.files)).name}
    return values | {"commit": _open_builder(spec).hash}


def get_field(row: Mapping[str, Any], name: str) -> Any:
    """A column, or `a.b` for a field of a column; None where it is missing."""
    if name in row:
        return row[name]
    head, _, rest = name.partition(".")
    inner = row.get(head)
    return get_field(inner, rest) if rest and isinstance(inner, Mapping) else None


def load_library() -> Any:
    """The module `datasets`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise config_error(
            "data.source",
            "records",
            allowed="color-digits without the library datasets",
            fix="pip install 'fraqat[data]'",
        ) from None
    return datasets


@contextmanager
def _read_by_library(path: str, revision: str | None) -> Generator[None]:
    """Explains errors, and hides the library's bars while it reads local files; how far a download is they alone can say."""
    library = load_library()
    were_shown = is_local_path(path) and not library.are_progress_bars_disabled()
    is_hiding = (
        were_shown and library.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not False
    )  # so that the user wants them
    if is_hiding:
        library.disable_progress_bars()
    try:
        with explain_hub_errors(_FIELD, path, revision):
            yield
    finally:
        if is_hiding:
            library.enable_progress_bars()


def _open_builder(spec: RecordsSpec) -> Any:
    """The library's reader of a folder or a hub data set."""
    library = load_library()
    is_local = is_local_path(spec.path)
    if not is_local and not _is_prepared(library, spec.path):
        check_answers(_FIELD, spec.path)
    source = str(Path(spec.path).expanduser().resolve()) if is_local else spec.path
    with _read_by_library(spec.path, spec.revision):
        return library.load_dataset_builder(source, spec.name, revision=spec.revision, data_files=spec.files)


def _is_prepared(library: Any, path: str) -> bool:
    """Whether the library has prepared a hub data set before, which it then finds without a network."""
    *owner, name = path.split("/")
    folder = "___".join([*owner, library.naming.camelcase_to_snakecase(name)])
    return any(Path(library.config.HF_DATASETS_CACHE).expanduser().glob(f"{folder}/*/*/*"))


def _open_files(spec: RecordsSpec, split: str, files: LocalFiles) -> Any:
    """The library's reader of files that were named themselves: they are the one split that there is."""
    first = files.paths[0]
    if split != spec.split:
        raise config_error(
            "data.records.validation_split",
            split,
            allowed=f"none for single files ({first.name})",
            fix="leave it out to hold out a share, or put the files in a folder as train-*.parquet and validation-*.parquet",
        )
    suffix = next((s for s in reversed(first.suffixes) if s in _MODULES), None)
    if suffix is None:
        allowed = f"files of the types {', '.join(_MODULES)}"
        raise config_error("data.records.path", spec.path, allowed=allowed, fix="convert it")
    library = load_library()
    with _read_by_library(spec.path, None):
        return library.load_dataset_builder(_MODULES[suffix], data_files={split: [str(path) for path in files.paths]})


def _read_file_rows(spec: RecordsSpec, files: LocalFiles, wanted: Sequence[str]) -> FileRows | None:
    """Rows of a layout that `datasets` has no reader for, or None where it has one."""
    json_files = [path for path in files.paths if path.suffix == ".json"]
    if spec.layout == "keyed_json" or (json_files and is_keyed_json(json_files[0]) and json_files[0] == files.paths[0]):
        return read_keyed_json(files, wanted)
    return pair_images_with_texts(files) if files.is_folder else None


def _from_builder(
    spec: RecordsSpec, split: str, builder: Any, wanted: Sequence[str], image_column: str | None, folder: str | None
) -> Records:
    known = [str(name) for name in (builder.info.splits or builder.config.data_files or {})]
    plain = re.split(r"[\[+]", split)[0]
    if known and plain not in known:
        field = "split" if split == spec.split else "validation_split"
        raise config_error(f"data.records.{field}", split, allowed=", ".join(known), fix="choose one of these")
    with _read_by_library(spec.path, spec.revision):
        if not spec.streaming:
            builder.download_and_prepare()
        open_split = builder.as_streaming_dataset if spec.streaming else builder.as_dataset
        data = open_split(split=split)
        columns = tuple(data.features or next(iter(data)))
        _check_columns(spec, columns, wanted)
        kept = _kept_columns(columns, wanted)
        if spec.streaming and hasattr(builder.config, "columns"):  # parquet: the others are not even downloaded
            builder.config.columns = kept
            data = open_split(split=split)
        data = _undecoded(data.select_columns(kept), image_column, wanted)
    return Records(spec.path, columns, None if spec.streaming else data, data if spec.streaming else None, folder)


def _kept_columns(columns: Sequence[str], wanted: Sequence[str]) -> list[str]:
    kept = [KEY] if KEY in columns else []
    kept += [name if name in columns else name.partition(".")[0] for name in wanted]
    return list(dict.fromkeys(kept))


def _undecoded(data: Any, image_column: str | None, wanted: Sequence[str]) -> Any:
    """The same rows with images and sounds as bytes or paths."""
    library = load_library()
    features = data.features or {}
    if isinstance(features.get(image_column), library.Image):
        data = data.cast_column(image_column, library.Image(decode=False))
    for name in wanted:
        if isinstance(features.get(name), library.Audio):
            data = data.cast_column(name, library.Audio(decode=False))
    return data


def _from_file_rows(spec: RecordsSpec, split: str, rows: FileRows, wanted: Sequence[str]) -> Records:
    """Rows from files that `datasets` has no reader for, held as one table of JSON."""
    if split != spec.split or split != "train":
        raise config_error(
            "data.records.split" if split == spec.split else "data.records.validation_split",
            split,
            allowed="train alone for this layout, which knows no splits",
            fix="leave split and validation_split out",
        )
    _check_columns(spec, rows.columns, wanted)
    table = load_library().Dataset.from_dict({KEY: rows.keys, _PACKED: rows.packed})
    return Records(spec.path, (KEY, *rows.columns), table)


def _check_columns(spec: RecordsSpec, columns: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in columns and name.partition(".")[0] not in columns:
            raise ConfigError(
                f"data.records.path = {spec.path!r} has no column {name!r}: it has {', '.join(columns)}. "
                "Fix: name the right column in the data section (image_column, caption_column, text_column, key_column)."
            )
