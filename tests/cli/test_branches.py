"""SVDQuant, SVDQAT and DiTAS from the command line: recipes, resumption, and the exports that refuse them."""

from pathlib import Path

import pytest
import torch
from cli_helpers import SHORT_ARGUMENTS
from safetensors.torch import load_file

from fraqat.config import load_recipe
from fraqat.errors import ConfigError
from fraqat.export import TARGETS, check_plain, layer_codes
from fraqat.nn import quantized_layers
from fraqat.planning import packed_size
from fraqat.workflows import RunFolder
from fraqat.workflows.sessions import open_session

pytestmark = pytest.mark.xdist_group("cli")

SVDQUANT = ("quantization.branch.rank=4", "quantization.smoothing.exponents=[0.5]")
DITAS = (
    "quantization.branch.rank=4",
    "quantization.branch.start=error",
    "quantization.branch.iterations=3",
    "quantization.smoothing.momentum=0.9",
    "quantization.smoothing.exponents=[0.5]",
)


def settings(*texts: str) -> tuple[str, ...]:
    return tuple(part for text in texts for part in ("--set", text))


SMALL = ("baselines={}", "train.calibration_samples=8", "quantization.weight.range_method=max_abs")
ARGUMENTS = (*SHORT_ARGUMENTS, *settings(*SMALL))


def test_svdqat_trains_and_its_student_loads_but_is_not_exported(fraqat, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = fraqat("train", "color-digits", "--out", run, *ARGUMENTS, *settings(*SVDQUANT))
    assert done.code == 0, done.err
    assert "smoothing and branches of" in done.err + done.out
    saved = load_file(RunFolder(run).student_path)
    assert any(name.endswith("branch.up") for name in saved) and any(name.endswith("smoothing.scale") for name in saved)
    folder = RunFolder(run)
    student = open_session(folder.recipe()).load_student(folder.recipe(), folder.student_path)
    assert all(layer.has_extras for _, layer in quantized_layers(student))
    refused = fraqat("export", run)
    assert refused.code == 2
    assert "low-rank branch" in refused.err and "without quantization.branch" in refused.err
    assert fraqat("export", run, "--accept-loss").code == 2


def test_ditas_and_svdquant_are_baselines_of_no_steps(fraqat, tmp_path: Path) -> None:
    ptq = settings("train.steps=0", "schedule={kind: constant}")
    done = fraqat("train", "color-digits", "--out", tmp_path / "ditas", *ARGUMENTS, *ptq, *settings(*DITAS))
    assert done.code == 0, done.err
    w4a16 = settings(
        *SVDQUANT, "quantization.activation=null", "quantization.rules=[]", "quantization.family_rules=false"
    )
    done = fraqat("train", "color-digits", "--out", tmp_path / "svdquant", *ARGUMENTS, *ptq, *w4a16)
    assert done.code == 0, done.err


def test_a_dry_run_shows_branch_and_smoothing(fraqat) -> None:
    done = fraqat("train", "color-digits", "--dry-run", *settings(*SVDQUANT))
    assert done.code == 0, done.err
    assert "W4A8, smoothed, rank 4" in done.out


DECAY = ("quantization.branch={rank: 4, rank_schedule: {kind: linear, until: 0.6}}",)


def test_a_branch_that_has_left_is_in_no_export(fraqat, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    done = fraqat("train", "color-digits", "--out", run.path, *ARGUMENTS, *settings(*DECAY, "train.steps=5"))
    assert done.code == 0, done.err
    assert not any("branch" in name for name in load_file(run.student_path))
    session = open_session(run.recipe())
    student = session.load_student(run.recipe(), run.student_path)
    assert not any(layer.has_extras for _, layer in quantized_layers(student))
    for target in TARGETS.values():
        check_plain(student, target)
    assert fraqat("export", run.path).code == 0
    packed, batch = session.load_packed(run.path / "export" / "packed"), session.task.validation_batches(4)[0]
    inputs = session.task.make_inputs(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (session.task.predict(model, inputs)["output"] for model in (student, packed))
    assert torch.equal(ours, theirs)
    assert not any("branch" in name for name in packed.state_dict())


def test_a_branch_that_leaves_is_planned_and_may_have_a_target() -> None:
    sizes = [
        packed_size(open_session(recipe).planned_student(recipe))
        for recipe in (load_recipe("color-digits"), load_recipe("color-digits", (*DECAY, "baselines={}")))
    ]
    assert sizes[0] == sizes[1]
    recipe = load_recipe("color-digits", (*DECAY, "target=onnx", "baselines={}"))
    assert "rank 4 to 0" in str(open_session(recipe).layers(recipe))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps=0", r"rank_schedule\.kind = 'linear' .* constant where nothing is trained .*branch: null"),
        (
            "train.ema_decay=0.9",
            r"train\.ema_decay = 0\.9 .* null with quantization\.branch\.rank_schedule\.kind: linear",
        ),
        ("schedule={kind: several, widths: [8, 4]}", r"quantization\.branch = .*null with schedule\.kind: several"),
        ("train.low_rank.rank=4", r"quantization\.branch = .*null with train\.low_rank"),
        ("quantization.branch.rank_schedule.kind=steps", r"rank_schedule\.kind"),
    ],
)
def test_decays_that_make_no_sense_are_refused(setting: str, message: str) -> None:
    schedule = ("schedule={kind: constant}",) if setting == "train.steps=0" else ()
    with pytest.raises(ConfigError, match=message):
        load_recipe("color-digits", (*DECAY, "baselines={}", *schedule, setting))


def test_every_target_refuses_branches_and_smoothing() -> None:
    for chosen in (SVDQUANT[:1], SVDQUANT[1:]):
        recipe = load_recipe("color-digits", chosen)
        student = open_session(recipe).planned_student(recipe)
        for target in TARGETS.values():
            with pytest.raises(ConfigError, match=rf"target = '?{target.name}'?.*(branch|smoothed input).*Fix:"):
                check_plain(student, target)
        with pytest.raises(ConfigError, match="a quantized product alone"):
            layer_codes(student)


@pytest.mark.parametrize("chosen", SVDQUANT)
def test_a_recipe_for_a_target_refuses_branches_and_smoothing(chosen: str) -> None:
    name = ".".join(chosen.split(".")[:2])
    with pytest.raises(ConfigError, match=rf"{name} = .*null for target packed.*remove {name}"):
        load_recipe("color-digits", (chosen, "target=packed"))
    with pytest.raises(ConfigError, match=rf"{name} = .*train.low_rank.*remove one"):
        load_recipe("color-digits", (chosen, "train.low_rank.rank=4"))


def test_an_impossible_branch_is_named(fraqat, tmp_path: Path) -> None:
    outcome = fraqat("train", "color-digits", "--out", tmp_path / "run", *settings("quantization.branch.rank=-2"))
    assert outcome.code == 2
    assert "branch.rank = -2" in outcome.err
