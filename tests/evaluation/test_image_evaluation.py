"""The recipe's metrics from the recipe to the table: what is measured, shown, and still read of older files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fraqat.config import ORIGINAL, load_recipe
from fraqat.errors import ModelError
from fraqat.evaluation import EvaluationSpec, ExtractorSpec, ScoreSpec, cmmd, frechet_distance, kernel_distance
from fraqat.evaluation.bootstrap import BootstrapSpec
from fraqat.tasks.clip import load_clip_images
from fraqat.workflows import SilentProgress
from fraqat.workflows.evaluating import quality_table
from fraqat.workflows.sessions import open_session
from fraqat.workflows.sessions.image_metrics import ImageMetrics

BOOTSTRAP = BootstrapSpec(num_replicates=100, num_frechet=40)


def pictures(seed: int, num: int = 10) -> torch.Tensor:
    return torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_metrics_are_those_of_the_functions_with_intervals_around_them(tiny_clip: Path) -> None:
    spec = EvaluationSpec(
        batch_size=4,
        extractors=(
            ExtractorSpec("clip", str(tiny_clip), metrics=("frechet", "kid", "cmmd", "lpips_like")),
            ExtractorSpec("classifier", name="digits", metrics=("frechet",)),
        ),
        scores=(
            ScoreSpec("clip_score", str(tiny_clip)),
            ScoreSpec("clip_iqa", str(tiny_clip)),
            ScoreSpec("clip_iqa", str(tiny_clip), antonyms=("sharp", "blurry"), name="sharpness"),
        ),
        bootstrap=BOOTSTRAP,
    )
    metrics = ImageMetrics(spec, ("a red one",) * 10, torch.device("cpu"))
    keys = [column.key for column in metrics.columns]
    assert keys == [
        *(f"{metric}_clip" for metric in ("frechet", "kid", "cmmd", "lpips_like")),
        "frechet_digits",
        "clip_score",
        "clip_iqa",
        "clip_iqa_sharpness",
    ]
    titles = [column.title for column in metrics.columns]
    assert titles[:3] == ["CLIP-FID", "1000 KID (clip)", "CMMD"]
    assert len(set(titles)) == len(titles)
    reference = pictures(0)
    images = (reference + 0.3 * pictures(1)).clamp(0, 1)
    original = metrics.measure(reference, reference, is_original=True)
    found = metrics.measure(images, reference, is_original=False)
    assert list(found.quality) == list(original.quality) == keys
    assert [key for key, value in original.quality.items() if value is None] == keys[:5]
    assert list(original.intervals) == keys[5:]
    clip = load_clip_images(str(tiny_clip))
    features, originals = clip.features(images * 2 - 1), clip.features(reference * 2 - 1)
    assert found.quality["frechet_clip"] == pytest.approx(frechet_distance(features, originals), rel=1e-4)
    assert found.quality["kid_clip"] == pytest.approx(kernel_distance(features, originals, paired=True), rel=1e-4)
    assert found.quality["cmmd_clip"] == pytest.approx(cmmd(features, originals, paired=True), rel=1e-4)
    assert list(found.intervals) == keys
    for key, (low, high) in found.intervals.items():
        value = found.quality[key]
        assert value is not None
        assert low < value < high, key
    same = metrics.measure(reference, reference, is_original=False)
    assert [same.quality[key] for key in keys[:5]] == pytest.approx([0] * 5, abs=1e-6)
    assert same.quality["clip_score"] == original.quality["clip_score"] != found.quality["clip_score"]


def test_by_default_nothing_is_added() -> None:
    metrics = ImageMetrics(EvaluationSpec(), ("a",), torch.device("cpu"))
    assert (metrics.columns, metrics.notes) == ((), ())
    assert metrics.measure(pictures(0), pictures(1), is_original=False).quality == {}


def test_a_recipe_names_extractors_and_its_evaluation_measures_them(tiny_clip: Path) -> None:
    extractors = [{"kind": "clip", "source": str(tiny_clip)}]
    settings = [
        "evaluation.num_images=6",
        "sampler.num_steps=1",
        f"evaluation.extractors={json.dumps(extractors)}",
        f"evaluation.scores={json.dumps([{'kind': 'clip_score', 'source': str(tiny_clip)}])}",
        "evaluation.bootstrap={num_replicates: 60, num_frechet: 40}",
    ]
    session = open_session(load_recipe("color-digits", settings))
    evaluator = session.evaluator(None)
    with pytest.raises(ModelError, match="measured before its students"):
        evaluator.measure("student", session.teacher, SilentProgress())
    original = evaluator.measure(ORIGINAL, session.teacher, SilentProgress())
    student = copy.deepcopy(session.teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.97)
    found = evaluator.measure("student", student, SilentProgress())
    keys = {column.key for column in evaluator.columns}
    assert keys == {"frechet", "psnr_db", "digit", "colors", "frechet_clip", "cmmd_clip", "clip_score"}
    assert keys <= set(found.quality)
    assert set(found.intervals) == keys | {"all"}
    assert original.quality["frechet"] is original.quality["psnr_db"] is original.quality["cmmd_clip"] is None
    assert set(original.intervals) == {"digit", "colors", "all", "clip_score"}
    for key, (low, high) in found.intervals.items():
        value = found.quality[key]
        assert value is not None
        assert low <= value <= high
    assert any(note.startswith("CLIP-FID, CMMD: ") for note in evaluator.notes)


def evaluation(with_intervals: bool) -> dict[str, Any]:
    row = {"weights": "W4A8", "num_file_bytes": 10**6, "validation_loss": None, "num_steps": None, "train_s": None}
    columns = [
        {"key": "psnr_db", "title": "PSNR, dB", "factor": 1.0, "decimals": None},
        {"key": "digit", "title": "digit, %", "factor": 100, "decimals": 1},
        {"key": "frechet", "title": "Frechet", "factor": 1.0, "decimals": None},
    ]
    models: list[dict[str, Any]] = [
        {"model": "original", **row, "quality": {"psnr_db": None, "digit": 0.5, "frechet": None}},
        {"model": "student", **row, "quality": {"psnr_db": 30.0, "digit": 0.25, "frechet": 2.0}},
    ]
    if with_intervals:
        models[0]["intervals"] = {"digit": {"low": 0.25, "high": 0.756}}
        models[1]["intervals"] = {"psnr_db": {"low": 28.123456, "high": 31.0}}
    return {"prompts": [], "columns": columns, "notes": ["note"], "models": models}


def test_the_table_shows_intervals_beside_their_values() -> None:
    table = quality_table(evaluation(with_intervals=True), "x")
    assert table.columns[4:9] == ("PSNR, dB", "PSNR, 95 %", "digit, %", "digit, 95 %", "Frechet")
    assert [row[4:9] for row in table.rows] == [
        (None, None, 50.0, "25 to 75.6", None),
        (30.0, "28.12 to 31", 25.0, None, 2.0),
    ]


def test_an_older_evaluation_without_intervals_is_still_read() -> None:
    table = quality_table(evaluation(with_intervals=False), "x")
    assert table.columns[4:7] == ("PSNR, dB", "digit, %", "Frechet")
    assert [row[4:7] for row in table.rows] == [(None, 50.0, None), (30.0, 25.0, 2.0)]
