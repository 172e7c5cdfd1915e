"""Laws of the diffusion task, on the embedded pipeline."""

from __future__ import annotations

import copy
import dataclasses
import gc
import shutil
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fraqat.data.captioned import DataSpec
from fraqat.distill import LossSpec, TrainSpec, validation_loss
from fraqat.errors import ConfigError
from fraqat.nn import describe, quantize_
from fraqat.tasks import ModelSpec, SamplerSpec, architecture_of
from fraqat.tasks.conditioning import PromptEncoder
from fraqat.tasks.diffusion import DiffusionTask
from fraqat.tasks.image_samples import DiffusionSource
from fraqat.tasks.pipelines import build_transformer, load_pipeline, transformer_description
from fraqat.tasks.sampling import sample_images
from fraqat.zoo import zoo_path

SAMPLER = SamplerSpec(num_steps=2, guidance_scale=3.0, height=32, width=32, max_sequence_length=16)
SOURCE = ModelSpec(str(zoo_path("color-digits-sana")))
pytestmark = pytest.mark.xdist_group("diffusion")

MakeTask = Callable[..., DiffusionTask]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(SOURCE)


@pytest.fixture(scope="module")
def make_task(pipeline, tmp_path_factory: pytest.TempPathFactory) -> MakeTask:
    cache = tmp_path_factory.mktemp("cache")

    def make(sampler: SamplerSpec = SAMPLER, **data: Any) -> DiffusionTask:
        values = {"num_train": 32, "num_validation": 8, **data}
        return DiffusionTask(DiffusionSource(SOURCE, lambda: pipeline, DataSpec(**values), sampler, cache))

    return make


@pytest.fixture(scope="module")
def task(make_task: MakeTask) -> DiffusionTask:
    return make_task()


def encode_prompts(pipeline, prompts: list[str], sampler: SamplerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    columns = PromptEncoder(pipeline, sampler).encode(prompts)
    return columns["encoder_hidden_states"], columns["encoder_attention_mask"]


def test_noise_follows_the_flow_matching_path(task: DiffusionTask) -> None:
    batch = task.validation_batches(8)[0]
    inputs = task.make_inputs(batch, torch.Generator().manual_seed(5))
    again = task.make_inputs(batch, torch.Generator().manual_seed(5))
    for name, tensor in inputs.items():
        assert torch.equal(tensor, again[name])
    sigma = (inputs["timestep"] / 1000).view(-1, 1, 1, 1)
    noise = (inputs["hidden_states"] - (1 - sigma) * batch["latents"]) / sigma
    assert abs(float(noise.mean())) < 0.1
    assert float(noise.std()) == pytest.approx(1.0, abs=0.1)
    assert float(inputs["timestep"].min()) > 0
    assert float(inputs["timestep"].max()) < 1000


def test_latents_have_unit_scale_and_decode_to_the_pictures(task: DiffusionTask, pipeline) -> None:
    from fraqat.data.captioned import load_validation_images

    latents = task.validation_batches(8)[0]["latents"]
    assert float(latents.std()) == pytest.approx(1.0, abs=0.2)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    images = load_validation_images(DataSpec(num_train=32, num_validation=8)).images
    assert float((decoded - images).square().mean()) < 0.01


def test_dropped_captions_are_the_empty_prompt(pipeline, make_task: MakeTask) -> None:
    always = make_task(num_train=8, caption_dropout=0.999)
    inputs = always.make_inputs(always.validation_batches(8)[0], torch.Generator().manual_seed(0))
    empty, mask = encode_prompts(pipeline, [""], SAMPLER)
    for i in range(8):
        assert torch.equal(inputs["encoder_hidden_states"][i], empty[0])
        assert torch.equal(inputs["encoder_attention_mask"][i], mask[0])


def test_training_and_held_out_prompts_are_disjoint(task: DiffusionTask) -> None:
    from fraqat.data.captioned import load_training_images, load_validation_images

    spec = DataSpec(num_train=600, num_validation=56)
    assert not set(load_training_images(spec).prompts) & set(load_validation_images(spec).prompts)


def test_the_teacher_predicts_the_velocity(task: DiffusionTask, pipeline) -> None:
    batch = task.validation_batches(8)[0]
    inputs = task.make_inputs(batch, torch.Generator().manual_seed(1))
    sigma = (inputs["timestep"] / 1000).view(-1, 1, 1, 1)
    noise = (inputs["hidden_states"] - (1 - sigma) * batch["latents"]) / sigma
    with torch.no_grad():
        velocity = task.predict(pipeline.transformer, inputs)["output"]
    error = (velocity - (noise - batch["latents"])).square().mean()
    assert float(error) < 0.6 * float((noise - batch["latents"]).square().mean())


def test_images_do_not_depend_on_the_batch_size(pipeline) -> None:
    prompts = ("a red seven on white", "a blue two on yellow", "a white zero on black")
    together = sample_images(pipeline, pipeline.transformer, prompts, SAMPLER, seed=7)
    alone = sample_images(pipeline, pipeline.transformer, prompts, SAMPLER, seed=7, batch_size=1)
    assert together.shape == (3, 3, 32, 32)
    assert torch.allclose(together, alone, atol=2e-3)
    assert not torch.allclose(
        together, sample_images(pipeline, pipeline.transformer, prompts, SAMPLER, seed=8), atol=0.1
    )


def test_sampling_a_student_leaves_the_pipeline_as_it_was(pipeline) -> None:
    original = pipeline.transformer
    student = copy.deepcopy(original)
    quantize_(student)
    sample_images(pipeline, student, ("a red seven on white",), SAMPLER, seed=0)
    assert pipeline.transformer is original


def test_families_cover_the_blocks(pipeline) -> None:
    architecture = architecture_of(pipeline.transformer)
    families = {row.name: row.family for row in describe(pipeline.transformer, architecture.families).rows}
    assert families["transformer_blocks.0.attn1.to_q"] == "Attn"
    assert families["transformer_blocks.0.attn2.to_out.0"] == "Attn"
    assert families["transformer_blocks.0.ff.conv_inverted"] == "FF"
    assert families["time_embed.linear"] == "-"
    assert families["proj_out"] == "-"


@pytest.mark.parametrize(("family", "trained"), [("FF", ".ff."), ("Attn", ".attn"), ("TF", "transformer_blocks.")])
def test_selective_training_trains_its_family_alone(pipeline, family: str, trained: str) -> None:
    student = copy.deepcopy(pipeline.transformer).requires_grad_(True)
    report = quantize_(student, families=architecture_of(student).families, train=family)
    moving = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert moving
    assert all(trained in name for name in moving)
    assert all(row.spec is not None for row in report.quantized)
    assert len(report.quantized) == 37


def test_a_transformer_is_rebuilt_from_its_description(pipeline) -> None:
    class_name, config = transformer_description(pipeline.transformer)
    built = build_transformer(class_name, config)
    built.load_state_dict(pipeline.transformer.state_dict())
    x = torch.randn(1, 8, 8, 8)
    text, mask = encode_prompts(pipeline, ["a red seven on white"], SAMPLER)
    inputs = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "timestep": torch.tensor([500.0])}
    with torch.no_grad():
        assert torch.equal(built(x, **inputs).sample, pipeline.transformer(x, **inputs).sample)


def test_too_large_a_batch_is_refused(task: DiffusionTask) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size = 33 .* at most data.num_train = 32"):
        task.train_stream(33, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_steps": 0}, "sampler.num_steps = 0"),
        ({"guidance_scale": -0.5}, "sampler.guidance_scale = -0.5"),
        ({"timestep_shift": 0.0}, "sampler.timestep_shift = 0.0"),
        ({"guidance_scale": float("nan")}, "sampler.guidance_scale = nan"),
    ],
)
def test_impossible_samplers_are_refused(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplerSpec(**values)


def test_a_hub_id_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    from fraqat.errors import ModelError

    seen: dict[str, object] = {}

    def offline(source: str, **arguments: object) -> None:
        seen.update(arguments, source=source)
        raise OSError("nobody/nothing is not a valid model identifier\nmore")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", offline)
    with pytest.raises(ModelError, match=r"'nobody/nothing' cannot be loaded: .* Fix: check the name, your network"):
        load_pipeline(ModelSpec("nobody/nothing", revision="abc", variant="fp16"))
    assert seen["use_safetensors"] is True
    assert seen["trust_remote_code"] is False
    assert (seen["revision"], seen["variant"]) == ("abc", "fp16")


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_encoded_samples_are_found_again_without_the_pipeline(pipeline, tmp_path) -> None:
    spec = DataSpec(num_train=8, num_validation=4)
    first = DiffusionTask(DiffusionSource(SOURCE, lambda: pipeline, spec, SAMPLER, tmp_path))
    expected = first.validation_batches(4)[0]

    def refuse() -> Any:
        raise AssertionError("the pipeline was loaded again")

    found = DiffusionTask(DiffusionSource(SOURCE, refuse, spec, SAMPLER, tmp_path)).validation_batches(4)[0]
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in expected.items()}


@pytest.mark.parametrize("learn_from", ["images", "sampling_path"])
def test_encoding_tells_how_far_it_is(pipeline, tmp_path, learn_from: str) -> None:
    told: list[tuple[str, int, int]] = []
    spec = DataSpec(num_train=8, num_validation=4, learn_from=learn_from)
    source = DiffusionSource(
        SOURCE, lambda: pipeline, spec, SAMPLER, tmp_path, on_encoded=lambda *news: told.append(news)
    )
    DiffusionTask(source).steps_per_epoch(4)
    assert told == [("train", 0, 8), ("train", 8, 8), ("validation", 0, 4), ("validation", 4, 4)]
    DiffusionTask(source).steps_per_epoch(4)  # nothing is left to encode
    assert len(told) == 4


@pytest.mark.parametrize("learn_from", ["images", "sampling_path"])
def test_a_few_samples_are_encoded_alone_and_the_rest_later(monkeypatch, pipeline, tmp_path, learn_from: str) -> None:
    for module in ("encoding", "image_samples"):
        monkeypatch.setattr(f"fraqat.tasks.{module}.SHARD_SAMPLES", 4)
    told: list[tuple[str, int, int]] = []
    spec = DataSpec(num_train=12, num_validation=4, learn_from=learn_from)

    def open_task(cache: str) -> DiffusionTask:
        source = DiffusionSource(
            SOURCE, lambda: pipeline, spec, SAMPLER, tmp_path / cache, on_encoded=lambda *news: told.append(news)
        )
        return DiffusionTask(source)

    task = open_task("begun")
    few = task.calibration_batches(3, 2)
    assert told == [("train", 0, 4), ("train", 4, 4)]
    assert_same(open_task("begun").calibration_batches(3, 2), few)
    assert len(told) == 2  # another process finds what was encoded
    first = weakref.ref(task._samples._begun)
    num_steps = task.steps_per_epoch(1)
    gc.collect()
    assert first() is None  # or they would be in memory twice
    assert told[2:5] == [("train", 4, 12), ("train", 8, 12), ("train", 12, 12)]
    assert_same(task.calibration_batches(3, 2), few)

    whole = open_task("whole")
    assert whole.steps_per_epoch(1) == num_steps
    assert_same(whole.calibration_batches(3, 2), few)
    assert_same(whole.calibration_batches(12, 4), task.calibration_batches(12, 4))
    assert_same(whole.validation_batches(4), task.validation_batches(4))


@pytest.mark.parametrize(
    ("data", "sampler"),
    [
        ({"seed": 2}, {}),
        ({"num_train": 9}, {}),
        ({}, {"max_sequence_length": 8}),
        ({"learn_from": "sampling_path"}, {}),
    ],
)
def test_a_changed_input_never_reads_a_stale_cache(pipeline, tmp_path, data, sampler) -> None:
    opened: list[int] = []

    def open_pipeline() -> Any:
        opened.append(1)
        return pipeline

    spec = {"num_train": 8, "num_validation": 4}
    DiffusionTask(DiffusionSource(SOURCE, open_pipeline, DataSpec(**spec), SAMPLER, tmp_path)).steps_per_epoch(4)
    num_opened = len(opened)
    changed = dataclasses.replace(SAMPLER, **sampler)
    DiffusionTask(DiffusionSource(SOURCE, open_pipeline, DataSpec(**spec | data), changed, tmp_path)).steps_per_epoch(4)
    assert len(opened) > num_opened


def test_a_changed_encoder_never_reads_a_stale_cache(pipeline, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SOURCE.source, folder)
    spec, source = DataSpec(num_train=8, num_validation=4), ModelSpec(str(folder))
    opened: list[int] = []

    def open_pipeline() -> Any:
        opened.append(1)
        return pipeline

    def encode() -> None:
        DiffusionTask(DiffusionSource(source, open_pipeline, spec, SAMPLER, tmp_path)).steps_per_epoch(4)

    encode()
    num_opened = len(opened)
    encode()
    assert len(opened) == num_opened
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": ', '"scaling_factor": 0'))
    encode()
    assert len(opened) > num_opened


def test_streaming_gives_what_the_cache_gives(make_task: MakeTask) -> None:
    cached, streamed = make_task(num_train=8), make_task(num_train=8, cache=False)
    for expected, found in zip(cached.validation_batches(4), streamed.validation_batches(4), strict=True):
        for name, value in cached.make_inputs(expected, torch.Generator().manual_seed(3)).items():
            again = streamed.make_inputs(found, torch.Generator().manual_seed(3))[name]
            assert torch.allclose(value.float(), again.float(), atol=1e-4)
    batch = next(iter(streamed.train_stream(4, seed=0)))
    inputs = streamed.make_inputs(batch, torch.Generator().manual_seed(0))
    assert inputs["hidden_states"].shape == (4, 8, 8, 8)
    assert set(inputs) == set(cached.make_inputs(cached.validation_batches(4)[0], torch.Generator()))


def test_a_sampling_path_needs_the_cache(make_task: MakeTask) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache = False is not possible: allowed is true with learn_from"):
        make_task(learn_from="sampling_path", cache=False)


def test_the_teacher_loses_nothing_along_its_own_path(make_task: MakeTask, pipeline) -> None:
    task = make_task(num_train=4, num_validation=4, learn_from="sampling_path")
    assert task.steps_per_epoch(4) == 2  # four prompts, two steps
    student = copy.deepcopy(pipeline.transformer)
    spec = TrainSpec(batch_size=4, losses=(LossSpec("mse"),))
    assert validation_loss(task, pipeline.transformer, student, spec) == 0
    quantize_(student)
    assert validation_loss(task, pipeline.transformer, student, spec) > 0


def test_columns_of_drawn_levels_weigh_the_loss_and_reach_no_model(task: DiffusionTask, pipeline) -> None:
    batch, place = task.validation_batches(8)[0], torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    inputs = task.make_inputs_at(batch, place, torch.Generator().manual_seed(1))
    assert torch.allclose(inputs["timestep"] / 1000, place.float())  # Sana's levels are uniform
    student = copy.deepcopy(pipeline.transformer)
    quantize_(student)
    weight = torch.arange(8.0)
    weighted = {**inputs, "loss_weight": weight, "timestep_bin": torch.arange(8)}
    with torch.no_grad():
        ours, theirs = task.predict(student, weighted), task.predict(pipeline.transformer, inputs)
        assert torch.equal(ours["output"], task.predict(student, inputs)["output"])
    errors = task.sample_errors(ours, theirs)
    for name, wanted in (("mse", (weight * errors).mean()), ("huber", (weight * errors).mean() / 2)):
        assert torch.allclose(task.loss(ours, theirs, weighted, (LossSpec(name),)), wanted, rtol=1e-5)
    assert torch.allclose(task.loss(ours, theirs, inputs, (LossSpec(),)), errors.mean())
    parts = task.split_inputs(weighted, 2)
    assert [part["loss_weight"].tolist() for part, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_sampling_path_has_levels_of_its_own(make_task: MakeTask) -> None:
    assert make_task().draws_noise_levels and not make_task(learn_from="sampling_path").draws_noise_levels
