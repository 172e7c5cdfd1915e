"""What docs/metrics.md shows is what recipes take and Python runs, and it leaves no metric out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from fraqat.evaluation import EvaluationSpec
from fraqat.evaluation.metric_specs import DEFAULT_METRICS, FEATURE_METRICS, SCORE_KINDS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def test_the_recipe_of_the_document_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n# evaluation of a text-to-image recipe\n(.*?)```", DOCUMENT, re.S)
    spec = TypeAdapter(EvaluationSpec).validate_python(yaml.safe_load(text))
    assert [item.label for item in spec.extractors] == ["inception", "clip", "b32"]
    assert [item.kind for item in spec.scores] == ["clip_score", "clip_iqa", "image_reward"]
    assert spec.scores[1].antonym_pair == ("Good photo.", "Bad photo.")
    (off,) = re.findall(r"`bootstrap: ({num_replicates: 0.*?})`", DOCUMENT)
    assert TypeAdapter(EvaluationSpec).validate_python({"bootstrap": yaml.safe_load(off)}).bootstrap.num_replicates == 0


def test_the_python_of_the_document_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    exec(compile(text, "docs/metrics.md", "exec"), {})
    assert "Interval(low=" in capsys.readouterr().out


def test_every_metric_kind_and_default_is_documented() -> None:
    table = DOCUMENT.split("### Where the weights come from")[0]
    keys = re.findall(r"^\|[^|]*\| (`[^|]*`) \|", table, re.M)
    text = " ".join(keys)
    assert all(f"`{kind}`" in text for kind in SCORE_KINDS)
    assert all(any(f"`{metric}_" in key for key in keys) for metric in FEATURE_METRICS)
    for kind in DEFAULT_METRICS:
        assert re.search(rf"^\| `{kind}` \|", DOCUMENT, re.M)
