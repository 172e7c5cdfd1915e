"""A small classifier that reads digit, colour and ground off a colour-digits picture.

It shares nothing with the models that it judges. Its penultimate features serve as the space of a Frechet distance.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from fraqat.evaluation.judge_files import read_judge, save_judge

NUM_FEATURES = 64


class ColorDigitLogits(NamedTuple):
    """Scores of the three heads.

    Args:
        digit: [N, 10].
        color: colour of the digit, [N, number of colours].
        ground: colour behind it, [N, number of colours].
    """

    digit: Tensor
    color: Tensor
    ground: Tensor


class ColorDigitClassifier(nn.Module):
    """Four convolutions, one hidden layer and three heads.

    Args:
        color_names: the colours in the order of the scores of both colour heads.
    """

    def __init__(self, color_names: tuple[str, ...]) -> None:
        super().__init__()
        self.color_names = tuple(color_names)
        self.trunk = nn.Sequential(
            *_stage(3, 24, stride=1),
            *_stage(24, 32, stride=2),
            *_stage(32, 48, stride=2),
            *_stage(48, 64, stride=2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, NUM_FEATURES),
            nn.GELU(),
        )
        self.digit_head = nn.Linear(NUM_FEATURES, 10)
        self.color_head = nn.Linear(NUM_FEATURES, len(self.color_names))
        self.ground_head = nn.Linear(NUM_FEATURES, len(self.color_names))

    def features(self, images: Tensor) -> Tensor:
        """Computes the penultimate features.

        Args:
            images: [N, 3, 32, 32] in [-1, 1].

        Returns:
            Features, [N, 64].
        """
        return self.trunk(images)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Computes the outputs of the four convolution stages.

        Args:
            images: [N, 3, 32, 32] in [-1, 1].

        Returns:
            [N, 24, 32, 32], [N, 32, 16, 16], [N, 48, 8, 8] and [N, 64, 4, 4].
        """
        outputs, x = [], images
        for module in self.trunk:
            if isinstance(module, nn.Flatten):
                break
            x = module(x)
            if isinstance(module, nn.GELU):
                outputs.append(x)
        return outputs

    def forward(self, images: Tensor) -> ColorDigitLogits:
        """Scores digit, colour and ground.

        Args:
            images: [N, 3, 32, 32] in [-1, 1].

        Returns:
            Scores of the three heads.
        """
        features = self.features(images)
        return ColorDigitLogits(self.digit_head(features), self.color_head(features), self.ground_head(features))


def _stage(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.GELU(),
    )


def save_classifier(classifier: ColorDigitClassifier, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` (weights in half precision).

    Args:
        classifier: what to write.
        folder: where to; made when missing.
    """
    save_judge(classifier, {"color_names": classifier.color_names}, folder)


def load_classifier(folder: Path | str) -> ColorDigitClassifier:
    """Loads a classifier.

    Args:
        folder: folder that `save_classifier` wrote.

    Returns:
        The classifier in evaluation mode, float32 on the CPU.

    Raises:
        ValueError: when the folder or one of its two files is missing.
    """
    config, weights = read_judge(
        Path(folder), "Pass a folder that save_classifier wrote, or zoo_path('color-digits-classifier')."
    )
    classifier = ColorDigitClassifier(tuple(config["color_names"]))
    classifier.load_state_dict(weights)  # copies half precision into float32
    return classifier.eval()
