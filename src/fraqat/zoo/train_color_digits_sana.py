"""Makes the colour-digits Sana pipeline of the zoo, from nothing.

    python -m fraqat.zoo.train_color_digits_sana --work DIR --out DIR

trains the autoencoder, then denoiser and text encoder, writes the pipeline folder, measures it and writes its card.
The same command resumes: what `--work` already holds is not trained again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC, SanaPipeline

from fraqat.data.color_digits import COLOR_NAMES, compose, held_out_combinations, sample_training_set
from fraqat.zoo.autoencoder_training import AutoencoderResult, encode, train_autoencoder
from fraqat.zoo.color_digits_models import build_pipeline
from fraqat.zoo.locate import zoo_path
from fraqat.zoo.model_card import write_card
from fraqat.zoo.quality import measure_folder
from fraqat.zoo.transformer_training import TransformerResult, TransformerSettings, train_transformer

SEED = 0
NUM_AUTOENCODER_IMAGES = 20_000
NUM_AUTOENCODER_STEPS = 1500
NUM_LATENTS = 32_000
NUM_TRANSFORMER_STEPS = 4000


def train(
    work: Path, num_steps: int = NUM_TRANSFORMER_STEPS
) -> tuple[SanaPipeline, AutoencoderResult, TransformerResult]:
    """Trains the pipeline, or takes up a training where it was left.

    Args:
        work: folder of the checkpoints; made when missing.
        num_steps: optimiser steps of the denoiser.

    Returns:
        The trained pipeline and what both trainings came to.
    """
    work.mkdir(parents=True, exist_ok=True)
    pipeline = build_pipeline(SEED)
    autoencoder_result = _trained_autoencoder(pipeline, work / "autoencoder")
    images, combinations = sample_training_set(NUM_LATENTS, seed=SEED + 1)
    latents = encode(pipeline.vae, images)
    prompts = [combination.prompt for combination in combinations]
    print(f"{len(latents)} latents, standard deviation {latents.std().item():.3f}", flush=True)
    settings = TransformerSettings(num_steps=num_steps, seed=SEED)
    transformer_result = train_transformer(pipeline, latents, prompts, settings, work / "transformer.pt")
    return pipeline, autoencoder_result, transformer_result


def _trained_autoencoder(pipeline: SanaPipeline, folder: Path) -> AutoencoderResult:
    """Trains the pipeline's autoencoder, or loads it where an earlier run has left it."""
    record = folder / "training.json"
    if record.exists():
        saved = AutoencoderDC.from_pretrained(folder)
        pipeline.vae.load_state_dict(saved.state_dict())
        config: Any = saved.config
        pipeline.vae.register_to_config(scaling_factor=config.scaling_factor)
        return AutoencoderResult(**json.loads(record.read_text()))
    images, _ = sample_training_set(NUM_AUTOENCODER_IMAGES, seed=SEED)
    test_images = compose(held_out_combinations() * 4, seed=SEED + 1, split="test")
    result = train_autoencoder(
        pipeline.vae, images, test_images, num_steps=NUM_AUTOENCODER_STEPS, batch_size=64, seed=SEED
    )
    pipeline.vae.save_pretrained(folder)
    record.write_text(json.dumps(asdict(result)))
    return result


def write_pipeline(pipeline: SanaPipeline, folder: Path) -> None:
    """Writes the pipeline folder, with the weights of autoencoder and transformer rounded to bfloat16.

    The text encoder stays in float32: transformers loads weights in the type that they are stored in, diffusers in
    float32.

    Args:
        pipeline: what to write; its parts are rounded in place.
        folder: where to; made when missing.
    """
    pipeline.tokenizer.backend_tokenizer.no_padding()  # padding of the last call would be stored too
    pipeline.tokenizer.backend_tokenizer.no_truncation()
    pipeline.vae.bfloat16()
    pipeline.transformer.bfloat16()
    pipeline.save_pretrained(folder, safe_serialization=True)


def trained_parts(pipeline: SanaPipeline) -> tuple[Any, ...]:
    """Lists the parts of the pipeline that have weights.

    Args:
        pipeline: the pipeline.

    Returns:
        Autoencoder, text encoder and transformer.
    """
    return pipeline.vae, pipeline.text_encoder, pipeline.transformer


def main() -> None:
    """Trains, writes, measures and describes the pipeline."""
    parser = argparse.ArgumentParser(description="Make the colour-digits Sana pipeline.")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints, to resume from")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--classifier", type=Path, help="folder of the judge; default: the zoo's")
    parser.add_argument("--steps", type=int, default=NUM_TRANSFORMER_STEPS, help="optimiser steps of the denoiser")
    parser.add_argument("--num-images", type=int, default=1120, help="pictures for each figure of the card")
    arguments = parser.parse_args()
    pipeline, autoencoder_result, transformer_result = train(arguments.work, arguments.steps)
    write_pipeline(pipeline, arguments.out)
    classifier_folder = arguments.classifier or zoo_path("color-digits-classifier")
    card = write_card(
        autoencoder_result,
        transformer_result,
        quality=measure_folder(arguments.out, classifier_folder, arguments.num_images),
        num_parameters={type(part).__name__: part.num_parameters() for part in trained_parts(pipeline)},
        classifier_quality=json.loads((classifier_folder / "quality.json").read_text()),
        color_names=COLOR_NAMES,
    )
    (arguments.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
