"""Laws of `fraqat report`: from the files of an evaluated run of any model family to its page."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from page_outline import Outline

from fraqat.config import load_recipe
from fraqat.errors import ModelError
from fraqat.report import Samples
from fraqat.workflows import RunFolder
from fraqat.workflows.reporting import report

SUFFIXES = {"images": ".png", "texts": ".txt", "sounds": ".wav"}
COLUMNS = {
    "images": [
        {"key": "psnr_db", "title": "PSNR, dB", "factor": 1.0, "decimals": None},
        {"key": "digit", "title": "digit, %", "factor": 100, "decimals": 1},
    ],
    "texts": [
        {"key": "perplexity", "title": "word perplexity", "factor": 1.0, "decimals": 2},
        {"key": "top1", "title": "top-1 agreement, %", "factor": 100, "decimals": 1},
    ],
    "sounds": [
        {"key": "mcd_db", "title": "mel-cepstral distortion, dB", "factor": 1.0, "decimals": 2},
        {"key": "errors", "title": "word errors, %", "factor": 100, "decimals": 1},
    ],
}
# key -> (original, student): None where the original has nothing to be compared with
QUALITY = {
    "images": {"psnr_db": (None, 34.967781), "digit": (0.984375, 0.96875), "all": (0.9, 0.8)},
    "texts": {"perplexity": (21.349, 24.0712), "top1": (None, 0.91234)},
    "sounds": {"mcd_db": (None, 2.3456), "errors": (0.05, 0.0625)},
}
MEASURED = {
    "images": "PSNR 34.97 dB; digit 96.9 % (original: 98.4 %)",
    "texts": "word perplexity 24.07 (original: 21.35); top-1 agreement 91.2 %",
    "sounds": "mel-cepstral distortion 2.35 dB; word errors 6.2 % (original: 5 %)",
}


def model_row(label: str, kind: str, index: int) -> dict[str, Any]:
    """One model as `evaluation.json` has it."""
    quality = {key: values[index] for key, values in QUALITY[kind].items()}
    row = {"model": label, "weights": "F32", "num_file_bytes": 8_041_000, "validation_loss": None}
    if label != "original":
        sizes = {"num_quantized_weights": 1_907_712, "num_other_bytes": 137_504, "bits_per_weight": 4.1416}
        row |= {"weights": "W4A8, 1 W4A16", "num_file_bytes": 1_125_128, "validation_loss": 0.0034, **sizes}
    steps = {"original": None, "dynamic": 0}.get(label, 200)
    return row | {"num_steps": steps, "train_s": None if steps is None else 1.25 * steps, "quality": quality}


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    """Replaces fields of a JSON file."""
    write_json(path, json.loads(path.read_text()) | changes)


def write_method(folder: Path, losses: tuple[float, ...]) -> None:
    """What a finished run leaves, without its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    events = [{"event": "stage", "step": 0, "bits": 4.0, "num_steps": len(losses)}]
    events += [{"event": "step", "step": step, "loss": loss} for step, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events if losses))
    (folder / "student.safetensors").touch()
    write_json(folder / "result.json", {})
    write_json(
        folder / "layers.json", [{"layer": "a", "family": "FF", "weight SQNR, dB": 20.5, "output SQNR, dB": 18.0}]
    )
    write_json(folder / "environment.json", {"fraqat": "0.1.0"})


def make_run(folder: Path, samples: Samples) -> RunFolder:
    """An evaluated run with one baseline whose models made `samples`."""
    kind = samples.kind.value
    labels = ("original", "dynamic", "fraqat")
    write_method(folder, (0.5, 0.4, 0.3))
    write_method(folder / "baselines" / "dynamic", ())
    (folder / "recipe.yaml").write_text(load_recipe("color-digits").to_yaml(), encoding="utf-8")
    models = [model_row(label, kind, int(label != "original")) for label in labels]
    notes = ["What the columns mean."]
    evaluation = {"prompts": samples.prompts, "columns": COLUMNS[kind], "notes": notes, "models": models}
    write_json(folder / "evaluation.json", evaluation)
    for label, row in zip(labels, samples.rows, strict=False):
        (folder / "samples" / label).mkdir(parents=True)
        for i, file in enumerate(row.files):
            (folder / "samples" / label / f"{i:02d}{SUFFIXES[kind]}").write_bytes(file)
    return RunFolder(folder)


@pytest.fixture
def run(factory: SimpleNamespace, tmp_path: Path) -> RunFolder:
    """A run whose models made texts."""
    return make_run(tmp_path / "run", factory.texts())


@pytest.mark.parametrize("kind", ["images", "texts", "sounds"])
def test_report_shows_what_every_model_of_a_family_made(factory: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    samples = getattr(factory, kind)()
    path = report(make_run(tmp_path / "run", samples))
    outline = Outline(path.read_text(encoding="utf-8"))
    assert {"images", "texts", "sounds"} & set(outline.values("id")) == {kind}
    assert set(samples.prompts) | {"original", "dynamic", "fraqat"} <= set(outline.text)
    num_media = {"images": ("img", 24), "texts": ("dd", 6), "sounds": ("audio", 9)}[kind]
    assert outline.tags.count(num_media[0]) == num_media[1]


@pytest.mark.parametrize("kind", ["images", "texts", "sounds"])
def test_summary_says_size_and_quality_with_the_original_in_brackets(
    factory: SimpleNamespace, tmp_path: Path, kind: str
) -> None:
    page = report(make_run(tmp_path / "run", getattr(factory, kind)())).read_text(encoding="utf-8")
    assert re.findall(r'<p class="lead">([^<]*)</p>', page) == [
        "zoo:color-digits-sana at W4A8, 1 W4A16: 4.14 bits per quantized weight, 1.13 MB, 200 training steps; "
        f"{MEASURED[kind]}."
    ]


def test_summary_leaves_out_what_was_not_measured(run: RunFolder) -> None:
    evaluation = json.loads(run.evaluation_path.read_text())
    own = evaluation["models"][-1] | {"bits_per_weight": None, "num_steps": 0}
    own["quality"] = {"perplexity": None, "top1": 1}
    change_json(run.evaluation_path, models=[*evaluation["models"][:-1], own])
    page = report(run).read_text(encoding="utf-8")
    assert "at W4A8, 1 W4A16: 1.13 MB, without training; top-1 agreement 100 %.</p>" in page


def test_evaluation_without_prompts_has_no_samples(run: RunFolder) -> None:
    change_json(run.evaluation_path, prompts=[])
    assert 'id="texts"' not in report(run).read_text(encoding="utf-8")


def test_files_of_other_programs_are_left_out(run: RunFolder) -> None:
    (run.samples_path / "fraqat" / ".DS_Store").write_bytes(b"\0")
    (run.samples_path / "fraqat" / "Thumbs.db").write_bytes(b"\0")
    assert 'id="texts"' in report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("02.wav", b"RIFF", r"samples holds \.txt and \.wav files: allowed is one of \.png, \.txt, \.wav"),
        ("02.txt", b"one more", r"cannot be shown: samples\['fraqat'\] = '3 texts'.*each of the 2 prompts"),
        ("01.txt", b"\xff", r"cannot be shown: samples\['fraqat'\]\[1\] = b'\\xff'.*UTF-8 text"),
    ],
)
def test_samples_that_do_not_fit_raise(run: RunFolder, name: str, content: bytes, message: str) -> None:
    (run.samples_path / "fraqat" / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{message}.* Fix: run `fraqat evaluate RUN --overwrite`\.$") as caught:
        report(run)
    assert str(caught.value).count("Fix:") == 1
    assert not run.report_path.exists()


def test_missing_samples_raise(run: RunFolder) -> None:
    shutil.rmtree(run.samples_path / "dynamic")
    with pytest.raises(ModelError, match=r"samples\['dynamic'\] = '0 texts'"):
        report(run)
    shutil.rmtree(run.samples_path)
    with pytest.raises(ModelError, match=r"samples holds no files.*fraqat evaluate RUN --overwrite"):
        report(run)


def test_evaluation_without_the_own_method_raises(run: RunFolder) -> None:
    models = json.loads(run.evaluation_path.read_text())["models"]
    change_json(run.evaluation_path, models=models[:-1])
    with pytest.raises(ModelError, match=r"no row of fraqat.*fraqat evaluate RUN --overwrite"):
        report(run)
