"""Nothing in the repository reads a pickle, runs text as code, or unpacks an archive to places that the archive names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("src", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
PICKLES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
CALLS = frozenset(
    {
        *("extractall", "extract", "unpack_archive", "read_pickle", "to_pickle", "eval", "exec", "Unpickler"),
        *("unsafe_load", "full_load", "load_all", "popen"),
    }
)
"""Functions that no module may call, under whatever name of a module."""


def findings(tree: ast.AST) -> Iterator[str]:
    """What a module should not do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in PICKLES - {"pickle"})
            yield from (f"import pickle as {a.asname}" for a in node.names if a.name == "pickle" and a.asname)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield f"from {node.module} import ..."
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            if node.attr not in ("UnpicklingError", "PickleError"):
                yield f"pickle.{node.attr}"
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    last = name.rsplit(".", 1)[-1]
    values = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if name == "torch.load" and values.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name in ("yaml.load", "os.system"):
        yield name
    if any(k.arg == "allow_pickle" and values.get(k.arg) is not False for k in node.keywords):
        yield f"{name} with allow_pickle, which numpy's default refuses"
    if values.get("trust_remote_code") is True or values.get("shell") is True:
        yield f"{name} with trust_remote_code or shell"
    if last in CALLS and not (last in ("eval", "extract") and "." in name):
        yield f"{name}(...)"  # a model's own .eval() is another thing
    if last == "add_safe_globals":
        yield "classes for torch.load"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_runs_what_it_reads(path: Path) -> None:
    assert list(findings(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(f)",
        "import pickle\npickle.Unpickler(f)",
        "import pickle as p",
        "from pickle import loads",
        "import joblib",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "os.system(text)",
        "np.load(path, allow_pickle=True)",
        "reader(path, allow_pickle=True)",
        "yaml.load(text)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(path)",
        "pd.read_pickle(path)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "torch.serialization.add_safe_globals([X])",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert list(findings(ast.parse(code)))


def test_the_search_leaves_the_usual_alone() -> None:
    code = (
        "model.eval()\ntorch.load(p, weights_only=True)\nimport pickle\ntry: pass\nexcept pickle.UnpicklingError: pass"
    )
    assert list(findings(ast.parse(code))) == []
