"""Verbs on recipes of every kind: plans, and data of the user's own with broken samples."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.xdist_group("cli"),
    # datasets leaves the metadata file of an image folder to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def png(red: int) -> bytes:
    """A 40 x 40 picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes([red, 80, 200 - red]) * 40 for _ in range(40))
    header = struct.pack(">IIBBBBB", 40, 40, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An image folder with captions, one picture broken and one caption empty."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file_name,caption"]
    for i in range(40):
        (folder / f"{i:02d}.png").write_bytes(b"broken" if i == 3 else png(5 * i))
        lines.append(f"{i:02d}.png,{'' if i == 7 else f'a red {i}'}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def settings(pictures: Path, **more: object) -> list[str]:
    values = {
        "data.source": "records",
        "data.records.path": str(pictures),
        "data.records.validation_share": 0.2,
        "data.records.max_bad": 2,
        "data.records.max_bad_share": 0.5,
        "data.num_train": 24,
        "data.num_validation": 4,
        "train.steps": 3,
        "schedule.kind": "constant",
        "train.batch_size": 4,
        "train.tensorboard": False,
        "evaluation.num_images": 2,
        "sampler.num_steps": 2,
        **more,
    }
    return [part for name, value in values.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def test_a_folder_of_pictures_trains_and_names_what_it_skips(fraqat, tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "run"
    done = fraqat("train", "color-digits", "--out", out, *settings(pictures))
    assert done.code == 0, done.err
    assert "warning: " in done.err
    assert "image has an unknown format" in done.err
    measured = fraqat("evaluate", out, "--quiet")
    assert measured.code == 0, measured.err
    assert "PSNR" in measured.out
    assert "digit" not in measured.out.splitlines()[1]  # nobody judges pictures of the user's own
    assert (out / "evaluation.json").is_file()


def test_too_many_bad_samples_stop_the_run(fraqat, tmp_path: Path, pictures: Path) -> None:
    done = fraqat(
        "train", "color-digits", "--out", tmp_path / "run", *settings(pictures, **{"data.records.max_bad": 0})
    )
    assert done.code == 2
    assert "Fix:" in done.err


def test_a_plan_needs_no_weights(fraqat) -> None:
    done = fraqat("plan", "sana-600m-tiny", "--device", "H100", "--json")
    assert done.code == 0, done.err
    rows = {row["quantity"]: row["value"] for row in json.loads(done.out)["tables"][0]["rows"]}
    assert rows["parameters"] == 1_942_088
    assert rows["fits"] is True
    assert rows["steps"] == 200


def test_a_plan_for_an_unknown_device_lists_the_known_ones(fraqat) -> None:
    done = fraqat("plan", "sana-600m-tiny", "--device", "H1000")
    assert done.code == 2
    assert "device = 'H1000' is not possible: allowed is" in done.err


def test_a_plan_of_nothing_is_refused(fraqat) -> None:
    done = fraqat("plan", "sana-600m-tiny", "--set", "train.steps=0", "--set", "schedule.kind=constant")
    assert done.code == 2
    assert "train.steps = 0 is not possible" in done.err


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("gemma-2-2b-it", "train.losses=[{name: mse}]", "allowed is kl, hidden_mse for language"),
        ("color-digits", "train.losses=[{name: kl}]", "allowed is mse, l1, huber for text-to-image"),
        ("speecht5", "train.losses=[{name: kl}]", "allowed is mse, l1, huber for text-to-speech"),
        (
            "color-digits",
            "task=music",
            "task = 'music' is not possible: allowed is text-to-image, language, text-to-speech",
        ),
        ("gemma-2-2b-it", "sampler.num_steps=3", "sampler: unknown key"),
    ],
)
def test_settings_of_another_family_are_refused(fraqat, recipe: str, setting: str, message: str) -> None:
    done = fraqat("train", recipe, "--dry-run", "--set", setting)
    assert done.code == 2
    assert message in done.err
