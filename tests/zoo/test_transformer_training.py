"""Laws of the teachers' training that are cheap enough to check, for every architecture of the table."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fraqat.zoo import transformer_training
from fraqat.zoo.architectures import ARCHITECTURES, Distillation
from fraqat.zoo.reflow import guided_flow, teacher_pairs
from fraqat.zoo.transformer_training import (
    CaptionedLatents,
    TransformerSettings,
    load_average,
    train_transformer,
    trained_parts,
)

SETTINGS = TransformerSettings(num_steps=4, num_text_steps=3, batch_size=4, num_warmup_steps=1, checkpoint_every=2)
LATENTS = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red two on blue", "a green one on black"] * 4
DATA = CaptionedLatents(LATENTS, PROMPTS)
SCHEDULE = "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
MIXED_NORM = "ignore:Mismatch dtype between input and weight:UserWarning"


def weights(name: str, pipeline: Any) -> dict[str, Tensor]:
    return dict(trained_parts(ARCHITECTURES[name], pipeline).named_parameters())


def train(name: str, pipeline: Any, checkpoint: Path) -> float:
    architecture = ARCHITECTURES[name]
    objective = architecture.objective(pipeline)
    return train_transformer(architecture, pipeline, DATA, objective, SETTINGS, checkpoint).loss


@pytest.mark.filterwarnings(MIXED_NORM)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_moves_every_part(name: str, tmp_path: Path, untrained: Callable[[str], Any]) -> None:
    pipeline = untrained(name)
    before = {key: value.detach().clone() for key, value in weights(name, pipeline).items()}
    train(name, pipeline, tmp_path / "run.pt")
    moved = {key.split(".")[0] for key, value in weights(name, pipeline).items() if not torch.equal(value, before[key])}
    assert moved == {"transformer", *ARCHITECTURES[name].text_encoders}


@pytest.mark.filterwarnings(MIXED_NORM)
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_resumed_training_equals_uninterrupted_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: Callable[[str], Any]
) -> None:
    whole, resumed = untrained(name), untrained(name)
    loss = train(name, whole, tmp_path / "whole.pt")
    save = transformer_training._Run.save

    def save_and_stop(run: transformer_training._Run, path: Path) -> None:
        save(run, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(transformer_training._Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(name, untrained(name), tmp_path / "parts.pt")
    assert load_average(ARCHITECTURES[name], untrained(name), tmp_path / "parts.pt") == 2
    monkeypatch.setattr(transformer_training._Run, "save", save)
    assert train(name, resumed, tmp_path / "parts.pt") == loss
    for key, value in weights(name, whole).items():
        assert torch.equal(value, weights(name, resumed)[key]), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_captions_reach_the_output(name: str, untrained: Callable[[str], Any]) -> None:
    architecture, pipeline = ARCHITECTURES[name], untrained(name)
    with torch.no_grad():
        conditions = architecture.conditions(pipeline, PROMPTS[:2])
        same = LATENTS[:1].repeat(2, 1, 1, 1)
        one, other = architecture.denoise(pipeline, same, torch.full((2,), 0.5), conditions)
    assert one.shape[1:] == LATENTS.shape[2:]
    assert (one - other).abs().max() > 1e-3


def test_dropped_captions_are_empty_and_paired_noise_stays_with_its_latents() -> None:
    paired = CaptionedLatents(LATENTS, [f"caption {index}" for index in range(8)], noise=-LATENTS)
    latents, noise, captions = paired.draw(64, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(noise, -latents)
    assert 6 <= captions.count("") <= 26
    for row, caption in zip(latents, captions, strict=True):
        assert caption == "" or torch.equal(row, LATENTS[int(caption.split()[1])])


@pytest.mark.filterwarnings(SCHEDULE)
def test_guided_flow_is_what_the_pipeline_samples_with_guidance(untrained: Callable[[str], Any]) -> None:
    """The teacher's pairs and diffusers' own sampler agree, up to the rounding of bfloat16."""
    architecture, pipeline = ARCHITECTURES["flux"], untrained("flux")
    sample = guided_flow(architecture, pipeline, LATENTS[:2], PROMPTS[:2], steps=3, guidance=2.0)
    arguments = {"negative_prompt": ["", ""], "true_cfg_scale": 2.0, "num_inference_steps": 3, "output_type": "latent"}
    packed = pipeline._pack_latents(LATENTS[:2], 2, 8, 8, 8)
    drawn = pipeline(PROMPTS[:2], latents=packed, **arguments, **architecture.arguments).images
    expected = pipeline._unpack_latents(drawn, 32, 32, pipeline.vae_scale_factor)
    assert (expected - LATENTS[:2]).std() > 0.1
    assert (sample - expected).std() < 0.03 * (expected - LATENTS[:2]).std()


def test_pairs_are_drawn_once(tmp_path: Path, untrained: Callable[[str], Any]) -> None:
    architecture, pipeline = ARCHITECTURES["flux"], untrained("flux")
    settings = Distillation(4, teacher_steps=2, teacher_guidance=2.0, sampler_sigmas=(1.0, 0.5), num_steps=1)
    file = tmp_path / "pairs.safetensors"
    noise, latents = teacher_pairs(architecture, pipeline, PROMPTS[:4], settings, 0, file)
    broken = dataclasses.replace(architecture, conditions=lambda *_: {})  # would raise if anything were drawn again
    again_noise, again_latents = teacher_pairs(broken, pipeline, PROMPTS[:4], settings, 0, file)
    assert torch.equal(noise, again_noise) and torch.equal(latents, again_latents)
    assert noise.shape == latents.shape and not torch.equal(noise, latents)
