"""Writes small data sets in the layouts that users have."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 8
BROKEN_PNG = b"\x89PNG\r\n\x1a\nnot really"


def png(number: int, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """A plain picture whose red value is `number`."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def caption(number: int) -> str:
    return f"picture {number}"


def write_parquet(
    folder: Path,
    num_rows: int,
    *,
    num_files: int = 2,
    split: str = "train",
    images: dict[int, bytes | None] | None = None,
    captions: dict[int, object] | None = None,
) -> Path:
    """Rows of image, caption and id over several files; single images and captions can be replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    per_file = -(-num_rows // num_files)
    for number in range(num_files):
        rows = range(number * per_file, min((number + 1) * per_file, num_rows))
        stored = [(images or {}).get(i, png(i % 256)) for i in rows]
        texts = [(captions or {}).get(i, caption(i)) for i in rows]
        table = pa.table(
            {
                "image": [None if data is None else {"bytes": data, "path": None} for data in stored],
                "caption": texts,
                "id": [f"id{i}" for i in rows],
            }
        )
        pq.write_table(table, folder / f"{split}-{number:05d}-of-{num_files:05d}.parquet")
    return folder


def write_image_folder(folder: Path, num_rows: int, *, metadata: str) -> Path:
    """Pictures with metadata.csv, metadata.jsonl or a text file beside each (`txt`)."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_rows):
        (folder / f"{i:04d}.png").write_bytes(png(i))
    rows = [{"file_name": f"{i:04d}.png", "caption": caption(i)} for i in range(num_rows)]
    if metadata == "csv":
        lines = ["file_name,caption", *(f"{row['file_name']},{row['caption']}" for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    elif metadata == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for i in range(num_rows):
            (folder / f"{i:04d}.txt").write_text(caption(i) + "\n")
    return folder


def write_tars(folder: Path, num_rows: int, *, num_files: int = 2, without_text: Sequence[int] = ()) -> Path:
    """webdataset: NNNN.png, NNNN.txt and NNNN.json."""
    folder.mkdir(parents=True, exist_ok=True)
    per_file = -(-num_rows // num_files)
    for number in range(num_files):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for i in range(number * per_file, min((number + 1) * per_file, num_rows)):
                members = {
                    "png": png(i),
                    "txt": caption(i).encode(),
                    "json": json.dumps({"long": f"a {caption(i)}"}).encode(),
                }
                if i in without_text:
                    del members["txt"]
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


def write_keyed_json(folder: Path, num_rows: int, *, num_files: int = 2, zipped: bool = False) -> Path:
    """The layout of YE-POP: per chunk a folder with a JSON file that maps names to rows, and pictures, in a zip file or not."""
    per_file = -(-num_rows // num_files)
    for number in range(num_files):
        chunk = folder / "images" / f"chunk_{number}"
        chunk.mkdir(parents=True)
        rows = range(number * per_file, min((number + 1) * per_file, num_rows))
        values = {f"{i:09d}": {"filename": f"{i:09d}.png", "cogvlm_caption": caption(i), "alt_txt": "x"} for i in rows}
        (chunk / f"chunk_{number}.0.json").write_text(json.dumps(values))
        if zipped:
            with zipfile.ZipFile(chunk / f"chunk_{number}.zip", "w") as archive:
                for i in rows:
                    info = zipfile.ZipInfo(f"chunk_{number}/{i:09d}.png")
                    info.compress_type = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
                    info.extra = b"\x99\x99\x02\x00ab"  # as other programs write: times, owners
                    archive.writestr(info, png(i))
        else:
            for i in rows:
                (chunk / f"{i:09d}.png").write_bytes(png(i))
    return folder
