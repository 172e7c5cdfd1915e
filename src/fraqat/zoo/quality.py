"""Measures a colour-digits pipeline: does what it draws match its prompts?

    python -m fraqat.zoo.quality --architecture sd3 --pipeline DIR --classifier DIR

prints the figures and writes them to `quality.json` in the pipeline's folder.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fraqat.data.color_digits import COLOR_NAMES, ColorDigit, held_out_combinations, train_combinations
from fraqat.evaluation.classifier import ColorDigitClassifier, load_classifier
from fraqat.zoo.architectures import ARCHITECTURES, Architecture, Pipeline, SamplerSettings

QUALITY_NAME = "quality.json"


@dataclass(frozen=True)
class Quality:
    """How well pictures match their prompts, judged by the classifier.

    Args:
        num_images: pictures judged.
        num_steps: denoising steps.
        guidance_scale: weight of classifier-free guidance.
        digit: share of right digits, in [0, 1].
        color: share of right digit colours.
        ground: share of right grounds.
        all_three: share of pictures with all three right.
    """

    num_images: int
    num_steps: int
    guidance_scale: float
    digit: float
    color: float
    ground: float
    all_three: float


@torch.no_grad()
def sample(
    architecture: Architecture,
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: SamplerSettings,
    batch_size: int = 64,
) -> Tensor:
    """Samples one picture for each prompt.

    Args:
        architecture: the pipeline's row of the table.
        pipeline: the pipeline.
        prompts: N prompts.
        settings: how to sample.
        batch_size: pictures at a time; it does not change the noise that a picture starts from.

    Returns:
        Pictures, [N, 3, 32, 32] float32 in [-1, 1].
    """
    noise = architecture.initial_noise(len(prompts), settings.seed)
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = pipeline(
            prompt=list(prompts[start : start + batch_size]),
            latents=noise[start : start + batch_size],
            num_inference_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            output_type="pt",
            **architecture.arguments,
        )
        parts.append(part.images.float() * 2 - 1)
    return torch.cat(parts)


@torch.no_grad()
def judge(classifier: ColorDigitClassifier, images: Tensor, combinations: Sequence[ColorDigit]) -> dict[str, float]:
    """Compares pictures with what they should show.

    Args:
        classifier: the judge.
        images: [N, 3, 32, 32] in [-1, 1].
        combinations: what each picture should show, N entries.

    Returns:
        Shares in [0, 1]: "digit", "color", "ground" and "all_three".
    """
    logits = classifier(images)
    right = {
        "digit": logits.digit.argmax(1) == torch.tensor([item.digit for item in combinations]),
        "color": logits.color.argmax(1) == torch.tensor([COLOR_NAMES.index(item.color) for item in combinations]),
        "ground": logits.ground.argmax(1) == torch.tensor([COLOR_NAMES.index(item.ground) for item in combinations]),
    }
    right["all_three"] = right["digit"] & right["color"] & right["ground"]
    return {name: round(hits.double().mean().item(), 4) for name, hits in right.items()}


def measure(
    architecture: Architecture,
    pipeline: Pipeline,
    classifier: ColorDigitClassifier,
    combinations: Sequence[ColorDigit],
    num_images: int,
    settings: SamplerSettings,
) -> Quality:
    """Samples the prompts of combinations and judges the pictures.

    Args:
        architecture: the pipeline's row of the table.
        pipeline: the pipeline.
        classifier: the judge.
        combinations: what to sample, in turn, until there are `num_images`.
        num_images: how many pictures.
        settings: how to sample.

    Returns:
        The shares of right answers.
    """
    wanted = (list(combinations) * math.ceil(num_images / len(combinations)))[:num_images]
    images = sample(architecture, pipeline, [item.prompt for item in wanted], settings)
    shares = judge(classifier, images, wanted)
    return Quality(num_images, settings.num_steps, settings.guidance_scale, **shares)


def measure_folder(
    architecture: Architecture, pipeline_folder: Path, classifier_folder: Path, num_images: int
) -> dict[str, Quality]:
    """Measures a pipeline folder as the model card reports it, and writes `quality.json` into it.

    Args:
        architecture: the pipeline's row of the table.
        pipeline_folder: folder of the pipeline.
        classifier_folder: folder of the judge.
        num_images: pictures for each of the three figures.

    Returns:
        "held_out" and "trained" combinations with the recommended settings, and "held_out_default_call" with the
        pipeline's own steps and guidance.
    """
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    classifier = load_classifier(classifier_folder)
    held_out, trained = held_out_combinations(), train_combinations()
    runs = {
        "held_out": (held_out, architecture.sampler),
        "trained": (trained, architecture.sampler),
        "held_out_default_call": (held_out, architecture.default_call),
    }
    figures = {
        name: measure(architecture, pipeline, classifier, combinations, num_images, settings)
        for name, (combinations, settings) in runs.items()
    }
    record = {name: asdict(quality) for name, quality in figures.items()}
    (pipeline_folder / QUALITY_NAME).write_text(json.dumps(record, indent=2) + "\n")
    return figures


def main() -> None:
    """Measures a pipeline folder and prints the figures."""
    parser = argparse.ArgumentParser(description="Measure a colour-digits pipeline.")
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), required=True, help="which one it is")
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--classifier", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--num-images", type=int, default=1120, help="pictures for each figure")
    arguments = parser.parse_args()
    architecture = ARCHITECTURES[arguments.architecture]
    figures = measure_folder(architecture, arguments.pipeline, arguments.classifier, arguments.num_images)
    for name, quality in figures.items():
        print(name, json.dumps(asdict(quality)))


if __name__ == "__main__":
    main()
