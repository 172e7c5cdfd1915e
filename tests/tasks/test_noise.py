"""Laws of the noise processes."""

from __future__ import annotations

import pytest
import torch

from fraqat.errors import ModelError
from fraqat.tasks import SamplerSpec
from fraqat.tasks.families import ARCHITECTURES, Process, TimeScale
from fraqat.tasks.noise import noise_process

ALPHAS = torch.linspace(0.9999, 0.0001, 1000)
CONSTANTS = {"time_factor": torch.tensor(1.0), "times": torch.tensor([1.0, 0.5]), "alphas_cumprod": ALPHAS}
FLOW = [name for name, entry in ARCHITECTURES.items() if entry.process is Process.FLOW]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", FLOW)
def test_flow_matching_mixes_linearly_and_times_lead_back_to_levels(name: str) -> None:
    process = noise_process(name, SamplerSpec(timesteps="uniform"), CONSTANTS)
    latents, noise = torch.randn(64, 4, 2, 2), torch.randn(64, 4, 2, 2)
    sigma = process.draw(64, generator())
    noisy, time = process.add(latents, noise, sigma)
    level = sigma.view(-1, 1, 1, 1)
    assert torch.allclose(noisy, (1 - level) * latents + level * noise, atol=1e-6)
    assert torch.allclose(process.sigma_of(time), sigma, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "noisy_time", "clean_time"),
    [(TimeScale.THOUSAND, 1000.0, 0.0), (TimeScale.SIGMA, 1.0, 0.0), (TimeScale.REVERSED, 0.0, 1.0)],
)
def test_time_scales_say_where_noise_is(scale: TimeScale, noisy_time: float, clean_time: float) -> None:
    name = next(name for name, entry in ARCHITECTURES.items() if entry.time is scale and entry.process is Process.FLOW)
    process = noise_process(name, SamplerSpec(timesteps="uniform"), CONSTANTS)
    _, time = process.add(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1.0, 0.0]))
    assert time.tolist() == [noisy_time, clean_time]


def test_noise_prediction_keeps_the_variance_of_unit_latents() -> None:
    process = noise_process("PixArtTransformer2DModel", SamplerSpec(), CONSTANTS)
    latents, noise = torch.randn(512, 64, generator=generator()), torch.randn(512, 64)
    sigma = process.draw(512, generator())
    noisy, timestep = process.add(latents, noise, sigma)
    assert timestep.dtype == torch.int64
    assert int(timestep.min()) >= 0
    assert int(timestep.max()) <= 999
    assert float(noisy.var()) == pytest.approx(1.0, abs=0.05)
    alpha = ALPHAS[timestep].view(-1, 1)
    assert torch.allclose(noisy, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)


def test_noise_prediction_needs_a_scheduler_that_knows_the_noise() -> None:
    without = {name: value for name, value in CONSTANTS.items() if name != "alphas_cumprod"}
    with pytest.raises(ModelError, match="has no alphas_cumprod"):
        noise_process("PixArtTransformer2DModel", SamplerSpec(), without)


def test_levels_of_the_sampler_are_its_own_steps() -> None:
    process = noise_process("FluxTransformer2DModel", SamplerSpec(timesteps="auto"), CONSTANTS)
    drawn = process.draw(500, generator())
    assert set(drawn.tolist()) == {1.0, 0.5}


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_a_shift_moves_levels_towards_noise(kind: str) -> None:
    plain = noise_process("SD3Transformer2DModel", SamplerSpec(timesteps=kind), CONSTANTS)
    shifted = noise_process("SD3Transformer2DModel", SamplerSpec(timesteps=kind, timestep_shift=3.0), CONSTANTS)
    before, after = plain.draw(200, generator()), shifted.draw(200, generator())
    assert bool((after > before).all())
    assert torch.allclose(after, 3 * before / (1 + 2 * before))
    assert float(after.max()) < 1


def test_the_distribution_is_the_familys_own_unless_it_is_given() -> None:
    assert noise_process("SD3Transformer2DModel", SamplerSpec(), CONSTANTS).timesteps == "logit_normal"
    assert noise_process("SanaTransformer2DModel", SamplerSpec(), CONSTANTS).timesteps == "uniform"
    given = SamplerSpec(timesteps="uniform")
    assert noise_process("SD3Transformer2DModel", given, CONSTANTS).timesteps == "uniform"


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "sampler"])
def test_levels_at_uniform_places_are_those_that_are_drawn(timesteps: str) -> None:
    constants = {**CONSTANTS, "times": torch.tensor([1.0, 0.75, 0.5, 0.25])}
    sampler = SamplerSpec(timesteps=timesteps, timestep_shift=1.0 if timesteps == "sampler" else 3.0)
    process = noise_process("FluxTransformer2DModel", sampler, constants)
    num = 4000
    levels = process.at((torch.arange(num, dtype=torch.float64) + 0.5) / num)
    assert levels.dtype == torch.float32 and bool((levels.diff() >= 0).all())
    drawn = process.draw(num, generator()).sort().values
    assert float((levels - drawn).abs().mean()) < 0.02
    ends = process.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert bool(torch.isfinite(ends).all()) and float(ends.min()) >= 0 and float(ends.max()) <= 1
