"""Makes a colour-digits pipeline of the zoo, from nothing.

    python -m fraqat.zoo.train_color_digits --architecture sd3 --work DIR --out DIR

trains the autoencoder, then denoiser and text encoders, writes the pipeline folder, measures it and writes its card.
The same command resumes: what `--work` already holds is not trained again. Architectures with the same kind of
autoencoder share it when they share `--work`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from fraqat.data.color_digits import compose, held_out_combinations, sample_training_set
from fraqat.zoo.architectures import ARCHITECTURES, Architecture, Pipeline
from fraqat.zoo.autoencoder_training import AutoencoderResult, encode, train_autoencoder
from fraqat.zoo.color_digits_models import build_pipeline
from fraqat.zoo.locate import zoo_path
from fraqat.zoo.model_card import TrainingRecord, write_card
from fraqat.zoo.objectives import FlowMatching
from fraqat.zoo.quality import measure_folder
from fraqat.zoo.reflow import teacher_pairs
from fraqat.zoo.transformer_training import CaptionedLatents, TransformerResult, TransformerSettings, train_transformer

SEED = 0
NUM_AUTOENCODER_IMAGES = 20_000
NUM_LATENTS = 32_000


def train(name: str, work: Path, *, compiled: bool = False) -> tuple[Pipeline, TrainingRecord]:
    """Trains a pipeline, or takes up a training where it was left.

    Args:
        name: the architecture, a key of `ARCHITECTURES`.
        work: folder of the checkpoints; made when missing.
        compiled: whether to compile the transformer first, which takes minutes, and a third off every step.

    Returns:
        The trained pipeline and what its trainings came to.
    """
    work.mkdir(parents=True, exist_ok=True)
    architecture = ARCHITECTURES[name]
    pipeline = build_pipeline(architecture.build, SEED)
    if compiled:
        pipeline.transformer.compile()
    autoencoder_result = _trained_autoencoder(architecture, pipeline, work)
    images, combinations = sample_training_set(NUM_LATENTS, seed=SEED + 1)
    latents = encode(pipeline.vae, images)
    prompts = [combination.prompt for combination in combinations]
    print(f"{len(latents)} latents, standard deviation {latents.std().item():.3f}", flush=True)
    settings = TransformerSettings(
        architecture.num_steps, architecture.num_text_steps, architecture.batch_size, seed=SEED
    )
    data, objective = CaptionedLatents(latents, prompts), architecture.objective(pipeline)
    result = train_transformer(architecture, pipeline, data, objective, settings, work / f"{name}.pt")
    distilled = _distil(architecture, pipeline, work, name)
    return pipeline, TrainingRecord(autoencoder_result, result, distilled)


def _trained_autoencoder(architecture: Architecture, pipeline: Pipeline, work: Path) -> AutoencoderResult:
    """Trains the pipeline's autoencoder, or loads it where an earlier run has left it."""
    kind = "kl" if isinstance(pipeline.vae, AutoencoderKL) else "dc"
    folder = work / f"autoencoder-{kind}"
    record = folder / "training.json"
    if not record.exists():
        images, _ = sample_training_set(NUM_AUTOENCODER_IMAGES, seed=SEED)
        test_images = compose(held_out_combinations() * 4, seed=SEED + 1, split="test")
        steps, batch_size = architecture.autoencoder_steps, architecture.autoencoder_batch_size
        result = train_autoencoder(pipeline.vae, images, test_images, num_steps=steps, batch_size=batch_size, seed=SEED)
        pipeline.vae.save_pretrained(folder)
        record.write_text(json.dumps(asdict(result)))
    saved: Any = type(pipeline.vae).from_pretrained(folder)
    pipeline.vae.load_state_dict(saved.state_dict())
    pipeline.vae.register_to_config(scaling_factor=saved.config.scaling_factor)
    if architecture.shifts_latents:
        pipeline.vae.register_to_config(shift_factor=saved.config.shift_factor)
    return AutoencoderResult(**json.loads(record.read_text()))


def _distil(architecture: Architecture, pipeline: Pipeline, work: Path, name: str) -> TransformerResult | None:
    """Turns the trained pipeline into its own few-step student, where the table says so."""
    settings = architecture.distillation
    if settings is None:
        return None
    _, combinations = sample_training_set(settings.num_pairs, seed=SEED + 2)
    prompts = [combination.prompt for combination in combinations]
    pairs = work / f"{name}-pairs.safetensors"
    noise, latents = teacher_pairs(architecture, pipeline, prompts, settings, SEED + 3, pairs)
    return train_transformer(
        architecture,
        pipeline,
        CaptionedLatents(latents, prompts, noise),
        FlowMatching(sampler_sigmas=settings.sampler_sigmas),
        TransformerSettings(
            settings.num_steps,
            num_text_steps=0,
            batch_size=architecture.batch_size,
            learning_rate=settings.learning_rate,
            caption_dropout=0.0,
            seed=SEED + 4,
        ),
        work / f"{name}-distilled.pt",
    )


def write_pipeline(pipeline: Pipeline, folder: Path) -> None:
    """Writes the pipeline folder, with the weights of autoencoder and transformer rounded to bfloat16.

    The text encoders stay in float32: transformers loads weights in the type that they are stored in, diffusers in
    float32.

    Args:
        pipeline: what to write; its parts are rounded in place.
        folder: where to; made when missing.
    """
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer"):
            part.backend_tokenizer.no_padding()  # padding of the last call would be stored too
            part.backend_tokenizer.no_truncation()
    pipeline.vae.bfloat16()
    pipeline.transformer.bfloat16()
    pipeline.save_pretrained(folder, safe_serialization=True)


def main() -> None:
    """Trains, writes, measures and describes the pipeline."""
    parser = argparse.ArgumentParser(description="Make a colour-digits pipeline.")
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), required=True, help="which one")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints, to resume from")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--compile", action="store_true", help="compile the transformer; needs a C++ compiler")
    parser.add_argument("--classifier", type=Path, help="folder of the judge; default: the zoo's")
    parser.add_argument("--num-images", type=int, default=1120, help="pictures for each figure of the card")
    arguments = parser.parse_args()
    name, out = arguments.architecture, arguments.out
    pipeline, record = train(name, arguments.work, compiled=arguments.compile)
    write_pipeline(pipeline, out)
    classifier = arguments.classifier or zoo_path("color-digits-classifier")
    quality = measure_folder(ARCHITECTURES[name], out, classifier, arguments.num_images)
    judge_quality = json.loads((classifier / "quality.json").read_text())
    card = write_card(name, pipeline, record, quality, judge_quality)
    (out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
