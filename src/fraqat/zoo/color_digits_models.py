"""The untrained parts of the colour-digits Sana pipeline: sizes live here, training elsewhere.

Every part is the class that the large Sana uses, so that the pipeline loads and samples with diffusers alone.
"""

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from fraqat.data.color_digits import COLOR_NAMES, DIGIT_NAMES

LATENT_CHANNELS = 8
LATENT_SIZE = 8
CAPTION_TOKENS = 8  # the longest caption has six: "<bos> a red seven on white"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the word-level tokenizer: one token per word of a caption, `<bos>` first, padded on the right.

    Returns:
        The tokenizer, with 23 tokens.
    """
    words = ("<pad>", "<bos>", "<unk>", "a", "on", *DIGIT_NAMES, *COLOR_NAMES)
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=300,
    )


def build_text_encoder(vocabulary_size: int) -> Gemma2Model:
    """Builds the untrained text encoder, a two-layer Gemma-2 of width 64.

    Args:
        vocabulary_size: number of tokens of the tokenizer.

    Returns:
        The encoder, randomly initialised from the global generator.
    """
    config = Gemma2Config(
        vocab_size=vocabulary_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=512,
        sliding_window=512,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        use_cache=False,
    )
    return Gemma2Model(config)


def build_autoencoder() -> AutoencoderDC:
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


def build_transformer(caption_channels: int) -> SanaTransformer2DModel:
    """Builds the untrained denoiser: three Sana blocks of width 192 with sine-cosine positions.

    Args:
        caption_channels: width of the text encoder.

    Returns:
        The transformer, randomly initialised from the global generator; its output starts at zero.
    """
    transformer = SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=3,
        num_cross_attention_heads=6,
        cross_attention_head_dim=32,
        cross_attention_dim=192,
        caption_channels=caption_channels,
        mlp_ratio=2.0,
        sample_size=LATENT_SIZE,
        patch_size=1,
        interpolation_scale=1,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_pipeline(seed: int) -> SanaPipeline:
    """Builds the whole untrained pipeline.

    Args:
        seed: seeds torch's global generator before the parts are initialised.

    Returns:
        The pipeline, in float32 on the CPU.
    """
    torch.manual_seed(seed)
    autoencoder = build_autoencoder()
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(len(tokenizer))
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder,
        transformer=build_transformer(text_encoder.config.hidden_size),
        scheduler=build_scheduler(),
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Builds the sampler that Sana uses: DPM-Solver++ of order 2 on flow sigmas, shifted towards noise by 3.

    Returns:
        The scheduler.
    """
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
