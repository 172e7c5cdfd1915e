"""Progress on a terminal: the time that is left, and a terminal that is given back as it was."""

from __future__ import annotations

import sys
from io import StringIO

import pytest
from rich.console import Console

from fraqat import cli, workflows
from fraqat.errors import ConfigError
from fraqat.workflows.console import ConsoleProgress

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal() -> Console:
    return Console(file=StringIO(), force_terminal=True, width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_an_error_gives_the_cursor_back_before_it_is_told(monkeypatch: pytest.MonkeyPatch, terminal: Console) -> None:
    def demo(out, progress, settings):
        progress.count("encoding", 1, 4)
        raise ConfigError("what is wrong")

    monkeypatch.setattr(cli, "_errors", terminal)
    monkeypatch.setattr(workflows, "demo", demo)
    monkeypatch.setattr(sys, "argv", ["fraqat", "demo"])
    with pytest.raises(SystemExit):
        cli.main()
    text = shown(terminal)
    assert -1 < text.find(HIDE_CURSOR) < text.rfind(SHOW_CURSOR) < text.find("what is wrong")
    assert HIDE_CURSOR not in text[text.rfind(SHOW_CURSOR) :]


def test_a_count_tells_the_time_left_since_it_began(terminal: Console) -> None:
    now = [0.0]
    with ConsoleProgress(terminal, clock=lambda: now[0]) as progress:
        for what in ("encoding", "sampling"):
            progress.count(what, 10, 40)
            now[0] += 30.0
            progress.count(what, 20, 40)
    assert "1:00 left" in shown(terminal)
    assert "0:30 left" not in shown(terminal)


def test_counts_are_not_written_to_a_log() -> None:
    log = Console(file=StringIO(), width=100)
    with ConsoleProgress(log) as progress:
        for done in range(5):
            progress.count("encoding", done, 4)
    assert shown(log) == ""
