"""Settings of the tasks. Light to import: diffusers is loaded only where a model is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fraqat.errors import config_error
from fraqat.nn import STRICT_KEYS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """Which pre-trained model: a diffusers pipeline, or a model of transformers.

    Args:
        source: Folder, hub id, or `zoo:NAME` for a model that comes with the package.
        revision, variant: Of a hub id.
        teacher_dtype: Precision of the teacher's weights. The student's master weights are always float32.
        encoder_dtype: Precision of text encoders and autoencoder.
        single_file: A checkpoint of the transformer alone in one .safetensors file, as other programs write it, in place of
            the transformer of `source`.
        device: Where models run: `auto` is the GPU if there is one, else the CPU.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    source: str
    revision: str | None = None
    variant: str | None = None
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    single_file: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise config_error(
                "model.device", "cuda", allowed="cpu or auto on this machine, which has no GPU", fix="use auto"
            )

    @property
    def torch_device(self) -> torch.device:
        """`device` for torch."""
        has_gpu = torch.cuda.is_available()
        return torch.device("cuda" if self.device == "cuda" or (self.device == "auto" and has_gpu) else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """`teacher_dtype` for torch."""
        return _DTYPES[self.teacher_dtype]

    @property
    def torch_encoder_dtype(self) -> torch.dtype:
        """`encoder_dtype` for torch."""
        return _DTYPES[self.encoder_dtype]


@dataclass(frozen=True)
class SamplerSpec:
    """How images are sampled.

    Args:
        num_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance, where 1 is none; a guidance-distilled model takes it as it is (FLUX.1
            schnell: 0).
        height, width: Pixels.
        max_sequence_length: Tokens that a prompt is padded or cut to.
        timesteps: Distribution of the noise level sigma in training: `uniform` on (0, 1), `logit_normal` (0, 1), `sampler`
            (the levels of the sampler's own steps), or `auto`, what the table of architectures says.
        timestep_shift: Moves drawn levels towards noise: s sigma / (1 + (s - 1) sigma); 1 leaves them.
        call_arguments: Further arguments of the pipeline's call, such as `system_prompt` of Lumina2.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    num_steps: int = 20
    guidance_scale: float = 4.5
    height: int = 512
    width: int = 512
    max_sequence_length: int = 300
    timesteps: Literal["auto", "uniform", "logit_normal", "sampler"] = "auto"
    timestep_shift: float = 1.0
    call_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_steps", "height", "width", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise config_error(
                    f"sampler.{name}", getattr(self, name), allowed="1 or more", fix=f"correct sampler.{name}"
                )
        if not 0 <= self.guidance_scale < math.inf:
            raise config_error(
                "sampler.guidance_scale",
                self.guidance_scale,
                allowed="a finite number of 0 or more",
                fix="use 1 for no guidance",
            )
        if not 0 < self.timestep_shift < math.inf:
            raise config_error(
                "sampler.timestep_shift", self.timestep_shift, allowed="a positive number", fix="use 1 for no shift"
            )
