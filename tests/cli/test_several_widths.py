"""One run, several widths: trained once, evaluated, exported and verified at each."""

import json

import pytest
from cli_helpers import TINY, TINY_ARGUMENTS

from fraqat import workflows
from fraqat.config import load_recipe
from fraqat.errors import ConfigError
from fraqat.workflows import RunFolder, SilentProgress

pytestmark = pytest.mark.xdist_group("several")  # one run, made by one process

SETTINGS = (
    "schedule={kind: several, widths: [8, 6, 4]}",
    "quantization.weight.range_method=learned",
    "train.steps=6",
    "train.autocast=none",
    "train.learning_rate.peak=1e-6",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    recipe = load_recipe("color-digits", (*TINY, *SETTINGS, "baselines={}"))
    return workflows.train(recipe, tmp_path_factory.mktemp("several") / "run", SilentProgress())


def test_the_result_has_the_loss_of_every_width(run: RunFolder) -> None:
    result = run.read_json(run.result_path)
    assert list(result["losses"]) == ["8", "6", "4"]
    assert result["losses"]["8"] < result["losses"]["6"] < result["losses"]["4"] == result["validation_loss"]
    assert run.recipe().label == "several-widths"


def test_every_width_is_exported_and_verified_and_the_files_shrink(fraqat, run: RunFolder) -> None:
    sizes = []
    for bits, folder in (("8", "packed-8-bits"), (None, "packed")):
        done = fraqat("export", run.path, "--json", "--quiet", *(() if bits is None else ("--bits", bits)))
        assert done.code == 0, done.err
        (row,) = json.loads(done.out)["tables"][0]["rows"]
        assert row["folder"] == str(run.path / "export" / folder)
        sizes.append(row["bits per quantized weight"])
        verified = fraqat("verify", row["folder"], "--against", run.path, "--json", "--quiet")
        assert verified.code == 0 and json.loads(verified.out)["holds"], verified.err
    assert sizes[0] - sizes[1] == pytest.approx(4, abs=0.01)


def test_evaluation_at_a_width_has_a_file_of_its_own(fraqat, run: RunFolder) -> None:
    done = fraqat("evaluate", run.path, "--bits", "8", "--json", "--quiet")
    assert done.code == 0, done.err
    _, student = json.loads(done.out)["tables"][0]["rows"]
    assert student["model"] == "several-widths, 8 bits" and student["weights"].startswith("W8A8")
    assert student["distillation loss"] == pytest.approx(run.read_json(run.result_path)["losses"]["8"], rel=1e-5)
    assert (run.path / "evaluation-8-bits.json").exists() and not run.evaluation_path.exists()
    assert (run.path / "samples-8-bits" / "several-widths, 8 bits" / "00.png").exists()


def test_a_width_that_was_not_trained_is_refused(fraqat, run: RunFolder) -> None:
    for verb in ("evaluate", "export"):
        done = fraqat(verb, run.path, "--bits", "5", "--quiet")
        assert done.code == 2 and "bits = 5.0 is not possible: allowed is 8, 6, 4" in done.err


def test_dry_run_shows_the_widths(fraqat) -> None:
    arguments = [text for setting in SETTINGS for text in ("--set", setting)]
    done = fraqat("train", "color-digits", "--dry-run", "--json", *TINY_ARGUMENTS, *arguments)
    assert done.code == 0, done.err
    stages = json.loads(done.out)["stages"]
    assert stages["rows"][-1]["bits"] == "8, 6, 4" and "in turn" in stages["notes"][-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("schedule={kind: several, widths: [8, 6]}",), "a last entry at the target, 4 bits"),
        ((SETTINGS[0], "train.log_code_flips=true"), "train.log_code_flips"),
        ((SETTINGS[0], "quantization.branch={rank: 4}"), "quantization.branch"),
    ],
)
def test_impossible_combinations_are_named(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("color-digits", (*TINY, *settings))
