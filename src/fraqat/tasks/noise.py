"""How noise is added to latents in training, for both processes of the table.

Shape suffixes: N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fraqat.errors import ModelError
from fraqat.tasks.conditioning import TIMESTEP, record_calls
from fraqat.tasks.families import NUM_TRAIN_TIMESTEPS, Process, TimeScale, architecture_named
from fraqat.tasks.spec import SamplerSpec


@dataclass(frozen=True)
class NoiseProcess:
    """Draws noise levels and mixes latents with noise.

    Args:
        process: Flow matching, or noise prediction.
        time: What the transformer takes as time.
        timesteps: `uniform`, `logit_normal` or `sampler`.
        shift: Moves noise levels towards noise: sigma' = s sigma / (1 + (s - 1) sigma) (arXiv 2403.03206, Eq. 23).
        time_factor: Further factor of the time, `timestep_scale` of the transformer's configuration.
        sampler_sigmas: Noise levels in (0, 1] of the sampler's steps.
        alphas_cumprod: Cumulative product of the scheduler [1000], for noise prediction.
    """

    process: Process
    time: TimeScale
    timesteps: str
    shift: float
    time_factor: float
    sampler_sigmas: tuple[float, ...]
    alphas_cumprod: Tensor | None

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Noise levels sigma in (0, 1], [N] float32; sigma is timestep / 1000."""
        if self.timesteps == "sampler":
            levels = torch.tensor(self.sampler_sigmas)
            return levels[torch.randint(len(levels), (num,), generator=generator)]
        sigma_N = torch.rand(num, generator=generator)
        if self.timesteps == "logit_normal":
            sigma_N = torch.sigmoid(torch.randn(num, generator=generator))
        return self._shifted(sigma_N)

    def _shifted(self, sigma_N: Tensor) -> Tensor:
        return sigma_N if self.shift == 1 else self.shift * sigma_N / (1 + (self.shift - 1) * sigma_N)

    def at(self, place_N: Tensor) -> Tensor:
        """The noise levels, [N] float32, below which shares `place_N` of the distribution of `draw` lie, float64 in [0, 1]."""
        if self.timesteps == "sampler":
            levels = torch.tensor(self.sampler_sigmas).sort().values
            return levels[(place_N * len(levels)).long().clamp(max=len(levels) - 1)]
        sigma_N = torch.sigmoid(torch.special.ndtri(place_N)) if self.timesteps == "logit_normal" else place_N
        return self._shifted(sigma_N).float()

    def add(self, latents: Tensor, noise: Tensor, sigma_N: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents of the same shape, and the time [N] that the transformer is given."""
        shape = (-1, *(1,) * (latents.ndim - 1))
        if self.process is Process.NOISE:
            assert self.alphas_cumprod is not None
            scaled_N = sigma_N * NUM_TRAIN_TIMESTEPS
            whole_N = (
                scaled_N.round() if self.timesteps == "sampler" else scaled_N
            )  # a level of the sampler is one of them
            timestep_N = whole_N.long().clamp(max=len(self.alphas_cumprod) - 1)
            alpha = self.alphas_cumprod[timestep_N].view(shape)
            return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timestep_N
        time_N = {
            TimeScale.THOUSAND: NUM_TRAIN_TIMESTEPS * sigma_N,
            TimeScale.SIGMA: sigma_N,
            TimeScale.REVERSED: 1 - sigma_N,
        }[self.time]
        return torch.lerp(latents, noise, sigma_N.view(shape)), time_N * self.time_factor

    def sigma_of(self, time_N: Tensor) -> Tensor:
        """The noise level of a time that a transformer was given; undoes `add`."""
        time_N = time_N.float() / (1 if self.process is Process.NOISE else self.time_factor)
        if self.process is Process.FLOW and self.time is TimeScale.SIGMA:
            return time_N
        if self.process is Process.FLOW and self.time is TimeScale.REVERSED:
            return 1 - time_N
        return time_N / NUM_TRAIN_TIMESTEPS


def noise_constants(pipeline: DiffusionPipeline, sampler: SamplerSpec) -> dict[str, Tensor]:
    """What the noise process needs of a pipeline, as tensors to be kept with encoded samples.

    Returns:
        `time_factor`, `times` of the sampler's own steps, and `alphas_cumprod` where the scheduler has it.
    """
    parts = cast(Any, pipeline)
    calls = record_calls(pipeline, [""], sampler, guidance_scale=1.0)
    factor = float(getattr(parts.transformer.config, "timestep_scale", None) or 1)
    constants = {
        "time_factor": torch.tensor(factor),
        "times": torch.stack([call.tensors[TIMESTEP].flatten()[0].float().cpu() for call in calls]),
    }
    alphas = getattr(parts.scheduler, "alphas_cumprod", None)
    return constants if alphas is None else constants | {"alphas_cumprod": alphas.float().cpu()}


def noise_process(class_name: str, sampler: SamplerSpec, constants: Mapping[str, Tensor]) -> NoiseProcess:
    """The process of a transformer class.

    Args:
        class_name: A key of `ARCHITECTURES`.
        sampler: Distribution of noise levels; `auto` is the table's.
        constants: Of `noise_constants`.

    Raises:
        ModelError: The architecture predicts noise, and the scheduler does not know how much there is at each step.
    """
    architecture = architecture_named(class_name)
    alphas = constants.get("alphas_cumprod")
    if architecture.process is Process.NOISE and alphas is None:
        raise ModelError(
            f"{class_name} predicts noise, and the pipeline's scheduler has no alphas_cumprod to add it by. Fix: use the "
            "pipeline's own scheduler, or data.learn_from: sampling_path."
        )
    process = NoiseProcess(
        process=architecture.process,
        time=architecture.time,
        timesteps=architecture.timesteps if sampler.timesteps == "auto" else sampler.timesteps,
        shift=sampler.timestep_shift,
        time_factor=float(constants["time_factor"]),
        sampler_sigmas=(),
        alphas_cumprod=alphas if architecture.process is Process.NOISE else None,
    )
    return dataclasses.replace(process, sampler_sigmas=tuple(process.sigma_of(constants["times"]).tolist()))
