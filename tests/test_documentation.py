"""What the documents say exists, and the README's code runs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_function_and_test_of_the_method_map_exists() -> None:
    rows = re.findall(
        r"^\|.*?\| `(fraqat\.[\w.]+)` \| `([\w/.]+)` \|$", (ROOT / "docs" / "method.md").read_text(), re.M
    )
    assert len(rows) >= 12
    for dotted, test in rows:
        module, _, name = dotted.rpartition(".")
        assert hasattr(importlib.import_module(module), name), dotted
        assert (ROOT / test).is_file(), test


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "layers quantized" in capsys.readouterr().out


def test_links_in_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fraqat; "
        "extra = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names); print(sorted(extra))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['fraqat']"


def test_no_module_reads_a_pickle_or_remote_code() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text()
        assert "pickle.load" not in text, path
        assert "trust_remote_code=True" not in text, path
        assert not re.search(r"torch\.load\((?![^)]*weights_only=True)", text), path


def test_the_examples_run() -> None:
    for path in sorted((ROOT / "examples").glob("*.py")):
        arguments = ["--help"] if "argparse" in path.read_text() else []  # tests/export runs these on an export
        done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout
