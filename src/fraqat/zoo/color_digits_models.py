"""The untrained colour-digits pipelines: sizes live here, training elsewhere.

Every part is of the class that the large model uses, so that a pipeline loads and samples with diffusers alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from fraqat.zoo.text_models import (
    WIDTH,
    build_clip,
    build_clip_tokenizer,
    build_gemma,
    build_gemma_tokenizer,
    build_t5,
    build_t5_tokenizer,
)

LATENT_CHANNELS = 8
LATENT_SIZE = 8

_HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 32}


def build_sana() -> SanaPipeline:
    """Builds the Sana pipeline: deep-compression autoencoder, Gemma-2, linear attention, flow matching.

    The sampler is Sana's: DPM-Solver++ of order 2 on flow sigmas, shifted towards noise by 3.

    Returns:
        The pipeline, randomly initialised from the global generator.
    """
    autoencoder = build_dc_autoencoder()
    tokenizer = build_gemma_tokenizer()
    text_encoder = build_gemma(tokenizer)
    transformer = SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=3,
        num_cross_attention_heads=6,
        cross_attention_head_dim=32,
        cross_attention_dim=192,
        caption_channels=WIDTH,
        mlp_ratio=2.0,
        sample_size=LATENT_SIZE,
        patch_size=1,
        interpolation_scale=1,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    return SanaPipeline(tokenizer, text_encoder, autoencoder, transformer, scheduler)


def build_sd3() -> StableDiffusion3Pipeline:
    """Builds the Stable Diffusion 3 pipeline with the traits of SD3.5-Medium: normed queries and keys, dual attention.

    Returns:
        The pipeline, randomly initialised from the global generator.
    """
    autoencoder = build_kl_autoencoder()
    tokenizers: tuple[Any, ...] = build_clip_tokenizer(), build_clip_tokenizer(), build_t5_tokenizer()
    text_encoders: tuple[Any, ...] = (
        build_clip(tokenizers[0], WIDTH // 2, projection=True),
        build_clip(tokenizers[1], WIDTH // 2, projection=True),
        build_t5(tokenizers[2]),
    )
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        joint_attention_dim=WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **_HEADS,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=text_encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=text_encoders[2],
        tokenizer_3=tokenizers[2],
    )


def build_pixart() -> PixArtSigmaPipeline:
    """Builds the PixArt-Sigma pipeline: T5, cross-attention, learned variance; it predicts velocity (see `objectives`).

    Returns:
        The pipeline, randomly initialised from the global generator.
    """
    autoencoder = build_kl_autoencoder()
    autoencoder.register_to_config(shift_factor=None)  # this pipeline scales latents and does not shift them
    tokenizer: Any = build_t5_tokenizer()
    text_encoder = build_t5(tokenizer)
    transformer = PixArtTransformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=5,
        cross_attention_dim=128,
        caption_channels=WIDTH,
        **_HEADS,
    )
    scheduler: Any = DPMSolverMultistepScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        solver_order=2,
        prediction_type="v_prediction",
    )
    return PixArtSigmaPipeline(tokenizer, text_encoder, autoencoder, transformer, scheduler)


def build_flux() -> FluxPipeline:
    """Builds the FLUX pipeline as schnell has it: packed latents, no guidance embedding, plain Euler steps.

    Returns:
        The pipeline, randomly initialised from the global generator.
    """
    autoencoder = build_kl_autoencoder()
    tokenizer: Any = build_clip_tokenizer()
    tokenizer_2 = build_t5_tokenizer()
    text_encoder: Any = build_clip(tokenizer, WIDTH, projection=False)
    text_encoder_2 = build_t5(tokenizer_2)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=3,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
        **_HEADS,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def build_dc_autoencoder() -> AutoencoderDC:
    """Builds the untrained deep-compression autoencoder: 32x32 pixels to 8x8 latents of 8 channels.

    Returns:
        The autoencoder, randomly initialised from the global generator, with scaling factor 1.
    """
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(32, 64, 64),
        decoder_block_out_channels=(32, 64, 64),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )


def build_kl_autoencoder() -> AutoencoderKL:
    """Builds the untrained variational autoencoder: 32x32 pixels to 8x8 latents of 8 channels.

    Returns:
        The autoencoder, randomly initialised from the global generator, with scaling factor 1 and shift 0.
    """
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 48),
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_pipeline(build: Callable[[], DiffusionPipeline], seed: int) -> Any:
    """Builds a whole untrained pipeline; what its transformer predicts starts at zero.

    Args:
        build: one of the functions above.
        seed: seeds torch's global generator before the parts are initialised.

    Returns:
        The pipeline, in float32 on the CPU.
    """
    torch.manual_seed(seed)
    pipeline: Any = build()
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    torch.nn.init.zeros_(pipeline.transformer.proj_out.bias)
    return pipeline
