"""One small finished run with its baselines, shared by all tests of the command line; and a way to run commands."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cli_helpers import TINY

from fraqat import cli, workflows
from fraqat.config import Recipe, load_recipe
from fraqat.workflows import RunFolder, Session, SilentProgress


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def fraqat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process: `fraqat("train", "recipe", ...)` -> exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fraqat", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, " ".join(captured.err.split()))

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained, evaluated, exported run with its page. Do not change it: copy it with `own_run`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    workflows.demo(folder, SilentProgress(), TINY)
    return folder


@pytest.fixture
def own_run(finished: Path, tmp_path: Path) -> RunFolder:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are of a student with one of its blocks: tracing all of them takes seconds for each plan."""
    planned = Session.planned_student

    def shortened(session: Session, recipe: Recipe):
        student = planned(session, recipe)
        student.transformer_blocks = student.transformer_blocks[:1]
        return student

    monkeypatch.setattr(Session, "planned_student", shortened)


@pytest.fixture
def tiny_recipe():
    return load_recipe("color-digits", TINY)
