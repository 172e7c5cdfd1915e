"""Training on what guidance makes of two outputs: the sampler's own combination, pairs of pictures, refusals."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_sampler
from torch import nn

from fraqat.config import load_recipe
from fraqat.data.captioned import DataSpec
from fraqat.distill import (
    Batch,
    Distiller,
    LossSpec,
    Prediction,
    TeacherSpec,
    TimestepImportanceSpec,
    TrainSpec,
    guidance_phrase,
    read_log,
)
from fraqat.distill.workers import SharedStream, SkippingStream
from fraqat.errors import ConfigError, DeviceMemoryError
from fraqat.nn import quantize_
from fraqat.schedules import ScheduleKind, ScheduleSpec
from fraqat.tasks import ModelSpec, SamplerSpec
from fraqat.tasks.conditioning import LATENTS, TIMESTEP, record_calls
from fraqat.tasks.diffusion import DiffusionTask, predict_output
from fraqat.tasks.encoding import Encoder
from fraqat.tasks.families import ARCHITECTURES, Guidance, architecture_of
from fraqat.tasks.guided import GUIDED_BY, guided_output, scale_in_training, with_and_without_prompt
from fraqat.tasks.image_samples import DiffusionSource
from fraqat.tasks.pipelines import load_pipeline, load_transformer
from fraqat.zoo import zoo_path

PROMPTS = ["a red seven on white", "a blue two on yellow"]
SCALE = 3.0
SOURCE = ModelSpec(str(zoo_path("color-digits-sana")))
SAMPLER = SamplerSpec(num_steps=2, guidance_scale=SCALE, height=32, width=32, max_sequence_length=16)


def norm_of(scale: float) -> float:
    return (scale**2 + (scale - 1) ** 2) ** 0.5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def make_task(folder: Path, **data: Any) -> DiffusionTask:
    values: dict[str, Any] = {"num_train": 16, "num_validation": 8, **data}
    spec = DataSpec(**values)
    return DiffusionTask(DiffusionSource(SOURCE, lambda: load_pipeline(SOURCE), spec, SAMPLER, folder))


@pytest.fixture(scope="module")
def plain(cache: Path) -> DiffusionTask:
    return make_task(cache)


@pytest.fixture(scope="module")
def task(plain: DiffusionTask) -> DiffusionTask:
    return plain.guided("auto", 8)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return load_transformer(SOURCE).requires_grad_(False)


def test_what_is_learned_is_what_the_sampler_of_a_pipeline_goes_by(
    architecture_name: str, tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture_of(tiny_pipeline.transformer).guidance is not Guidance.CLASSIFIER_FREE:
        pytest.skip("sampled by one prediction: see the refusals")
    own = {"cfg_normalization": False} if architecture_name == "lumina2" else {}
    sampler = tiny_sampler(architecture_name, call_arguments=own)
    encoder = Encoder(tiny_pipeline, sampler)
    used: list[torch.Tensor] = []
    step = tiny_pipeline.scheduler.step

    def recording(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        used.append(model_output)
        return step(model_output, *args, **kwargs)

    monkeypatch.setattr(tiny_pipeline.scheduler, "step", recording)
    first = record_calls(tiny_pipeline, PROMPTS, sampler, guidance_scale=SCALE)[0].tensors
    arguments = {LATENTS: first[LATENTS][:2], TIMESTEP: first[TIMESTEP][:2], **encoder.prompts.encode(PROMPTS)}
    constants = encoder.prompts.constants
    both = with_and_without_prompt({**arguments, **constants}, encoder.prompts.empty, frozenset(constants))
    with torch.no_grad():
        output = predict_output(tiny_pipeline.transformer, both)["output"]
    learned = guided_output(output, torch.full((2,), SCALE)) * norm_of(SCALE)
    sign = -1 if architecture_name == "lumina2" else 1  # its pipeline turns the output round for its scheduler
    assert used[0].shape == learned.shape
    assert torch.allclose(sign * used[0].float(), learned, rtol=1e-3, atol=1e-3 * float(learned.std()))


def test_a_batch_of_rows_is_half_as_many_pictures_and_the_loss_is_of_the_guided_error(
    task: DiffusionTask, cache: Path, teacher: nn.Module
) -> None:
    student = load_transformer(SOURCE)
    quantize_(student)
    batch = next(iter(task.train_stream(8, seed=0)))
    inputs = task.make_inputs(batch, torch.Generator().manual_seed(3))
    assert inputs[LATENTS].shape[0] == 4
    assert inputs[GUIDED_BY].tolist() == [SCALE] * 4
    rows: list[int] = []
    handle = student.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs[LATENTS])), with_kwargs=True
    )
    found, wanted = task.predict(student, inputs), task.predict(teacher, inputs)
    handle.remove()
    assert rows == [8]
    loss = task.loss(found, wanted, inputs, [LossSpec()])

    errors: list[torch.Tensor] = []
    empty = make_task(cache, caption_dropout=0.999999)  # every caption is dropped
    prompted = {name: value for name, value in inputs.items() if name != GUIDED_BY}
    dropped = empty.make_inputs({k: v for k, v in batch.items() if k != GUIDED_BY}, torch.Generator().manual_seed(3))
    for single in (prompted, dropped):
        assert torch.equal(single[LATENTS], inputs[LATENTS]) and torch.equal(single[TIMESTEP], inputs[TIMESTEP])
        with torch.no_grad():
            errors.append(task.predict(student, single)["output"] - task.predict(teacher, single)["output"])
    assert not torch.allclose(errors[0], errors[1])
    guided = SCALE * errors[0] - (SCALE - 1) * errors[1]
    assert float(loss.detach()) == pytest.approx(float(guided.square().mean()) / norm_of(SCALE) ** 2, rel=1e-3)
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


def test_independent_errors_of_one_size_keep_their_size() -> None:
    errors = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    for scale in (1.5, 4.0, 12.0):
        assert float(guided_output(errors, torch.full((1000,), scale)).std()) == pytest.approx(1, abs=0.02)


def test_held_out_data_and_calibration_are_what_they_are_without(task: DiffusionTask, plain: DiffusionTask) -> None:
    for mine, theirs in (
        (task.validation_batches(8)[0], plain.validation_batches(8)[0]),
        (task.calibration_batches(4, 4)[0], plain.calibration_batches(4, 4)[0]),
    ):
        assert GUIDED_BY not in mine
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_pieces_of_a_batch_keep_their_pairs(task: DiffusionTask, teacher: nn.Module) -> None:
    inputs = task.make_inputs(next(iter(task.train_stream(8, seed=0))), torch.Generator().manual_seed(3))
    whole = task.predict(teacher, inputs)["output"]
    pieces = task.split_inputs(inputs, 3)
    assert sum(share for _, share in pieces) == pytest.approx(1)
    parts = torch.cat([task.predict(teacher, part)["output"] for part, _ in pieces])
    assert torch.allclose(parts, whole, atol=1e-4)


def test_a_stream_goes_on_where_it_was(task: DiffusionTask) -> None:
    stream = task.train_stream(8, seed=1)
    next(iter(stream))
    state = stream.state_dict()
    expected = next(iter(stream))
    again = task.train_stream(8, seed=1)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again))["latents"], expected["latents"])


def test_parts_of_other_processes_are_not_read(task: DiffusionTask) -> None:
    whole = [batch["latents"] for batch in islice(task.train_stream(4, seed=1), 4)]
    stream = task.train_stream(4, seed=1)
    assert isinstance(stream, SkippingStream)
    shared = SharedStream(stream, 2, range(1, 2))
    for expected in (whole[1], whole[3]):
        ((number, batch),) = shared.next_parts()
        assert number == 1 and torch.equal(batch["latents"], expected) and batch[GUIDED_BY].tolist() == [SCALE] * 2


def test_pictures_that_are_encoded_while_training_are_marked_too(cache: Path) -> None:
    streamed = make_task(cache, cache=False).guided(SCALE, 4)
    inputs = streamed.make_inputs(next(iter(streamed.train_stream(4, seed=0))), torch.Generator().manual_seed(0))
    assert inputs[GUIDED_BY].tolist() == [SCALE] * 2
    assert inputs[LATENTS].shape[0] == 2
    assert not isinstance(streamed.train_stream(4, seed=0), SkippingStream)  # it reads in order


def train(task: DiffusionTask, folder: Path, *, num_steps: int = 4, on_step: Any = None, **settings: Any) -> nn.Module:
    student = load_transformer(SOURCE)
    quantize_(student)
    values: dict[str, Any] = {
        "guidance_scale": "auto",
        "batch_size": 8,
        "validate_every": 100,
        "checkpoint_every": 2,
        "seed": 3,
        "autocast": "none",
        "tensorboard": False,
    }
    spec = TrainSpec(**{**values, **settings})
    schedule = ScheduleSpec(ScheduleKind.CONSTANT).resolve(4, num_steps)
    on_step = on_step or (lambda record: None)
    Distiller(task, load_transformer(SOURCE), student, schedule, spec, folder, on_step=on_step).run()
    return student


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, other) for value, other in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def trained(plain: DiffusionTask, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return train(plain, tmp_path_factory.mktemp("trained"))


def test_what_is_trained_is_another_student(plain: DiffusionTask, trained: nn.Module, tmp_path: Path) -> None:
    assert not same_weights(train(plain, tmp_path / "single", guidance_scale=None), trained)
    assert same_weights(train(plain, tmp_path / "scale", guidance_scale=SCALE), trained)


def test_an_interrupted_run_goes_on_with_the_same_bits(
    plain: DiffusionTask, trained: nn.Module, tmp_path: Path
) -> None:
    def crash(record: Any) -> None:
        if record.step == 3:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(plain, tmp_path, on_step=crash)
    assert same_weights(train(plain, tmp_path), trained)


def test_recorded_outputs_of_a_teacher_are_guided_ones(
    plain: DiffusionTask, trained: nn.Module, tmp_path: Path
) -> None:
    assert same_weights(train(plain, tmp_path, teacher=TeacherSpec(outputs="recorded")), trained)


def test_noise_levels_can_be_drawn_by_the_guided_error(
    plain: DiffusionTask, trained: nn.Module, tmp_path: Path
) -> None:
    found = train(plain, tmp_path, timestep_importance=TimestepImportanceSpec(2))
    assert not same_weights(found, trained)


def test_parts_of_a_batch_learn_what_the_whole_does(plain: DiffusionTask, tmp_path: Path) -> None:
    student = train(plain, tmp_path, num_steps=2, accumulation=2)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters())


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({"batch_size": 34}, "32 with 16 samples to train on and train.guidance_scale, which makes 2 rows of a sample"),
        (
            {"batch_size": 68, "accumulation": 2, "teacher": TeacherSpec(outputs="recorded")},
            "64 with 16 samples to train on and train.accumulation = 2 and train.guidance_scale, which makes 2 rows of a "
            "sample",
        ),
        (
            {"batch_size": 34, "accumulation": 2, "guidance_scale": None},
            "32 with 16 samples to train on and train.accumulation = 2",
        ),
        ({"batch_size": 17, "guidance_scale": None}, "data.num_train = 16"),
    ],
)
def test_a_batch_that_is_larger_than_the_data_is_named_as_the_recipe_has_it(
    plain: DiffusionTask, tmp_path: Path, settings: dict[str, Any], reasons: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(plain, tmp_path, **settings)
    given = f"train.batch_size = {settings['batch_size']} is not possible"
    assert str(caught.value) == f"{given}: allowed is at most {reasons}. Fix: use less."


def test_a_pair_that_does_not_fit_is_not_split_further(
    plain: DiffusionTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def out_of_memory(model: nn.Module, inputs: Batch) -> Prediction:
        if not model.training:
            return predict_output(model, inputs)
        tried.append(len(inputs[LATENTS]))
        raise MemoryError

    monkeypatch.setattr("fraqat.tasks.diffusion.predict_output", out_of_memory)
    with pytest.raises(DeviceMemoryError, match=r"with 1 samples at a time .* A single sample does not fit"):
        train(plain, tmp_path, on_out_of_memory="split")
    assert tried == [8, 4, 2]  # rows


def test_the_rate_of_a_log_is_of_samples(plain: DiffusionTask, tmp_path: Path) -> None:
    train(plain, tmp_path, num_steps=1)
    step = next(event for event in read_log(tmp_path) if event["event"] == "step")
    assert step["samples_per_s"] * step["step_ms"] / 1000 == pytest.approx(4)


def test_automatic_guidance_is_the_samplers(plain: DiffusionTask) -> None:
    for guided, wanted in ((plain.guided("auto", 8), SCALE), (plain.guided(2.0, 8), 2.0)):
        assert next(iter(guided.train_stream(8, seed=0)))[GUIDED_BY].tolist() == [wanted] * 4


@pytest.mark.parametrize(
    ("class_name", "guidance_scale", "of_paths", "found"),
    [
        ("PixArtTransformer2DModel", 4.5, False, 4.5),
        ("PixArtTransformer2DModel", 1.0, False, None),
        ("PixArtTransformer2DModel", 4.5, True, None),
        ("FluxTransformer2DModel", 3.5, False, None),
    ],
)
def test_automatic_guidance_is_none_where_one_prediction_is_sampled(
    class_name: str, guidance_scale: float, of_paths: bool, found: float | None
) -> None:
    sampler = SamplerSpec(guidance_scale=guidance_scale)
    assert scale_in_training("auto", class_name, sampler, of_paths=of_paths) == found


def test_a_scale_for_a_model_without_a_second_prediction_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.guidance_scale = 3.0 .* null or auto for FluxTransformer2DModel"):
        scale_in_training(3.0, "FluxTransformer2DModel", SAMPLER, of_paths=False)


def test_what_automatic_guidance_is_can_be_told(plain: DiffusionTask) -> None:
    auto, none = TrainSpec(guidance_scale="auto"), TrainSpec()
    assert guidance_phrase(plain.guided("auto", 8), auto) == "what guidance by 3 makes of two outputs is learned"
    assert guidance_phrase(plain, auto) == "outputs are learned one by one"
    assert guidance_phrase(plain, none) is None


def test_an_odd_part_of_a_batch_is_refused_before_training(plain: DiffusionTask) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size / train.accumulation = 3 .* an even number"):
        plain.guided("auto", 3)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("color-digits", ("train.guidance_scale=1.0",), "train.guidance_scale = 1.0 .* a finite number above 1"),
        ("color-digits", ("train.guidance_scale=twice",), "train.guidance_scale"),
        (
            "color-digits",
            ("train.guidance_scale=3.0", "data.learn_from=sampling_path"),
            "null or auto with data.learn_from: sampling_path",
        ),
        (
            "color-digits",
            ("train.guidance_scale=3.0", "train.batch_size=6", "train.accumulation=2"),
            r"train.batch_size / train.accumulation = 3 .* an even number",
        ),
        ("gemma-2-2b-it-tiny", ("train.guidance_scale=3.0",), "null or auto for task language"),
        ("speecht5-tiny", ("train.guidance_scale=3.0",), "null or auto for task text-to-speech"),
    ],
)
def test_settings_that_cannot_be_are_refused(recipe: str, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, settings)


@pytest.mark.parametrize("scale", ["twice", 1, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused_without_a_recipe(scale: Any) -> None:
    with pytest.raises(ConfigError, match=r"train.guidance_scale = .* a finite number above 1, auto, or null"):
        TrainSpec(guidance_scale=scale)


@pytest.mark.parametrize("recipe", ["gemma-2-2b-it-tiny", "speecht5-tiny", "flux-schnell-tiny"])
def test_automatic_guidance_is_allowed_everywhere(recipe: str) -> None:
    assert load_recipe(recipe, ("train.guidance_scale=auto",)).train.guidance_scale == "auto"


def test_what_is_learned_is_part_of_what_a_checkpoint_must_share() -> None:
    def fingerprint(*settings: str) -> dict[str, Any]:
        return load_recipe("color-digits", settings).fingerprint()

    assert "guidance_scale" not in fingerprint()["train"]  # runs of before stay what they were
    assert fingerprint("train.guidance_scale=4.0") != fingerprint("train.guidance_scale=3.0")
    assert fingerprint("train.guidance_scale=auto") != fingerprint(
        "train.guidance_scale=auto", "sampler.guidance_scale=7.0"
    )
    assert fingerprint("train.guidance_scale=4.0") == fingerprint(
        "train.guidance_scale=4.0", "sampler.guidance_scale=7.0"
    )


def test_every_guidance_of_the_table_is_one_that_was_thought_of() -> None:
    assert {entry.guidance for entry in ARCHITECTURES.values()} == {Guidance.CLASSIFIER_FREE, Guidance.DISTILLED}
