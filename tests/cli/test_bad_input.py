"""Bad input: the message names the field, the value, what is allowed and the fix, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cli_helpers import SHORT_ARGUMENTS, TINY, TINY_ARGUMENTS
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from fraqat.config import load_recipe
from fraqat.distill import StepRecord
from fraqat.errors import OutputError
from fraqat.files import folder_lock
from fraqat.table import Table
from fraqat.workflows import RunFolder
from fraqat.workflows.console import ConsoleProgress
from fraqat.zoo import zoo_path


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stpes=3", "train.stpes: unknown key: .*did you mean 'steps'"),
        ("quantisation.train=FF", "quantisation: unknown key: .*did you mean 'quantization'"),
        ("quantization.rules.0.patern=x", "unknown key: .*did you mean 'pattern'"),
        ("steps=3", r"error: steps: unknown key: .*did you mean train\.steps\?"),
        ("train.bits=4", r"train.bits: .*did you mean quantization\.weight\.bits or quantization\.activation\.bits\?"),
        (
            "train.learning_rate=1e-4",
            r"allowed is a section of fields: peak, kind.* Fix: set train\.learning_rate\.peak",
        ),
        ("evaluation.prompts=a cat", r"a section of fields: source, column.* Fix: set evaluation\.prompts\.source"),
        ("quantization.weight.bits=1", "bits = 1.0 is not possible: allowed is 1 < bits <= 32"),
        ("quantization.weight.bits=33", "bits = 33.0 is not possible"),
        ("quantization.weight.bits=four", 'quantization.weight.bits = "four" is not possible'),
        ("quantization.weight.granularity=token", "weight.granularity = 'token' .* allowed is tensor, channel, group"),
        ("quantization.activation.static=true", "activation.granularity = 'token' .* 'tensor' when static"),
        (
            "schedule={kind: custom, stages: [[8, 0.5], [5, 0.5]]}",
            r"allowed is a last entry at the target, 4 bits\. Fix: end the list with \[4, \.\.\.\], or change",
        ),
        ("schedule={kind: custom, stages: [[4, 0.5], [8, 0.5]]}", "a last entry at the target, 4 bits"),
        ("schedule={kind: custom, stages: [[4, 0.5], [4, 0.5]]}", "another width in each stage than in the one before"),
        ("schedule={kind: custom, stages: [[8, 0.5], [4, 0.4]]}", r"shares that sum to 1 \(they sum to 0.9\)"),
        ("train.steps=5", "allowed is enough for 9 stages"),
        ("train.steps=-1", "train.steps = -1"),
        ("train.steps=many", 'error: train.steps = "many" is not possible: allowed is a whole number'),
        ("train.betas=0.5", "error: train.betas = 0.5 is not possible: allowed is a list"),
        (
            "train.timestep_importance={bin: 3}",
            r"error: train\.timestep_importance\.bin: unknown key: allowed is bins, .*did you mean 'bins'\?\s*$",
        ),
        (
            "train.timestep_importance={bins: x}",
            r"error: train\.timestep_importance\.bins = \"x\" .* a whole number\. Fix: \S+\s*\S+\.\s*$",
        ),
        ("train.timestep_importance={bins: 1}", r"error: train\.timestep_importance\.bins = 1 .* Fix: use 16\.\s*$"),
        (
            "train.timestep_importance=always",
            r"error: train\.timestep_importance = \"always\" .* allowed is a section of fields or auto\. Fix: correct",
        ),
        (
            "train.guidance_scale=twice",
            r"error: train\.guidance_scale = \"twice\" .* allowed is a number or auto\. Fix: ",
        ),
        ("train.optimizer=adam", "train.optimizer = 'adam' .* adamw, adamw_adapted, adamw_8bit.*did you mean 'adamw'"),
        ("train.learning_rate.peak=-1", "error: train.learning_rate.peak = -1.0"),
        (
            "data.source=imagenet",
            "error: data.source = 'imagenet' .* allowed is color-digits.*set data.source: records",
        ),
        ("data.records={}", "error: data.records.path is missing"),
        ("preset=papr", "error: preset = 'papr' .* did you mean 'paper'"),
        ("target=onnx_qdq", "error: target = 'onnx_qdq' .* did you mean 'onnx-qdq'"),
        ("baselines.dynamic.data={}", "allowed is the sections quantization, schedule, train"),
        ("baselines.vanilla-qat.train.steps=900", "baselines.vanilla-qat.train.steps = 900 .* allowed is 0 or"),
        ("baselines.vanilla-qat.train.batch_size=1", "baselines.vanilla-qat.train.batch_size = 1"),
        ("novalue", "--set = 'novalue' .* dotted.key=value"),
        (
            "quantization.rules=[{pattern: '*', weight_bits: 3}]",
            r"rules.0.weight_bits = 3.0 .* where the schedule ends",
        ),
        ("quantization.rules=[{pattern: '*', skip: true, weight_bits: 8}]", "rule.skip = True .* second rule"),
        ("train.batch_size=100", "train.batch_size = 100 .* at most data.num_train = 64"),
        ("sampler.height=48", r"error: sampler.height, width = \[48, 32\] .* the size of color-digits"),
        ("sampler.guidance_scale=.inf", "sampler.guidance_scale = inf"),
        ("evaluation.seed=-1", "evaluation.seed = -1 .* 0 to 2"),
        ("baselines.dynamic.train.stepz=0", "baselines.dynamic: train.stepz: unknown key"),
        ("baselines.dynamic.train=text", r"baselines\.dynamic: train"),
        ("baselines.dynamic.schedule=[kind]", r"baselines\.dynamic: schedule"),
        ("baselines.original={}", "baselines = 'original' .* not original or fraqat"),
        ("baselines.fraqat={}", "baselines = 'fraqat' .* not original or fraqat"),
        ("baselines.dynamic.train.losses=[{name: l1}]", "baselines.dynamic.train.losses"),
        ("quantization.weight.bits=8", "schedule.kind = 'fractional' .* constant or custom for a target of 8 bits"),
    ],
)
def test_an_impossible_recipe_is_refused_before_anything_is_written(
    fraqat, tmp_path: Path, setting: str, message: str
) -> None:
    import re

    done = fraqat("train", "color-digits", "--out", tmp_path / "run", *TINY_ARGUMENTS, "--set", setting)
    assert done.code == 2, done.err
    assert re.search(message, done.err), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            "[{pattern: 'blocks.9.*', skip: true}]",
            "rule = \"pattern='blocks.9.\\*', skip=True\" .* a rule that matches a layer",
        ),
        ("[{family: Mamba, skip: true}]", "family = 'Mamba' .* allowed is FF, Attn, TF, All"),
        (
            "[{family: FF, group_size: 100}]",
            "layer transformer_blocks.0.ff.conv_inverted: group_size = 100 .* a divisor of .* 192",
        ),
        ("[{pattern: '*', skip: true}]", "at least one quantized layer"),
        ("[{}]", "at least one of pattern, module_type, family"),
    ],
)
def test_an_impossible_rule_is_refused(fraqat, tmp_path: Path, rules: str, message: str) -> None:
    import re

    done = fraqat(
        "train", "color-digits", "--out", tmp_path / "run", *TINY_ARGUMENTS, "--set", f"quantization.rules={rules}"
    )
    assert done.code == 2, done.err
    assert re.search(message, done.err), done.err


def test_ctrl_c_is_answered_in_every_verb(fraqat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fraqat.workflows.inspect", interrupt)
    done = fraqat("inspect", "color-digits")
    assert (done.code, done.out, done.err) == (130, "", "stopped")


def test_what_diffusers_tells_the_hub_is_not_said_to_the_user(fraqat, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(source: str) -> Table:
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(OfflineModeIsEnabled, LocalEntryNotFoundError):
            hf_hub_download(source, "config.json", local_dir_use_symlinks="auto")  # as `from_pretrained` of diffusers
        return Table("Layers", ("layer",), ())

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("fraqat.workflows.inspect", download)
    done = fraqat("inspect", "nobody/nothing")
    assert (done.code, done.err) == (0, "")


def test_unknown_recipe_names_the_known_ones(fraqat, tmp_path: Path) -> None:
    done = fraqat("train", "colour-digits", "--out", tmp_path / "run")
    assert done.code == 2
    assert "recipe = 'colour-digits' is not possible: allowed is a YAML file, or one of color-digits" in done.err
    assert "did you mean 'color-digits'?" in done.err


def test_broken_yaml_is_named(fraqat, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: [")
    done = fraqat("train", recipe, "--out", tmp_path / "run")
    assert done.code == 2
    assert "is not valid YAML" in done.err


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(zoo_path("color-digits-sana"), folder)
    return folder


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _drop_tensors(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("proj_out")}, path)


def _only_pickle(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no such folder, and it is no hub id"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json cannot be read"),
        (lambda f: shutil.rmtree(f / "vae"), "component vae is missing"),
        (lambda f: _truncate(f / "transformer" / "diffusion_pytorch_model.safetensors"), "is truncated or damaged"),
        (
            lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            "has a config.json but no .safetensors",
        ),
        (lambda f: (f / "model_index.json").write_text("[1]"), "it holds no mapping of components"),
        (
            lambda f: _drop_tensors(f / "transformer" / "diffusion_pytorch_model.safetensors"),
            "transformer lacks 2 tensors, such as proj_out",
        ),
        (_only_pickle, "is a pickle, which can run any code when it is read: it was not opened"),
    ],
)
def test_a_damaged_or_unsafe_model_is_refused(fraqat, tmp_path: Path, own_model: Path, damage, message: str) -> None:
    damage(own_model)
    run = tmp_path / "run"
    done = fraqat("train", "color-digits", "--out", run, *TINY_ARGUMENTS, "--set", f"model.source={own_model}")
    assert done.code == 3, done.err
    assert message in done.err
    assert "Fix:" in done.err


def test_an_unsupported_transformer_says_what_to_add(fraqat, tmp_path: Path, own_model: Path) -> None:
    from fraqat.errors import ModelError
    from fraqat.tasks import architecture_of

    with pytest.raises(ModelError, match=r'class int has no entry in the table.*add "int": Architecture\('):
        architecture_of(1)


def test_a_foreign_folder_is_not_touched(fraqat, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    done = fraqat("train", "color-digits", "--out", folder, *TINY_ARGUMENTS)
    assert done.code == 6
    assert "exists and is no run folder: nothing was changed" in done.err
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("setting", [(), ("--set", "train.seed=1")], ids=["as it is", "changed"])
def test_a_recipe_that_somebody_wrote_is_not_replaced(fraqat, tmp_path: Path, setting: tuple[str, ...]) -> None:
    written = tmp_path / "recipe.yaml"
    written.write_text(f"# why 4 bits: see my notes\n{load_recipe('color-digits', TINY).to_yaml()}")
    before = written.read_bytes()
    done = fraqat("train", written, "--out", tmp_path, *setting)
    assert done.code == 6
    assert "its recipe.yaml is your own, and a run would replace it. Nothing was changed" in done.err
    assert written.read_bytes() == before and list(tmp_path.iterdir()) == [written]


def test_a_run_that_was_killed_before_it_wrote_its_environment_goes_on(tmp_path: Path) -> None:
    recipe = load_recipe("color-digits", TINY)
    run = RunFolder.create(tmp_path / "run", recipe)
    (run.path / "environment.json").unlink()
    RunFolder.create(run.path, recipe)
    assert (run.path / "environment.json").is_file()


@pytest.mark.xdist_group("cli")
def test_another_recipe_does_not_touch_a_run(fraqat, own_run) -> None:
    before = {path: path.read_bytes() for path in own_run.path.glob("*.*")}
    done = fraqat("train", "color-digits", "--out", own_run.path, *TINY_ARGUMENTS, "--set", "train.weight_decay=0.1")
    assert done.code == 6
    assert "holds a run of another recipe (train.weight_decay was 0.0 and is now 0.1): nothing was changed" in done.err
    assert {path: path.read_bytes() for path in own_run.path.glob("*.*")} == before


def test_a_run_that_ended_before_training_takes_the_corrected_recipe(fraqat, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wrong = ["--set", "model.source=nowhere"]
    assert fraqat("train", "color-digits", "--out", run, *TINY_ARGUMENTS, *wrong, "--baselines").code == 3
    corrected = RunFolder.create(run, load_recipe("color-digits", TINY))
    assert corrected.recipe().model.source == "zoo:color-digits-sana"


@pytest.mark.parametrize("trained", ["log.jsonl", "checkpoints", "baselines/dynamic/student.safetensors"])
def test_a_run_that_has_trained_keeps_its_recipe(tmp_path: Path, trained: str) -> None:
    run = RunFolder.create(tmp_path / "run", load_recipe("color-digits", TINY))
    (run.path / trained).parent.mkdir(parents=True, exist_ok=True)
    (run.path / trained).write_text("")
    before = (run.path / "recipe.yaml").read_text()
    with pytest.raises(OutputError, match="holds a run of another recipe"):
        RunFolder.create(run.path, load_recipe("color-digits", (*TINY, "train.seed=1")))
    assert (run.path / "recipe.yaml").read_text() == before


def test_a_run_at_which_another_process_is_at_work_keeps_its_recipe(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", load_recipe("color-digits", TINY))
    before = (run.path / "recipe.yaml").read_text()
    with folder_lock(run.path), pytest.raises(OutputError, match="another process is at work"):
        RunFolder.create(run.path, load_recipe("color-digits", (*TINY, "train.seed=1")))
    assert (run.path / "recipe.yaml").read_text() == before


@pytest.mark.xdist_group("cli")
def test_a_report_asks_for_the_evaluation_first(fraqat, own_run) -> None:
    own_run.evaluation_path.unlink()
    done = fraqat("report", own_run.path, "--overwrite")
    assert done.code == 3
    assert f"is not evaluated yet. Fix: run `fraqat evaluate {own_run.path}`" in done.err


@pytest.mark.xdist_group("cli")
def test_a_corrupt_checkpoint_falls_back_and_says_so(fraqat, own_run) -> None:
    whole = (own_run.path / "student.safetensors").read_bytes()
    for name in ("student.safetensors", "result.json"):
        (own_run.path / name).unlink()
    newest = sorted((own_run.path / "checkpoints").iterdir())[-1]
    next(newest.glob("part-*.safetensors")).write_bytes(b"broken")
    done = fraqat("train", "color-digits", "--out", own_run.path, *TINY_ARGUMENTS)
    assert done.code == 0, done.err
    assert (
        f"checkpoint {newest.name} is damaged (the checksum of part-00000-of-00001.safetensors does not match)"
        in done.err
    )
    assert (own_run.path / "student.safetensors").read_bytes() == whole


@pytest.mark.xdist_group("cli")
@pytest.mark.parametrize("verb", ["evaluate", "export", "report"])
def test_verbs_need_a_finished_run(fraqat, own_run, verb: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert fraqat(verb, empty).code == 3
    (own_run.path / "result.json").unlink()
    done = fraqat(verb, own_run.path, "--overwrite")
    assert done.code == 3
    assert "is not trained to the end" in done.err


@pytest.mark.xdist_group("cli")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _truncate(f / "model.safetensors"), "was changed or cut after it was written"),
        (lambda f: (f / "model.safetensors").unlink(), "is no packed export"),
        (lambda f: (f / "manifest.json").write_text('{"format_version": 99, "sha256": ""}'), "has format 99"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is no packed export"),
    ],
)
def test_a_damaged_export_is_refused(fraqat, own_run, tmp_path: Path, damage, message: str) -> None:
    folder = own_run.path / "export" / "packed"
    damage(folder)
    done = fraqat("generate", folder, "--prompt", "a red seven on white", "--out", tmp_path / "x.png")
    assert done.code == 3
    assert message in done.err


@pytest.mark.xdist_group("cli")
def test_no_permission_to_write_is_said(fraqat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Path, *args, **kwargs) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    done = fraqat("train", "color-digits", "--out", tmp_path / "locked" / "run", *TINY_ARGUMENTS)
    assert done.code == 6
    assert "no permission to write" in done.err
    assert "Fix: choose a folder that you own" in done.err


@pytest.mark.xdist_group("cli")
def test_a_full_disk_while_exporting_keeps_the_old_export(fraqat, own_run, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    from fraqat import files

    folder = own_run.path / "export" / "packed"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    done = fraqat("export", own_run.path, "--overwrite")
    assert done.code == 6
    assert "the disk is full" in done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["packed"]


def assert_a_checkpoint_of_the_last_step(run: Path, errors: str) -> None:
    assert "a checkpoint is in" in " ".join(errors.split())
    newest = sorted((run / "checkpoints").iterdir())[-1]
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert json.loads((newest / "manifest.json").read_text())["step"] == 1 + max(
        event["step"] for event in logged if event["event"] == "step"
    )


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_training_leaves_a_checkpoint_and_an_exit_code(
    fraqat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, exit_code: int
) -> None:
    def step(progress: ConsoleProgress, record: StepRecord) -> None:
        if record.step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ConsoleProgress, "step", step)
    done = fraqat("train", "color-digits", "--out", tmp_path / "run", *SHORT_ARGUMENTS)
    assert done.code == exit_code, done.err
    assert_a_checkpoint_of_the_last_step(tmp_path / "run", done.err)


@pytest.mark.xdist_group("cli")
def test_a_process_that_is_told_to_end_leaves_a_checkpoint_and_an_exit_code(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "color-digits", "--out", str(run), *TINY_ARGUMENTS, "--set", "train.steps=2000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fraqat", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(run.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    assert list(run.glob("checkpoints/step-*")), "no step was trained in five minutes"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert_a_checkpoint_of_the_last_step(run, errors)


@pytest.mark.parametrize(
    "settings",
    [
        ("train.steps=null", "train.epochs=2"),
        ("schedule={kind: custom, stages: [[8, 0.5], [4, 0.5]]}",),
        ("train.steps=null", "schedule={kind: custom, unit: steps, stages: [[8, 3], [4, 5]]}"),
        ("train.steps=null", "schedule={kind: custom, unit: epochs, stages: [[8, 1], [4, 2]]}"),
    ],
)
def test_every_unit_of_a_schedule_works_with_the_baselines(settings: tuple[str, ...]) -> None:
    from cli_helpers import TINY

    from fraqat.config import load_recipe
    from fraqat.workflows import resolve_schedule

    recipe = load_recipe("color-digits", (*TINY, *settings))
    main = resolve_schedule(recipe, steps_per_epoch=8)
    vanilla = resolve_schedule(recipe.baseline("vanilla-qat"), 8, main.total_steps)
    assert main.total_steps == vanilla.total_steps
    assert len(vanilla) == 1
    assert resolve_schedule(recipe.baseline("dynamic"), 8, main.total_steps) is None


def test_a_binary_recipe_is_refused(fraqat, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(bytes(range(256)))
    done = fraqat("train", recipe, "--out", tmp_path / "run")
    assert done.code == 2
    assert "cannot be read" in done.err


def test_nothing_to_train_is_refused(fraqat, tmp_path: Path) -> None:
    settings = ["--set", "quantization.train=Attn", "--set", "quantization.rules=[{family: Attn, trainable: false}]"]
    done = fraqat("train", "color-digits", "--out", tmp_path / "run", *TINY_ARGUMENTS, *settings)
    assert done.code == 2
    assert "all frozen" in done.err


@pytest.mark.xdist_group("cli")
def test_a_finished_run_keeps_its_recipe(fraqat, own_run) -> None:
    before = {name: (own_run.path / name).read_bytes() for name in ("recipe.yaml", "environment.json")}
    again = fraqat("train", "color-digits", "--out", own_run.path, *TINY_ARGUMENTS, "--set", "sampler.num_steps=7")
    assert again.code == 0
    assert "finished already" in again.err
    assert {name: (own_run.path / name).read_bytes() for name in before} == before


@pytest.mark.xdist_group("cli")
def test_a_full_disk_at_the_very_end_is_said_and_the_run_can_be_finished(
    fraqat, own_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    from fraqat import files

    for path in (own_run.student_path, own_run.result_path):
        path.unlink()

    def fail(*args, **kwargs) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    done = fraqat("train", "color-digits", "--out", own_run.path, *TINY_ARGUMENTS)
    assert done.code == 6
    assert "the disk is full" in done.err
    monkeypatch.undo()


@pytest.mark.xdist_group("cli")
def test_two_processes_do_not_share_a_run(fraqat, own_run) -> None:
    from fraqat.files import folder_lock

    with folder_lock(own_run.path):
        done = fraqat("train", "color-digits", "--out", own_run.path, *TINY_ARGUMENTS)
    assert done.code == 6
    assert "another process is at work" in done.err


@pytest.mark.xdist_group("cli")
def test_odd_outputs_are_refused(fraqat, own_run, tmp_path: Path) -> None:
    done = fraqat("report", own_run.path, "--out", tmp_path, "--overwrite")
    assert (done.code, "is a folder" in done.err) == (6, True)
    prompt = ("--prompt", "a red seven on white")
    assert fraqat("generate", own_run.path, *prompt, "--out", tmp_path / "x.jpg").code == 2
    assert fraqat("generate", own_run.path, *prompt, "--out", tmp_path / "x.png", "--seed", "-1").code == 2
    assert fraqat("generate", own_run.path, *prompt, "--out", tmp_path / "x.png", "--guidance", "inf").code == 2
    own_run.evaluation_path.write_text("{}")
    done = fraqat("report", own_run.path, "--overwrite")
    assert done.code == 3
    assert "evaluation.json lacks" in done.err


@pytest.mark.xdist_group("cli")
def test_an_untrained_baseline_is_named(fraqat, own_run) -> None:
    shutil.rmtree(own_run.path / "baselines" / "dynamic")
    done = fraqat("evaluate", own_run.path, "--overwrite", "--num-images", "2")
    assert done.code == 0
    assert "baseline dynamic is not trained and left out" in done.err


def test_recipes_of_the_package_are_valid() -> None:
    from fraqat.config import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        assert yaml.safe_load(recipe.to_yaml())["name"]
