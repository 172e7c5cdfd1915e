"""A test that hangs does not hold up the suite for ever."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HANGING = """
import ctypes
import signal

import pytest

def test_before():
    pass

def test_hangs_outside_of_python():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    ctypes.CDLL(None).sleep(3600)

@pytest.mark.parametrize("number", range(6))
def test_after(number):
    pass
"""


def test_every_test_has_a_limit_that_needs_no_signal(pytestconfig: pytest.Config) -> None:
    assert 0 < float(pytestconfig.getini("timeout")) <= 1200
    assert pytestconfig.getini("timeout_method") == "thread"


def make_options() -> list[str]:
    """As `make test` runs the suite."""
    found = re.search(r"-m pytest ([^#\n]*)", (ROOT / "Makefile").read_text())
    assert found is not None
    return found[1].split()


@pytest.mark.parametrize("options", [[], make_options()], ids=["alone", "make"])
def test_a_test_that_hangs_ends_the_run_and_is_named(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "test_hanging.py"
    path.write_text(HANGING)
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-o", "timeout=1"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *options, path], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "test_hangs_outside_of_python" in done.stdout + done.stderr
