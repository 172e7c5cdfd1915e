"""What differs between diffusion transformers, as a table: one entry per transformer class of diffusers.

To add an architecture, add an entry to `ARCHITECTURES` and a test that samples a tiny pipeline of its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fraqat.errors import ModelError
from fraqat.nn import LayerFamilies

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps of the flow-matching convention of diffusers: timestep = 1000 * sigma."""


@dataclass(frozen=True)
class Architecture:
    """One diffusion transformer that predicts the flow-matching velocity (noise - image).

    Args:
        families: Layer families FF, Attn and TF as name patterns.
        call_arguments: Arguments of the pipeline's call that make it sample the size asked for, from the prompt as given.
        encode_arguments: Arguments of the pipeline's `encode_prompt`.
    """

    families: LayerFamilies
    call_arguments: Mapping[str, Any] = field(default_factory=dict)
    encode_arguments: Mapping[str, Any] = field(default_factory=dict)


_PROMPT_AS_GIVEN = MappingProxyType({"complex_human_instruction": None})

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "SanaTransformer2DModel": Architecture(
            families=LayerFamilies(
                MappingProxyType(
                    {
                        "FF": ("transformer_blocks.*.ff.*",),
                        "Attn": ("transformer_blocks.*.attn1.*", "transformer_blocks.*.attn2.*"),
                        "TF": ("transformer_blocks.*",),
                    }
                )
            ),
            call_arguments=MappingProxyType({"use_resolution_binning": False, **_PROMPT_AS_GIVEN}),
            encode_arguments=_PROMPT_AS_GIVEN,
        ),
    }
)


def architecture_of(transformer: object) -> Architecture:
    """The table's entry for a transformer.

    Raises:
        ModelError: Its class has no entry yet.
    """
    name = type(transformer).__name__
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"transformer class {name} is not supported yet: allowed is {known}. Fix: add an entry for {name} to "
            "ARCHITECTURES in fraqat/tasks/families.py with its layer families and call arguments."
        )
    return ARCHITECTURES[name]
