"""Tiny random pipelines of every architecture of the table, made of diffusers' own classes, and how they are sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)

from fraqat.tasks import SamplerSpec
from fraqat.zoo.color_digits_models import build_flux, build_pixart, build_sana, build_sd3
from fraqat.zoo.text_models import build_gemma, build_gemma_tokenizer, build_t5, build_t5_tokenizer


def build_lumina2() -> Any:
    """Lumina-Image 2: one stream, Gemma-2, time that runs from noise 0 to image 1."""
    torch.manual_seed(0)
    tokenizer = build_gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(64, 16, 16),
        cap_feat_dim=64,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        shift_factor=0.1,
        scaling_factor=0.5,
    )
    return Lumina2Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, build_gemma(tokenizer), tokenizer)


def build_wan() -> Any:
    """Wan 2.1: a video model, latents with a time axis, normalised by mean and deviation of each channel."""
    torch.manual_seed(0)
    tokenizer = build_t5_tokenizer()
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    text_encoder: Any = build_t5(tokenizer)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "sana": build_sana,
    "sd3": build_sd3,
    "pixart": build_pixart,
    "flux": build_flux,
    "lumina2": build_lumina2,
    "wan": build_wan,
}
GUIDANCE = {"flux": 0.0}


def tiny_sampler(name: str, **changes: Any) -> SamplerSpec:
    """Few steps at the size of the colour digits."""
    values: dict[str, Any] = {
        "num_steps": 3,
        "guidance_scale": GUIDANCE.get(name, 4.0),
        "height": 32,
        "width": 32,
        "max_sequence_length": 40 if name == "lumina2" else 8,  # room for its system prompt
        "call_arguments": {"num_frames": 1} if name == "wan" else {},
    }
    return SamplerSpec(**{**values, **changes})
