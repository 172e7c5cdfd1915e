"""Every entry of the table on a tiny random pipeline of its class: recorded, encoded, quantized, trained, sampled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_sampler

from fraqat.errors import ConfigError, ModelError
from fraqat.nn import describe, quantize_
from fraqat.tasks import ModelSpec
from fraqat.tasks.conditioning import LATENTS, TIMESTEP, compute_dtype, nested, record_calls
from fraqat.tasks.encoding import Encoder
from fraqat.tasks.families import ARCHITECTURES, Guidance, architecture_named, architecture_of
from fraqat.tasks.pipelines import load_pipeline, load_transformer
from fraqat.tasks.sampling import sample_images

PROMPTS = ["a red seven on white", "a blue two on yellow"]


def generators(num: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(5 + i) for i in range(num)]


def test_every_entry_of_the_table_has_a_tiny_pipeline() -> None:
    from tiny_pipelines import BUILDERS

    assert len(BUILDERS) == len(ARCHITECTURES)


def test_a_sampling_path_is_what_the_pipeline_gave_its_transformer(architecture_name: str, tiny_pipeline: Any) -> None:
    sampler = tiny_sampler(architecture_name)
    encoder = Encoder(tiny_pipeline, sampler)
    shard = next(encoder.shards_of_paths([(None, p) for p in PROMPTS], 0, seed=5, unguided_share=0.0))
    calls = record_calls(
        tiny_pipeline, PROMPTS, sampler, guidance_scale=sampler.guidance_scale, generators=generators(2)
    )
    assert len(shard.index) == 2 * sampler.num_steps
    per_step = len(calls) // sampler.num_steps
    for step in range(sampler.num_steps):
        recorded = calls[step * per_step : (step + 1) * per_step]
        rows = torch.cat([call.tensors[LATENTS] for call in recorded])
        for i in range(2):
            row = shard.rows[LATENTS][2 * step + i]
            assert any(torch.equal(row, other) for other in rows)
            assert float(shard.rows[TIMESTEP][2 * step + i]) == float(recorded[0].tensors[TIMESTEP].flatten()[0])
            expected = encoder.prompts.encode([PROMPTS[i]])
            for name, value in expected.items():
                assert torch.allclose(shard.shared[name][shard.index[2 * step + i]], value[0], atol=1e-5)


def test_unguided_rows_hold_the_empty_prompt(architecture_name: str, tiny_pipeline: Any) -> None:
    encoder = Encoder(tiny_pipeline, tiny_sampler(architecture_name))
    shard = next(encoder.shards_of_paths([(None, p) for p in PROMPTS], 0, seed=5, unguided_share=0.999))
    is_guided = architecture_of(tiny_pipeline.transformer).guidance is Guidance.CLASSIFIER_FREE
    assert shard.index.tolist() == ([2] * 6 if is_guided else [0, 1] * 3)
    for name, empty in encoder.prompts.empty.items():
        assert torch.equal(shard.shared[name][2], empty[0])


def test_pictures_become_latents_of_the_shape_and_scale_of_the_pipeline(
    architecture_name: str, tiny_pipeline: Any
) -> None:
    encoder = Encoder(tiny_pipeline, tiny_sampler(architecture_name))
    shard = encoder.encode(torch.rand(3, 3, 32, 32) * 2 - 1, [*PROMPTS, PROMPTS[0]])
    assert shard.rows["latents"].shape[1:] == encoder.prompts.latent_shape
    assert shard.index.tolist() == [0, 1, 0]


def test_a_size_that_patches_do_not_divide_is_named(saved_pipeline: Any) -> None:
    pipeline = load_pipeline(ModelSpec(str(saved_pipeline("flux"))))
    encoder = Encoder(pipeline, tiny_sampler("flux"))
    with pytest.raises(ModelError, match=r"become latents of shape .* starts from .* Fix: use a sampler.height"):
        encoder.encode(torch.zeros(1, 3, 64, 64), ["a"])


def test_recorded_arguments_call_the_transformer_again(architecture_name: str, tiny_pipeline: Any) -> None:
    sampler = tiny_sampler(architecture_name)
    call = record_calls(tiny_pipeline, PROMPTS, sampler, guidance_scale=1.0, num_calls=1)[0]
    with torch.no_grad():
        output = tiny_pipeline.transformer(**nested(call.tensors), return_dict=False)[0]
    assert output.shape[0] == 2
    assert bool(torch.isfinite(output).all())


def test_the_last_layer_keeps_16_bit_inputs_and_all_others_are_quantized(
    architecture_name: str, tiny_pipeline: Any
) -> None:
    architecture = architecture_of(tiny_pipeline.transformer)
    student = copy.deepcopy(tiny_pipeline.transformer)
    report = quantize_(student, families=architecture.families, rules=architecture.default_rules())
    bits = {row.name: row.spec.activation.bits for row in report.quantized if row.spec and row.spec.activation}
    assert {name for name, value in bits.items() if value == 16} == set(architecture.last_layers)
    floats = [row.name for row in report.rows if row.spec is None and row.type_name == "Linear"]
    assert floats == []


def test_families_split_every_block(architecture_name: str, tiny_pipeline: Any) -> None:
    families = architecture_of(tiny_pipeline.transformer).families
    found = {row.family for row in describe(tiny_pipeline.transformer, families).rows}
    assert {"FF", "Attn"} <= found
    blocks = [row for row in describe(tiny_pipeline.transformer, families).rows if row.family in ("FF", "Attn")]
    if architecture_name not in ("lumina2",):  # its refiners stand outside the main stack
        assert all(families.contains("TF", row.name) for row in blocks)


def test_students_are_sampled_by_their_pipeline(architecture_name: str, tiny_pipeline: Any) -> None:
    sampler = tiny_sampler(architecture_name)
    student = copy.deepcopy(tiny_pipeline.transformer)
    quantize_(student)
    images = sample_images(tiny_pipeline, tiny_pipeline.transformer, PROMPTS, sampler, seed=1)
    again = sample_images(tiny_pipeline, tiny_pipeline.transformer, PROMPTS, sampler, seed=1, batch_size=1)
    quantized = sample_images(tiny_pipeline, student, PROMPTS, sampler, seed=1)
    assert images.shape == (2, 3, 32, 32)
    assert torch.allclose(images, again, atol=2e-2)
    assert not torch.equal(images, quantized)


def test_a_class_without_an_entry_says_what_to_add() -> None:
    with pytest.raises(ModelError, match=r'add "HunyuanDiT2DModel": Architecture\(last_layers=') as error:
        architecture_named("HunyuanDiT2DModel")
    assert "docs/add_an_architecture.md" in str(error.value)


def test_arguments_that_a_pipeline_does_not_take_are_named(saved_pipeline: Any) -> None:
    pipeline = load_pipeline(ModelSpec(str(saved_pipeline("sana"))))
    sampler = tiny_sampler("sana", call_arguments={"num_frames": 1})
    with pytest.raises(ModelError, match=r"call_arguments = \['num_frames'\] is not possible"):
        record_calls(pipeline, PROMPTS, sampler, guidance_scale=1.0)


@pytest.mark.parametrize("encoders", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transformer", [torch.float32, torch.bfloat16])
def test_transformers_run_in_their_own_precision_inside_any_pipeline(
    architecture_name: str, saved_pipeline: Any, encoders: torch.dtype, transformer: torch.dtype
) -> None:
    spec = ModelSpec(str(saved_pipeline(architecture_name)))
    model = load_transformer(spec, dtype=transformer)
    pipeline = load_pipeline(spec, dtype=encoders, transformer=model)
    seen: set[torch.dtype] = set()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(
            value.dtype for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name == LATENTS
        ),
        with_kwargs=True,
    )
    sampler = tiny_sampler(architecture_name)
    images = sample_images(pipeline, model, PROMPTS, sampler, seed=0)
    assert bool(torch.isfinite(images).all())
    assert compute_dtype(model) == transformer
    shard = Encoder(pipeline, sampler).encode(torch.zeros(1, 3, 32, 32), ["a"])
    assert bool(torch.isfinite(shard.rows["latents"]).all())


def test_settings_of_the_sampler_are_not_overridden_by_call_arguments(saved_pipeline: Any) -> None:
    pipeline = load_pipeline(ModelSpec(str(saved_pipeline("sana"))))
    sampler = tiny_sampler("sana", call_arguments={"generator": None})
    with pytest.raises(ConfigError, match=r"call_arguments = \['generator'\] is not possible"):
        record_calls(pipeline, PROMPTS, sampler, guidance_scale=1.0)


def test_the_size_of_a_computed_batch_does_not_change_a_sampling_path(
    tiny_pipeline: Any, architecture_name: str
) -> None:
    sampler = tiny_sampler(architecture_name)
    samples = [(None, prompt) for prompt in (*PROMPTS, "a green one on black")]
    whole, parts = (
        next(Encoder(tiny_pipeline, sampler, size).shards_of_paths(samples, 0, seed=1, unguided_share=0.0))
        for size in (32, 2)
    )
    first = whole.rows[LATENTS][: len(samples)]  # the first step: noise by seed alone
    again = torch.cat([parts.rows[LATENTS][:2], parts.rows[LATENTS][2 * sampler.num_steps : 2 * sampler.num_steps + 1]])
    assert torch.equal(first, again)
    assert len(whole.index) == len(parts.index) == 3 * sampler.num_steps
