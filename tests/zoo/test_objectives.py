"""Laws of what the denoisers are trained to predict."""

import pytest
import torch
from torch import Tensor

from fraqat.zoo.objectives import FlowMatching, VelocityPrediction

BETAS = torch.linspace(0.0001, 0.02, 1000)
LATENTS = torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def test_flow_loss_of_the_true_velocity_is_zero_and_of_none_is_its_power() -> None:
    objective, generator = FlowMatching(), torch.Generator().manual_seed(0)
    assert objective.loss(lambda *_: NOISE - LATENTS, LATENTS, NOISE, generator) == 0
    power = (NOISE - LATENTS).square().mean()
    torch.testing.assert_close(objective.loss(lambda *_: torch.zeros_like(NOISE), LATENTS, NOISE, generator), power)


def test_flow_sees_a_straight_mix_of_latents_and_noise() -> None:
    def check(noisy: Tensor, sigma: Tensor) -> Tensor:
        share = sigma.view(-1, 1, 1, 1)
        torch.testing.assert_close(noisy, (1 - share) * LATENTS + share * NOISE)
        return noisy

    FlowMatching().loss(check, LATENTS, NOISE, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler_sigmas", [(), (1.0, 0.75, 0.5, 0.25)])
def test_half_of_the_noise_levels_are_the_samplers(sampler_sigmas: tuple[float, ...]) -> None:
    drawn: list[Tensor] = []

    def keep(noisy: Tensor, sigma: Tensor) -> Tensor:
        drawn.append(sigma)
        return noisy

    many = LATENTS.repeat(64, 1, 1, 1)
    objective = FlowMatching(sampler_sigmas=sampler_sigmas)
    objective.loss(keep, many, torch.zeros_like(many), torch.Generator().manual_seed(0))
    assert drawn[0].min() >= 0 and drawn[0].max() <= 1
    share = torch.isin(drawn[0], torch.tensor((1.0, 0.75, 0.5, 0.25))).double().mean().item()
    assert share == pytest.approx(0.5 if sampler_sigmas else 0.0, abs=0.05)


def velocity_of(step: Tensor) -> Tensor:
    """The true velocity of the process at these timesteps."""
    kept = torch.cumprod(1 - BETAS, 0)[step].view(-1, 1, 1, 1)
    return kept.sqrt() * NOISE - (1 - kept).sqrt() * LATENTS


def test_velocity_loss_of_the_truth_is_zero() -> None:
    """The true reverse variance is the smallest, which the model names by -1."""

    def predict(_: Tensor, step: Tensor) -> Tensor:
        return torch.cat([velocity_of(step), torch.full_like(NOISE, -1.0)], dim=1)

    loss = VelocityPrediction(BETAS).loss(predict, LATENTS, NOISE, torch.Generator().manual_seed(0))
    assert abs(loss.item()) < 1e-6


def test_variance_half_is_trained_by_the_bound_and_velocity_half_by_the_error_alone() -> None:
    output = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    gradients = []
    for weight in (0.0, 0.1, 0.2):
        objective = VelocityPrediction(BETAS, variance_weight=weight)
        loss = objective.loss(lambda *_: output, LATENTS, NOISE, torch.Generator().manual_seed(0))
        gradients.append(torch.autograd.grad(loss, output)[0].chunk(2, dim=1))
    assert all(torch.equal(velocity, gradients[0][0]) for velocity, _ in gradients)
    assert not gradients[0][1].any() and gradients[1][1].any()
    torch.testing.assert_close(gradients[2][1], 2 * gradients[1][1])


@pytest.mark.parametrize(("error", "better", "worse"), [(0.0, -1.0, 1.0), (3.0, 1.0, -1.0)])
def test_bound_favours_the_variance_that_the_error_calls_for(error: float, better: float, worse: float) -> None:
    """With an error in the mean, a larger variance is the likelier one; without, the smallest."""

    def loss(variance: float) -> float:
        objective, generator = VelocityPrediction(BETAS, variance_weight=1.0), torch.Generator().manual_seed(0)

        def predict(_: Tensor, step: Tensor) -> Tensor:
            kept = torch.cumprod(1 - BETAS, 0)[step].view(-1, 1, 1, 1)
            wrong = velocity_of(step) + error / kept.sqrt()  # moves the noise by `error` at every timestep
            return torch.cat([wrong, torch.full_like(NOISE, variance)], dim=1)

        return objective.loss(predict, LATENTS, NOISE, generator).item()

    assert loss(better) < loss(worse)
