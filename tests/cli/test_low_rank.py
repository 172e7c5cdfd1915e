"""Low-rank training from the command line: a plain quantized student at the end."""

from pathlib import Path

from cli_helpers import SHORT_ARGUMENTS
from safetensors.torch import load_file

from fraqat.workflows import RunFolder

ARGUMENTS = (*SHORT_ARGUMENTS, "--set", "baselines={}", "--set", "train.low_rank.rank=4")


def test_a_low_rank_run_resumes_and_leaves_a_plain_student(fraqat, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert fraqat("train", "color-digits", "--out", run, *ARGUMENTS).code == 0
    assert fraqat("train", "color-digits", "--out", again, *ARGUMENTS).code == 0
    first, second = (load_file(RunFolder(folder).student_path) for folder in (run, again))
    assert not [name for name in first if "adapter" in name]
    assert all(first[name].equal(second[name]) for name in first)
    assert fraqat("export", run).code == 0


def test_an_impossible_rank_is_named(fraqat, tmp_path: Path) -> None:
    outcome = fraqat("train", "color-digits", "--out", tmp_path / "run", "--set", "train.low_rank.rank=0")
    assert outcome.code == 2
    assert "low_rank.rank" in outcome.err and "1 or more" in outcome.err
