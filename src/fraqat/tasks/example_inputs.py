"""Inputs of a diffusion transformer from its configuration alone: right shapes, no values. For plans and dry runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.distill import Batch, Prediction
from fraqat.errors import ModelError
from fraqat.tasks.conditioning import LATENTS
from fraqat.tasks.diffusion import OUTPUT, predict_output
from fraqat.tasks.families import architecture_named
from fraqat.tasks.guided import GUIDED_BY, guided_output, with_and_without_prompt
from fraqat.tasks.known import KnownModel
from fraqat.tasks.spec import SamplerSpec

_TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "cap_feat_dim", "text_dim", "cross_attention_dim")
_PACKED_CHANNELS = 4  # of 2x2 latents in one token
_ID_AXES = 3


def example_inputs(
    transformer: nn.Module, known: KnownModel, sampler: SamplerSpec, num: int, device: torch.device | str = "meta"
) -> dict[str, Tensor]:
    """What a pipeline would call its transformer with, by dotted name as `fraqat.tasks.conditioning` records it.

    Args:
        transformer: Of a class in the table of architectures.
        known: Its configuration, and the pipeline's latent size.
        sampler: Size of the pictures and length of the prompts.
        num: Samples.
        device: Where the tensors are made; on `meta` they need no memory.

    Raises:
        ModelError: The configuration does not say how wide text or latents are.
    """
    config = known.config
    accepted = inspect.signature(transformer.forward).parameters
    num_tokens = _text_length(known, sampler)
    shape, num_places = _latent_shape(known, sampler, num)
    width = _first(config, _TEXT_WIDTHS)
    if width is None:
        raise ModelError(
            f"{known.class_name}: the configuration has none of {', '.join(_TEXT_WIDTHS)}, the width of the text. Fix: add its "
            "name to _TEXT_WIDTHS in fraqat/tasks/example_inputs.py."
        )
    inputs = {
        "hidden_states": torch.zeros(shape, device=device),
        "timestep": torch.zeros(num, device=device),
        "encoder_hidden_states": torch.zeros(num, num_tokens, width, device=device),
    }
    if "encoder_attention_mask" in accepted and "pooled_projections" not in accepted:
        inputs["encoder_attention_mask"] = torch.ones(num, num_tokens, dtype=torch.int64, device=device)
    if "pooled_projections" in accepted:
        inputs["pooled_projections"] = torch.zeros(num, int(config["pooled_projection_dim"]), device=device)
    if "img_ids" in accepted:
        inputs["img_ids"] = torch.zeros(num_places, _ID_AXES, device=device)
        inputs["txt_ids"] = torch.zeros(num_tokens, _ID_AXES, device=device)
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.zeros(num, device=device)
    if _uses_sizes(config):
        inputs["added_cond_kwargs.resolution"] = torch.zeros(num, 2, device=device)
        inputs["added_cond_kwargs.aspect_ratio"] = torch.zeros(num, 1, device=device)
    return inputs


def example_pairs(inputs: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Inputs of a part of a batch whose samples are learned as guided, for `predict_example`.

    Args:
        inputs: Of `example_inputs`, N samples.
        scale: Of guidance.
    """
    num, device = len(inputs[LATENTS]), inputs[LATENTS].device
    return {**inputs, GUIDED_BY: torch.full((num,), scale, device=device)}


def predict_example(model: nn.Module, inputs: Batch) -> Prediction:
    """`output` of a transformer for `example_inputs`, or for `example_pairs` as `DiffusionTask.predict` makes it."""
    arguments = {name: value for name, value in inputs.items() if name != GUIDED_BY}
    if GUIDED_BY not in inputs:
        return predict_output(model, arguments)
    # without a prompt the arguments have the same shapes; none of a transformer that is guided so is shared by all rows
    both = with_and_without_prompt(arguments, {}, frozenset())
    return {OUTPUT: guided_output(predict_output(model, both)[OUTPUT], inputs[GUIDED_BY])}


def _latent_shape(known: KnownModel, sampler: SamplerSpec, num: int) -> tuple[tuple[int, ...], int]:
    """Shape of the latents that the transformer takes, and tokens where they are packed."""
    if known.vae_scale_factor is None:
        raise ModelError(
            f"{known.source} does not say how its autoencoder scales pictures. Fix: pass a whole pipeline."
        )
    height, width = (side // known.vae_scale_factor for side in (sampler.height, sampler.width))
    channels = int(known.config["in_channels"])
    if architecture_named(known.class_name).packs_latents:
        places = height * width // _PACKED_CHANNELS
        return (num, places, channels), places
    if "3D" in known.class_name:
        return (num, channels, 1, height, width), height * width
    return (num, channels, height, width), height * width


def _text_length(known: KnownModel, sampler: SamplerSpec) -> int:
    """Tokens of text: the sampler's, after those of CLIP where SD3 joins both."""
    if known.class_name != "SD3Transformer2DModel":
        return sampler.max_sequence_length
    path = Path(known.source) / "tokenizer" / "tokenizer_config.json"
    values: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return sampler.max_sequence_length + int(values.get("model_max_length", 77))


def _uses_sizes(config: Mapping[str, Any]) -> bool:
    """PixArt's condition on resolution and aspect ratio; by default its 1024 pixel model has it."""
    given = config.get("use_additional_conditions")
    return (
        bool(given)
        if given is not None
        else "caption_channels" in config
        and config.get("sample_size") == 128
        and (config.get("_class_name") == "PixArtTransformer2DModel")
    )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((cast(int, config[name]) for name in names if config.get(name) is not None), None)
