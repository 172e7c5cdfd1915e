"""Makes the classifier of the zoo, which judges colour-digits pictures.

python -m fraqat.zoo.train_classifier --out DIR
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fraqat.data.color_digits import COLOR_NAMES, ColorDigit, Split, compose, held_out_combinations, train_combinations
from fraqat.evaluation.classifier import ColorDigitClassifier, load_classifier, save_classifier

_MAX_TURN = 0.14  # radians
_MAX_ZOOM = 0.1
_MAX_SHIFT = 0.08  # of half the picture


def sample_labelled(num_images: int, seed: int, split: Split) -> tuple[Tensor, Tensor]:
    """Draws pictures of all combinations, held out or not: a judge must know them all.

    Args:
        num_images: how many.
        seed: seed of combinations and pictures.
        split: which scans to draw.

    Returns:
        Pictures, [N, 3, 32, 32], and labels (digit, colour, ground), [N, 3].
    """
    everything = train_combinations() + held_out_combinations()
    chosen = torch.randint(len(everything), (num_images,), generator=torch.Generator().manual_seed(seed))
    combinations = [everything[index] for index in chosen.tolist()]
    return compose(combinations, seed=seed, split=split), labels(combinations)


def labels(combinations: list[ColorDigit]) -> Tensor:
    """Turns combinations into labels.

    Args:
        combinations: N entries.

    Returns:
        Digit, colour and ground as indices, [N, 3].
    """
    rows = [(item.digit, COLOR_NAMES.index(item.color), COLOR_NAMES.index(item.ground)) for item in combinations]
    return torch.tensor(rows)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turns, zooms, shifts, blurs, dims and adds noise, all slightly.

    Args:
        images: [N, 3, 32, 32] in [-1, 1].
        generator: source of randomness.

    Returns:
        Pictures of the same shape.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    num = len(images)
    turn, zoom = uniform(num) * _MAX_TURN, 1 + uniform(num) * _MAX_ZOOM
    theta = torch.stack([turn.cos() * zoom, -turn.sin(), turn.sin(), turn.cos() * zoom], dim=1).view(num, 2, 2)
    theta = torch.cat([theta, uniform(num, 2, 1) * _MAX_SHIFT], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, uniform(num, 1, 1, 1).clamp(min=0) * 0.8)
    images = images * (1 + uniform(num, 1, 1, 1) * 0.1) + uniform(num, 3, 1, 1) * 0.06
    noise = torch.randn(images.shape, generator=generator) * uniform(num, 1, 1, 1).clamp(min=0) * 0.12
    return (images + noise).clamp(-1, 1)


def train_classifier(num_steps: int, seed: int) -> ColorDigitClassifier:
    """Trains a classifier on pictures of the training scans.

    Args:
        num_steps: optimiser steps of 128 pictures.
        seed: seed of weights, pictures and augmentation.

    Returns:
        The classifier, in evaluation mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = ColorDigitClassifier(COLOR_NAMES)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=num_steps, pct_start=0.15)
    images, truth = sample_labelled(30_000, seed, "train")
    for step in range(1, num_steps + 1):
        chosen = torch.randint(len(images), (128,), generator=generator)
        logits = classifier(augment(images[chosen], generator))
        pairs = zip(logits, truth[chosen].unbind(1), strict=True)
        loss = sum((F.cross_entropy(scores, label, label_smoothing=0.02) for scores, label in pairs), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier step {step}/{num_steps} loss {loss.item():.4f}", flush=True)
    return classifier.eval()


@torch.no_grad()
def measure_classifier(classifier: ColorDigitClassifier, num_images: int, seed: int) -> dict[str, float]:
    """Measures accuracy on pictures of the test scans.

    Args:
        classifier: what to measure.
        num_images: how many pictures.
        seed: seed of the pictures.

    Returns:
        Share of right answers in [0, 1] for "digit", "color" and "ground".
    """
    images, truth = sample_labelled(num_images, seed, "test")
    parts = [classifier(part) for part in images.split(1000)]
    scores = {head: torch.cat([getattr(part, head) for part in parts]) for head in ("digit", "color", "ground")}
    right = {head: score.argmax(1) == truth[:, column] for column, (head, score) in enumerate(scores.items())}
    return {head: round(hits.double().mean().item(), 4) for head, hits in right.items()}


def main() -> None:
    """Trains, writes and measures the classifier."""
    parser = argparse.ArgumentParser(description="Make the colour-digits classifier.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps of 128 pictures")
    arguments = parser.parse_args()
    start = time.monotonic()
    save_classifier(train_classifier(arguments.steps, seed=0), arguments.out)
    accuracy = measure_classifier(load_classifier(arguments.out), num_images=10_000, seed=1)
    record = {
        "num_steps": arguments.steps,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "num_images": 10_000,
        **accuracy,
    }
    (arguments.out / "quality.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
