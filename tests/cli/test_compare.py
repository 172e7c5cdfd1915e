"""`fraqat compare`: the same terms for all methods, each at its own best rate, and nothing done twice."""

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import SHORT_ARGUMENTS

from fraqat.config import METHODS, load_recipe
from fraqat.errors import ConfigError
from fraqat.workflows import RunFolder
from fraqat.workflows.comparing import held_out_half

pytestmark = pytest.mark.xdist_group("compare")  # the comparison is made once, by one process

ARGUMENTS = ("color-digits", "--quiet", *SHORT_ARGUMENTS)
CHOICES = ("--methods", "dynamic,vanilla-qat,simple,torchao-qat", "--seeds", "2", "--rates", "1e-4,1e-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared") / "comparison"


@pytest.fixture(scope="module")
def printed() -> list[dict]:
    """What the one comparison has printed, once it was made."""
    return []


@pytest.fixture
def compared(fraqat, folder: Path, printed: list[dict]) -> dict:
    if not printed:
        outcome = fraqat("compare", *ARGUMENTS, "--out", folder, *CHOICES, "--json")
        assert outcome.code == 0, outcome.err
        printed.append(json.loads(outcome.out))
    return printed[0] | {"file": json.loads((folder / "comparison.json").read_text())}


def test_every_method_has_its_own_best_rate_and_every_seed(compared: dict) -> None:
    methods = {result["method"]: result for result in compared["file"]["methods"]}
    assert list(methods) == ["dynamic", "vanilla-qat", "simple", "torchao-qat"]
    assert methods["dynamic"]["rate"] is None and len(methods["dynamic"]["records"]) == 1
    for name in ("vanilla-qat", "simple", "torchao-qat"):
        tried = {float(rate): loss for rate, loss in methods[name]["tried"].items()}
        assert set(tried) == {1e-4, 1e-2}
        assert methods[name]["rate"] == min(tried, key=lambda rate: tried[rate])
        assert [record["seed"] for record in methods[name]["records"]] == [1, 2]
        assert {record["num_steps"] for record in methods[name]["records"]} == {3}


def test_the_ratio_is_that_of_the_seeds(compared: dict) -> None:
    losses = {r["method"]: [x["test_loss"] for x in r["records"]] for r in compared["file"]["methods"]}
    rows = {row["method"]: row for row in compared["tables"][1]["rows"]}
    (a, b), (c, d) = losses["simple"], losses["vanilla-qat"]
    assert rows["simple"]["ratio"] == pytest.approx((a / c * b / d) ** 0.5)
    assert rows["simple"]["ratio low"] < rows["simple"]["ratio"] < rows["simple"]["ratio high"]
    assert rows["vanilla-qat"]["ratio"] == 1


def test_what_is_finished_is_not_done_again(compared: dict, fraqat, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/record.json")}
    outcome = fraqat("compare", *ARGUMENTS, "--out", folder, *CHOICES, "--json")
    assert outcome.code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/record.json")} == before
    assert json.loads(outcome.out)["tables"] == compared["tables"]


def test_methods_share_model_data_and_steps(compared: dict, folder: Path) -> None:
    runs = [RunFolder(path.parent).recipe() for path in folder.glob("*/*/seed-1/record.json")]
    assert len(runs) == 3
    assert len({str(run.data) for run in runs}) == len({run.train.steps for run in runs}) == 1
    assert len({str(run.schedule) for run in runs}) == 2


class Rows:
    """Held-out rows in batches, the last one with a single row."""

    def __init__(self, num_rows: int):
        self.rows = torch.arange(num_rows)

    def validation_batches(self, batch_size: int) -> list[dict]:
        return [{"x": x, "text": [str(int(i)) for i in x]} for x in self.rows.split(batch_size)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9, 20])
def test_halves_are_disjoint_and_whole(batch_size: int) -> None:
    first, second = (held_out_half(Rows(9), batch_size, half) for half in (0, 1))
    assert sorted(int(i) for batch in (*first, *second) for i in batch["x"]) == list(range(9))
    assert {int(i) % 2 for batch in first for i in batch["x"]} == {0}
    assert all(len(batch["x"]) == len(batch["text"]) > 0 for batch in (*first, *second))


def test_a_seed_that_chose_is_not_trained_again(fraqat, tmp_path: Path) -> None:
    arguments = (*ARGUMENTS, "--set", "train.seed=1", "--out", tmp_path / "c")
    assert fraqat("compare", *arguments, "--methods", "vanilla-qat", "--seeds", "1", "--rates", "1e-4").code == 0
    logs = list((tmp_path / "c").glob("*/*/*/log.jsonl"))
    assert len(logs) == 1
    assert sum('"event": "step"' in line for line in logs[0].read_text().splitlines()) == 3
    assert (logs[0].parent / "student.safetensors").exists()


def test_a_baseline_of_the_recipe_is_a_method(fraqat, tmp_path: Path) -> None:
    arguments = (*ARGUMENTS, "--set", "baselines={mine: {train: {betas: [0.5, 0.9], learning_rate: {kind: cosine}}}}")
    options = ("--methods", "mine", "--seeds", "1", "--rates", "1e-4", "--out", tmp_path / "c")
    outcome = fraqat("compare", *arguments, *options)
    assert outcome.code == 0, outcome.err
    (run,) = [RunFolder(path.parent).recipe() for path in (tmp_path / "c").glob("mine/*/seed-1/record.json")]
    assert run.train.betas == (0.5, 0.9) and run.train.learning_rate.peak == 1e-4 and run.train.steps == 3
    (method,) = json.loads((tmp_path / "c" / "comparison.json").read_text())["methods"]
    assert method["method"] == "mine"

    changed = (*ARGUMENTS, "--set", "baselines={mine: {train: {betas: [0.6, 0.9]}}}")
    refused = fraqat("compare", *changed, *options)
    assert refused.code == 6 and "betas" in refused.err  # nothing is mixed


def test_a_rate_that_diverges_is_not_chosen(fraqat, tmp_path: Path) -> None:
    outcome = fraqat(
        *("compare", *ARGUMENTS, "--out", tmp_path / "c", "--methods", "vanilla-qat", "--seeds", "1", "--json"),
        *("--rates", "1e-4,1e30"),
    )
    assert outcome.code == 0, outcome.err
    (method,) = json.loads((tmp_path / "c" / "comparison.json").read_text())["methods"]
    assert method["rate"] == 1e-4 and method["tried"] == {"0.0001": method["tried"]["0.0001"], "1e+30": None}


def test_the_documentation_names_every_method() -> None:
    table = Path("docs/comparing.md").read_text(encoding="utf-8").split("| method | what it is |")[1]
    named = {
        name for line in table.splitlines() if line.startswith("| `") for name in line.split("|")[1].split("`")[1::2]
    }
    assert named == set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "vanilla-qat,best"), "methods 'best' allowed dynamic fix choose"),
        (("--methods", "vanilla-qat,vanilla-qat"), "--methods different names"),
        (("--methods", "vanila-qat"), "--methods did you mean 'vanilla-qat'"),
        (
            ("--methods", "mine", "--set", "baselines={mine: {train: {losses: [{name: l1}]}}}"),
            "baselines.mine.train.losses remove",
        ),
        (
            ("--methods", "comparison.json", "--set", "baselines={comparison.json: {train: {betas: [0.5, 0.9]}}}"),
            "--methods comparison.json rename the baseline",
        ),
        (("--rates", "1e-4,fast"), "--rates numbers with commas"),
        (("--rates", "-1"), "--rates different positive numbers"),
        (("--set", "train.steps=0"), "train.steps 1 or more"),
        (("--set", "preset=fraqat"), "preset null"),
    ],
)
def test_bad_input_is_named(fraqat, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    outcome = fraqat("compare", *ARGUMENTS, "--out", tmp_path / "new", *arguments)
    assert outcome.code == 2
    assert all(word.lower() in outcome.err.lower() for word in words.split())
    assert not (tmp_path / "new").exists()


def test_another_folder_is_left_alone(fraqat, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    outcome = fraqat("compare", *ARGUMENTS, "--out", tmp_path, *CHOICES)
    assert outcome.code == 6 and "nothing was changed" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_comparison_on_another_recipe_is_left_alone(compared: dict, fraqat, folder: Path) -> None:
    outcome = fraqat("compare", *ARGUMENTS, "--set", "train.steps=10", "--out", folder, *CHOICES)
    assert outcome.code == 6 and "train.steps" in outcome.err


def test_a_comparison_that_ended_before_training_takes_the_corrected_recipe(fraqat, tmp_path: Path) -> None:
    choices = ("--out", tmp_path / "c", "--methods", "dynamic", "--seeds", "1")
    assert fraqat("compare", *ARGUMENTS, *choices, "--set", "model.source=nowhere").code == 3
    outcome = fraqat("compare", *ARGUMENTS, *choices)
    assert outcome.code == 0, outcome.err
    assert load_recipe(str(tmp_path / "c" / "compared.yaml")).model.source == "zoo:color-digits-sana"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recipe", ["color-digits", "gemma-2-2b-it-tiny", "speecht5-tiny"])
def test_every_method_fits_every_family(name: str, recipe: str) -> None:
    if name == "timestep-importance" and recipe != "color-digits":
        with pytest.raises(
            ConfigError, match=r"timestep-importance: .*null or auto for task .*, which has no timesteps"
        ):
            load_recipe(recipe).with_method(name, METHODS[name].changes)
        return
    changed = load_recipe(recipe).with_method(name, METHODS[name].changes)
    assert changed.label == name
    assert (changed.train.steps == 0) is not METHODS[name].is_trained
