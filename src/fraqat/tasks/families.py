"""What differs between diffusion transformers, as a table: one entry per transformer class of diffusers.

Everything else is found out by watching the pipeline run (see `fraqat.tasks.conditioning`), so an entry is a few lines:
docs/add_an_architecture.md shows how to write and test one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from fraqat.errors import ModelError
from fraqat.nn import LayerFamilies, LayerRule
from fraqat.tasks.layer_patterns import exceptions, named_families

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps of the training process of every pipeline here: flow matching's sigma = 1 is timestep 1000."""


class Process(StrEnum):
    """How noise is added, which fixes what the transformer predicts.

    Attributes:
        FLOW: x = (1 - sigma) image + sigma noise; the velocity, noise - image, is predicted.
        NOISE: x = sqrt(a_t) image + sqrt(1 - a_t) noise with the scheduler's cumulative product a_t; the noise is predicted.
    """

    FLOW = "flow"
    NOISE = "noise"


class TimeScale(StrEnum):
    """What the transformer is given as the time of noise level sigma.

    Attributes:
        THOUSAND: 1000 sigma.
        SIGMA: sigma.
        REVERSED: 1 - sigma.
    """

    THOUSAND = "thousand"
    SIGMA = "sigma"
    REVERSED = "reversed"


class Guidance(StrEnum):
    """How the pipeline is guided.

    Attributes:
        CLASSIFIER_FREE: A second prediction for the empty prompt; scale 1 is none.
        DISTILLED: In the weights, or an input of the transformer; one prediction per step.
    """

    CLASSIFIER_FREE = "classifier_free"
    DISTILLED = "distilled"


@dataclass(frozen=True)
class Architecture:
    """One diffusion transformer.

    Args:
        last_layers: The output layers as patterns; their inputs stay at 16 bits (the paper's W4A16 last layer) unless the
            recipe says otherwise.
        skipped: Patterns of layers that stay in floating point unless the recipe says otherwise.
        families: Layer families FF, Attn and TF; the default covers the usual names.
        process: How noise is added in training on images.
        time: What the transformer takes as time.
        guidance: How the pipeline is guided.
        packs_latents: Whether the pipeline turns 2x2 squares of latents into one token (FLUX).
        timesteps: Default distribution of noise levels in training: `uniform`, `logit_normal` or `sampler`, the levels of
            the sampler's own steps.
    """

    last_layers: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    families: LayerFamilies = field(default_factory=LayerFamilies)
    process: Process = Process.FLOW
    time: TimeScale = TimeScale.THOUSAND
    guidance: Guidance = Guidance.CLASSIFIER_FREE
    packs_latents: bool = False
    timesteps: str = "logit_normal"

    def default_rules(self) -> tuple[LayerRule, ...]:
        """The table's exceptions as rules, to be put before the recipe's own."""
        return exceptions(self.last_layers, self.skipped)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "SanaTransformer2DModel": Architecture(
            last_layers=("proj_out",),
            families=named_families(
                FF=("transformer_blocks.*.ff.*",),
                Attn=("transformer_blocks.*.attn1.*", "transformer_blocks.*.attn2.*"),
                TF=("transformer_blocks.*",),
            ),
            timesteps="uniform",
        ),
        "SD3Transformer2DModel": Architecture(last_layers=("proj_out",)),
        "PixArtTransformer2DModel": Architecture(last_layers=("proj_out",), process=Process.NOISE, timesteps="uniform"),
        "FluxTransformer2DModel": Architecture(
            last_layers=("proj_out",),
            families=named_families(
                FF=("*.ff.*", "*.ff_context.*", "*.proj_mlp", "single_transformer_blocks.*.proj_out"),
                Attn=("*.attn.*",),
                TF=("transformer_blocks.*", "single_transformer_blocks.*"),
            ),
            time=TimeScale.SIGMA,
            guidance=Guidance.DISTILLED,
            packs_latents=True,
            timesteps="sampler",
        ),
        "Lumina2Transformer2DModel": Architecture(last_layers=("norm_out.linear_2",), time=TimeScale.REVERSED),
        "WanTransformer3DModel": Architecture(last_layers=("proj_out",)),
    }
)


def architecture_of(transformer: object) -> Architecture:
    """The table's entry for a transformer.

    Raises:
        ModelError: Its class has no entry yet.
    """
    return architecture_named(type(transformer).__name__)


def architecture_named(class_name: str) -> Architecture:
    """The table's entry for a transformer class; see `architecture_of`."""
    if class_name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"transformer class {class_name} has no entry in the table of architectures: allowed is {known}. Fix: add "
            f'"{class_name}": Architecture(last_layers=(...,)) to ARCHITECTURES in fraqat/tasks/families.py, with the name of '
            "its output layer, its process and its time scale; docs/add_an_architecture.md shows how to find them."
        )
    return ARCHITECTURES[class_name]
