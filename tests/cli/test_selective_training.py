"""The paper's Table 2 by one command: one family trains, everything is quantized."""

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import TINY_ARGUMENTS
from safetensors.torch import load_file

from fraqat.config import load_recipe
from fraqat.nn import quantized_layers
from fraqat.workflows.sessions import open_session

TINY_RECIPES = [
    *("sana-600m-tiny", "sd3.5-medium-tiny", "pixart-sigma-tiny"),
    *("flux-schnell-tiny", "gemma-2-2b-it-tiny", "speecht5-tiny"),
]
TABLE_2 = {"train-ff": "FF", "train-attn": "Attn", "train-transformer": "TF", "train-all": "All"}


def test_one_command_gives_table_2(fraqat, tmp_path: Path) -> None:
    arguments = ("--seeds", "1", "--rates", "1e-3", "--set", "train.seed=1", "--set", "train.steps=2")
    schedule = ("--set", "schedule.kind=constant")
    outcome = fraqat(
        *("compare", "color-digits", "--quiet", *TINY_ARGUMENTS, *arguments, *schedule),
        *("--methods", ",".join(TABLE_2), "--out", tmp_path / "c", "--json"),
    )
    assert outcome.code == 0, outcome.err
    rows = {row["method"]: row for row in json.loads(outcome.out)["tables"][1]["rows"]}
    assert list(rows) == list(TABLE_2) and rows["train-ff"]["ratio"] == 1
    session = open_session(load_recipe("color-digits"))
    for method, family in TABLE_2.items():
        (path,) = (tmp_path / "c" / method).glob("*/*/student.safetensors")
        student = session.load_student(load_recipe(str(path.parent / "recipe.yaml")), path, with_engine=False)
        before, layers = session.teacher.state_dict(), dict(quantized_layers(student))
        moved = {n for n, t in load_file(path).items() if n in before and not torch.equal(t, before[n].float())}
        assert moved and all(session.families.contains(family, name) for name in moved), method
        outside = {n for n in layers if not session.families.contains(family, n)}
        assert all(layers[name].weight_quantizer.bits == 4 for name in outside)  # frozen, and quantized all the same


@pytest.mark.parametrize("recipe", TINY_RECIPES)
def test_every_family_of_table_2_has_layers_in_every_model(recipe: str) -> None:
    session = open_session(load_recipe(recipe))
    names = [row.name for row in session.layers(session.recipe).quantized]
    counts = {f: sum(session.families.contains(f, name) for name in names) for f in TABLE_2.values()}
    assert min(counts["FF"], counts["Attn"]) > 0
    assert counts["FF"] + counts["Attn"] <= counts["TF"] <= counts["All"] == len(names)
