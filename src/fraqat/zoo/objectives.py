"""What a denoiser is trained to predict: the velocity of a flow, or that of a variance-preserving process.

Shape suffixes: N samples, C channels, H and W of the latents, T timesteps of the noise schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents and their noise levels [N] to the transformer's output, all in its own convention."""


class Objective(Protocol):
    """A way to train a denoiser."""

    def loss(self, predict: Predict, latents: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Computes the loss of one batch.

        Args:
            predict: the denoiser.
            latents: clean latents, [N, C, H, W].
            noise: Gaussian noise, same shape.
            generator: source of the noise levels.

        Returns:
            The loss, 0-dim.
        """
        ...


@dataclass(frozen=True)
class FlowMatching:
    """Regression of e - x_0 at x = (1 - sigma) x_0 + sigma e (https://arxiv.org/abs/2403.03206).

    Args:
        centre: mean of the logit of sigma. What a digit is shows at sigma 0.6 to 0.95 (a wrong caption costs most
            there), which a centre of 0.8 draws most often.
        spread: standard deviation of the logit of sigma.
        sampler_sigmas: noise levels that a few-step sampler visits; where there are any, half of the batch trains on
            these and half on uniform levels, instead of on a spread.
    """

    centre: float = 0.0
    spread: float = 1.2
    sampler_sigmas: Sequence[float] = ()

    def loss(self, predict: Predict, latents: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Computes the mean squared error of the velocity.

        Args:
            predict: noisy latents and sigmas in (0, 1] to velocity.
            latents: clean latents, [N, C, H, W].
            noise: Gaussian noise, same shape.
            generator: source of the sigmas.

        Returns:
            The loss, 0-dim.
        """
        sigma_N = self._draw(len(latents), generator)
        velocity = predict(torch.lerp(latents, noise, sigma_N.view(-1, 1, 1, 1)), sigma_N)
        return F.mse_loss(velocity.float(), noise - latents)

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        if not self.sampler_sigmas:
            return _draw_sigma(count, self.centre, self.spread, generator)
        chosen = torch.randint(len(self.sampler_sigmas), (count,), generator=generator)
        on_grid = torch.rand(count, generator=generator) < 0.5
        return torch.where(on_grid, torch.tensor(self.sampler_sigmas)[chosen], torch.rand(count, generator=generator))


@dataclass(frozen=True)
class VelocityPrediction:
    """Regression of v = sqrt(a) e - sqrt(1 - a) x_0 at x = sqrt(a) x_0 + sqrt(1 - a) e (https://arxiv.org/abs/2202.00512).

    The denoiser gives 2 C channels: the velocity, and where between its smallest and largest sensible value the log
    variance of the reverse step lies (https://arxiv.org/abs/2102.09672). The samplers of today read the first half only.

    Predicting the noise e instead was tried first and drew well-formed digits that were not those asked for: where a
    picture's content is decided, x is nearly e, and a small denoiser is busy with copying it. The velocity is nearly
    -x_0 there. Timesteps are drawn as flow matching draws sigma, at the same ratio of noise to latents
    r = sigma / (1 - sigma) = sqrt((1 - a) / a).

    Args:
        betas: variances of the forward steps, [T].
        centre: mean of the logit of sigma.
        spread: its standard deviation; a quarter of the timesteps is uniform instead.
        variance_weight: weight of the bound, which trains the second half alone.
    """

    betas: Tensor
    centre: float = 0.8
    spread: float = 1.2
    variance_weight: float = 0.1

    def loss(self, predict: Predict, latents: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Computes the mean squared error of the velocity plus the weighted bound.

        Args:
            predict: noisy latents and integer timesteps to 2 C channels.
            latents: clean latents, [N, C, H, W].
            noise: Gaussian noise, same shape.
            generator: source of the timesteps.

        Returns:
            The loss, 0-dim.
        """
        kept_T = torch.cumprod(1 - self.betas, 0)
        ratio_T = ((1 - kept_T) / kept_T).sqrt()
        step_N = self._draw_steps(ratio_T, len(latents), generator)
        signal = kept_T[step_N].view(-1, 1, 1, 1).sqrt()
        spoil = (1 - kept_T[step_N]).view(-1, 1, 1, 1).sqrt()
        predicted, variance = predict(signal * latents + spoil * noise, step_N).float().chunk(2, dim=1)
        error = signal * noise - spoil * latents - predicted
        noise_error = signal * error.detach()  # e = sqrt(a) v + sqrt(1 - a) x
        return error.square().mean() + self.variance_weight * self._bound(noise_error, variance, step_N)

    def _draw_steps(self, ratio_T: Tensor, count: int, generator: torch.Generator) -> Tensor:
        sigma_N = _draw_sigma(count, self.centre, self.spread, generator)
        nearest_N = torch.searchsorted(ratio_T, sigma_N / (1 - sigma_N)).clamp_max(len(ratio_T) - 1)
        uniform_N = torch.randint(len(ratio_T), (count,), generator=generator)
        return torch.where(torch.rand(count, generator=generator) < 0.25, uniform_N, nearest_N)

    def _bound(self, error: Tensor, variance: Tensor, step_N: Tensor) -> Tensor:
        """Divergence of the model's reverse step from the true one, in nats, mean over elements."""
        kept_T = torch.cumprod(1 - self.betas, 0)
        beta, kept = self.betas[step_N].view(-1, 1, 1, 1), kept_T[step_N].view(-1, 1, 1, 1)
        kept_before = kept_T[(step_N - 1).clamp_min(0)].view(-1, 1, 1, 1)
        true_log = (beta * (1 - kept_before) / (1 - kept)).log()
        share = (variance + 1) / 2
        model_log = share * beta.log() + (1 - share) * true_log
        mean_error = beta / ((1 - beta).sqrt() * (1 - kept).sqrt()) * error
        divergence = model_log - true_log - 1 + (true_log - model_log).exp() + mean_error.square() * (-model_log).exp()
        first = (step_N == 0).view(-1, 1, 1, 1)  # its true variance is zero
        return (0.5 * divergence).masked_fill(first, 0).mean()


def _draw_sigma(count: int, centre: float, spread: float, generator: torch.Generator) -> Tensor:
    return torch.sigmoid(centre + torch.randn(count, generator=generator) * spread)
