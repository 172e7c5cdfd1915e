"""What `fuzz.py` feeds: each target makes one damaged or odd input from a random generator and hands it to the program.

A target returns `accepted` or `refused`. Our own errors are refusals; any other exception is a finding.
"""

from __future__ import annotations

import contextlib
import html.parser
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fraqat.config import load_recipe, recipe_names
from fraqat.config.reading import load_values
from fraqat.data.encoded import DamagedShardWarning, EncodedShard, EncodedStore
from fraqat.distill import CheckpointStore, read_log
from fraqat.distill.checkpoint import sealed
from fraqat.distill.checkpoint_files import DamagedError
from fraqat.errors import DataError, FraqatError
from fraqat.export import ModelDescription, load_packed_, read_packed, write_packed
from fraqat.export.gguf_blocks import pack_q4_0, unpack_q4_0
from fraqat.files import sha256_of
from fraqat.nn import quantize_
from fraqat.report import LossCurve, ReportData, render_report
from fraqat.table import Table
from fraqat.workflows import RunFolder, status
from fuzz_exports import onnx_writer
from fuzz_gguf import gguf_reader, gguf_writer
from fuzz_inputs import ACCEPTED, HOSTILE, REFUSED, damaged_bytes, damaged_values


@cache
def _recipes() -> list[dict[str, Any]]:
    return [load_recipe(name).to_values() for name in recipe_names()]


def recipe_values(rng: random.Random, folder: Path) -> str:
    """A recipe with odd values; one that is accepted must come back from its own YAML."""
    values = damaged_values(rng, rng.choice(_recipes()))
    if not isinstance(values, dict):
        values = {"name": values}
    try:
        recipe = load_values(values)
    except FraqatError as error:
        str(error).encode("utf-8", "surrogatepass")
        return REFUSED
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(str(path))
    assert json.dumps(again.to_values()) == json.dumps(recipe.to_values())
    json.dumps(recipe.fingerprint())
    return ACCEPTED


def recipe_text(rng: random.Random, folder: Path) -> str:
    """The bytes of a recipe file, damaged, and a damaged `--set`."""
    path = folder / "recipe.yaml"
    path.write_bytes(damaged_bytes(rng, load_recipe(rng.choice(recipe_names())).to_yaml().encode()))
    setting = damaged_bytes(rng, b"train.learning_rate.peak=1e-3").decode("utf-8", "replace")
    try:
        load_recipe(str(path))
        load_recipe("color-digits", (setting,))
    except FraqatError:
        return REFUSED
    return ACCEPTED


@cache
def _checkpoint_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        store = CheckpointStore(Path(name), {"a": 1})
        target = store.save(3, {"x": torch.arange(64.0), "n": 1, "deep": {"list": [1, "a", None, torch.ones(2)]}})
        return {path.name: path.read_bytes() for path in target.iterdir()}


def checkpoint(rng: random.Random, folder: Path) -> str:
    """A checkpoint with damaged files; half of the time with a checksum that fits the damage."""
    target = folder / "step-00000003"
    target.mkdir()
    files = dict(_checkpoint_files())
    name = rng.choice(sorted(files))
    files[name] = damaged_bytes(rng, files[name])
    if rng.random() < 0.2:
        manifest = damaged_values(rng, json.loads(_checkpoint_files()["manifest.json"]))
        files["manifest.json"] = json.dumps(manifest).encode("utf-8", "replace")
    for name, data in files.items():
        (target / name).write_bytes(data)
    if rng.random() < 0.7:
        _fit_checkpoint_checksums(target)
    try:
        found = CheckpointStore(folder, {"a": 1}, warn=lambda text: None).load_latest()
        if found is not None:
            found.whole()
    except (FraqatError, DamagedError):
        return REFUSED
    return ACCEPTED


def _fit_checkpoint_checksums(folder: Path) -> None:
    with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError, OSError):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for entry in manifest["files"]:
            entry["sha256"] = sha256_of(folder / entry["name"])
        manifest["state_sha256"] = sha256_of(folder / "state.json")
        (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


def _fit_checksum(manifest_path: Path, path: Path) -> None:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        manifest_path.write_text(json.dumps(sealed({**manifest, "sha256": sha256_of(path)})))


def _small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 24), nn.SiLU(), nn.LayerNorm(24), nn.Linear(24, 8))


@cache
def _packed_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        student = _small_model()
        quantize_(student)
        folder = Path(name) / "p"
        write_packed(student.eval(), ModelDescription("Toy", {"width": 32}, "zoo:none"), folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def packed(rng: random.Random, folder: Path) -> str:
    """A packed export with damaged files: bytes, and values of the header that the safetensors library accepts."""
    files = dict(_packed_files())
    name = rng.choice(sorted(files))
    if name.endswith(".json") or rng.random() < 0.5:
        files[name] = damaged_bytes(rng, files[name])
    else:
        files[name] = _damaged_header(rng, files[name])
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if rng.random() < 0.8:
        _fit_checksum(folder / "manifest.json", folder / "model.safetensors")
    try:
        model = load_packed_(_small_model(), read_packed(folder))
        model(torch.zeros(2, 32))
    except FraqatError:
        return REFUSED
    return ACCEPTED


def _damaged_header(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    for key, text in metadata.items():
        metadata[key] = json.dumps(damaged_values(rng, json.loads(text)))
    if rng.random() < 0.4:
        header = damaged_values(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def encoded_store(rng: random.Random, folder: Path) -> str:
    """A store of encoded samples with damaged shards or manifest: made anew, or the same rows."""
    store = EncodedStore(folder, {"a": 1})

    def shards(num_done: int) -> Iterator[EncodedShard]:
        for number in range(num_done, 2):
            rows = torch.full((3, 2), float(number))
            yield EncodedShard({"x": rows}, {}, torch.zeros(3, dtype=torch.int64), {})

    store.build(shards)
    path = rng.choice([p for p in sorted(store.folder.iterdir()) if p.name != ".lock"])
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedShardWarning)
        was_open = store.open() is not None
        try:
            rows = store.build(shards)
        except DataError:
            return REFUSED
    assert [float(rows[i]["x"][0]) for i in range(6)] == [0, 0, 0, 1, 1, 1], path.name
    return ACCEPTED if was_open else REFUSED


def run_files(rng: random.Random, folder: Path) -> str:
    """The log and the heartbeat of a run, damaged, for `fraqat status` and the report."""
    (folder / "recipe.yaml").write_text("name: x\n")
    beat = {
        "state": "running",
        "phase": "training",
        "step": 3,
        "total_steps": 9,
        "stage": 0,
        "num_stages": 9,
        "bits": 8.0,
    }
    beat |= {"loss": 0.5, "left_s": 3.0, "time": 1.0, "started": 0.0, "next_within_s": 60.0, "pid": 1, "pid_started": 1}
    beat |= {"host": "x", "rank": 0, "message": None}
    text = json.dumps(damaged_values(rng, beat))
    data = text.encode("utf-8", "replace") if rng.random() < 0.7 else damaged_bytes(rng, json.dumps(beat).encode())
    (folder / "heartbeat.json").write_bytes(data)
    events = [{"event": "step", "step": i, "loss": 0.5} for i in range(5)]
    lines = "".join(json.dumps(event) + "\n" for event in events).encode()
    (folder / "log.jsonl").write_bytes(damaged_bytes(rng, lines))
    (folder / "checkpoints" / rng.choice(("step-", "step-x", "step-00000001", "step-9" * 20))).mkdir(parents=True)
    found = status(RunFolder(folder), lambda: 100.0)
    shown = str(found.to_table())
    assert "\x1b" not in shown
    json.dumps(found.to_table().to_json())
    assert all(isinstance(event, dict) and "event" in event for event in read_log(folder))
    return REFUSED if found.processes[0].state.value == "not started" else ACCEPTED


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def report_page(rng: random.Random, folder: Path) -> str:
    """A page with hostile names and settings has the same tags as one with harmless ones, and nothing that runs."""

    def page(text: Callable[[], str]) -> _Tags:
        label, other = text(), text()
        quality = Table(text(), ("method", text()), ((label, 1.0), (other, text())), (text(),))
        layers = Table(text(), ("layer", "type", "bits"), ((text(), text(), 4.0), (text(), text(), 4.0)))
        versions = Table("Versions", ("name", "version"), ((text(), text()),))
        curve = LossCurve(label, (0, 1, 2), (1.0, 0.5, 0.25), ((3, 0.3),))
        data = ReportData(
            title=text(), summary=text(), quality=quality, samples=None, curves=(curve,), layers=layers, sizes=quality,
            settings=text(), versions=versions,
        )  # fmt: skip
        parser = _Tags()
        parser.feed(render_report(data))
        return parser

    harmless = _plain_page()
    found = page(lambda: rng.choice(HOSTILE[:-3]) if rng.random() < 0.8 else rng.choice(HOSTILE[-2:]))
    assert "script" not in found.tags
    assert not [name for name in found.attributes if name.startswith("on")]
    assert found.tags.count("img") == 0, found.tags
    assert set(found.tags) <= set(harmless) | {"title"}, set(found.tags) - set(harmless)
    return ACCEPTED


@cache
def _plain_page() -> tuple[str, ...]:
    quality = Table("t", ("method", "b"), (("a", 1.0), ("c", "d")), ("n",))
    layers = Table("t", ("layer", "type", "bits"), (("a", "b", 4.0), ("c", "d", 4.0)))
    curve = LossCurve("a", (0, 1, 2), (1.0, 0.5, 0.25), ((3, 0.3),))
    data = ReportData(
        title="t", summary="s", quality=quality, samples=None, curves=(curve,), layers=layers, sizes=quality, settings="x",
        versions=Table("Versions", ("name", "version"), (("a", "b"),)),
    )  # fmt: skip
    parser = _Tags()
    parser.feed(render_report(data))
    return tuple(parser.tags)


def gguf_blocks(rng: random.Random, folder: Path) -> str:
    """Codes and scales of any range and size as Q4_0 blocks: refused, or back bit for bit."""
    torch.manual_seed(rng.randrange(2**31))
    rows, blocks = rng.randrange(1, 4), rng.randrange(1, 4)
    columns = 32 * blocks + rng.choice((0, 0, 0, 1, 31))
    low, high = rng.choice(((-8, 8), (-8, 8), (-9, 8), (-8, 9), (0, 1), (-128, 127)))
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8)
    scale = torch.rand(rows, rng.choice((blocks, blocks, blocks, 1))) * rng.choice(
        (1e-9, 1e-3, 1.0, 1e4, 1e6, float("nan"))
    )
    scale = scale.half().float() if rng.random() < 0.7 else scale
    try:
        stored = pack_q4_0(codes, scale, "layer")
        found, found_scale = unpack_q4_0(stored)
    except FraqatError:
        return REFUSED
    assert torch.equal(found, codes)
    used = (codes.unflatten(1, (-1, 32)) != 0).any(-1) if codes.numel() else torch.zeros_like(scale, dtype=torch.bool)
    assert torch.equal(found_scale[used], scale.expand_as(used)[used])
    return ACCEPTED


TARGETS: Mapping[str, Callable[[random.Random, Path], str]] = {
    "recipe values": recipe_values,
    "recipe text": recipe_text,
    "checkpoint": checkpoint,
    "packed export": packed,
    "encoded store": encoded_store,
    "log, heartbeat": run_files,
    "report page": report_page,
    "onnx writer": onnx_writer,
    "gguf writer": gguf_writer,
    "gguf reader": gguf_reader,
    "gguf blocks": gguf_blocks,
}
"""Name -> the target."""


def run_once(name: str, seed: str | random.Random, folder: Path) -> str:
    """One input of a target, in a folder that is emptied first."""
    rng = random.Random(f"{name}/{seed}") if isinstance(seed, str) else seed
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return TARGETS[name](rng, folder)
