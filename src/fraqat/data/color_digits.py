"""Colour digits: small labelled pictures that a text-to-image model can be trained and judged on.

A picture is one handwritten digit in one colour on one ground colour, 32x32 pixels. The digits are the 1797
8x8 scans that scikit-learn bundles (`sklearn.datasets.load_digits`), so that nothing is downloaded. What is on
a picture can be read off it by a classifier, which turns "does the model follow its prompt" into a number.

Some combinations of digit, colour and ground are held out of training, to tell composing from remembering.

Shape suffixes: N pictures, C channels, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Split = Literal["train", "test"]

IMAGE_SIZE = 32
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 32),
    "green": (24, 150, 58),
    "blue": (28, 72, 226),
    "yellow": (252, 222, 24),
    "purple": (146, 34, 186),
    "orange": (255, 132, 12),
    "black": (12, 12, 12),
    "white": (246, 246, 246),
}
COLOR_NAMES = tuple(PALETTE)

_DIGIT_SIZE = 22  # pixels that the 8x8 scan is drawn on
_MAX_SHIFT = 3.0  # pixels of jitter to each side
_EDGE_LEVEL = 0.5  # ink of the upscaled scan where the edge of the stroke is put
_EDGE_GAIN = 3.0  # how steeply ink turns into coverage there: about one anti-aliased pixel
_TEST_SHARE = 0.2
_SPLIT_SEED = 0


@dataclass(frozen=True)
class ColorDigit:
    """What is on one picture.

    Args:
        digit: the digit, 0 to 9.
        color: the colour it is drawn in, one of `COLOR_NAMES`.
        ground: the colour behind it, one of `COLOR_NAMES` but not `color`.

    Raises:
        ValueError: when a field is outside these.
    """

    digit: int
    color: str
    ground: str

    def __post_init__(self) -> None:
        if self.digit not in range(10):
            raise ValueError(f"digit is {self.digit!r}; allowed are the integers 0 to 9. Pass one of them.")
        for field, value in (("color", self.color), ("ground", self.ground)):
            if value not in PALETTE:
                raise ValueError(f"{field} is {value!r}; allowed are {', '.join(COLOR_NAMES)}. Pass one of them.")
        if self.color == self.ground:
            raise ValueError(
                f"ground is {self.ground!r}, the same as color; the digit would not show. Pass two different colours."
            )

    @property
    def prompt(self) -> str:
        """The caption of the picture, such as "a red seven on white"."""
        return f"a {self.color} {DIGIT_NAMES[self.digit]} on {self.ground}"

    @classmethod
    def from_prompt(cls, prompt: str) -> "ColorDigit":
        """Reads a caption back.

        Args:
            prompt: a caption as `prompt` writes it.

        Returns:
            The combination that it describes.

        Raises:
            ValueError: when the caption has another form or names an unknown digit or colour.
        """
        words = prompt.split()
        if len(words) != 5 or words[0] != "a" or words[3] != "on" or words[2] not in DIGIT_NAMES:
            raise ValueError(
                f"prompt is {prompt!r}; allowed is 'a <colour> <digit> on <ground>' with the digit in words "
                f"({', '.join(DIGIT_NAMES)}). Write it as in 'a red seven on white'."
            )
        return cls(DIGIT_NAMES.index(words[2]), words[1], words[4])


def held_out_combinations() -> tuple[ColorDigit, ...]:
    """The combinations that no model of the package is trained on, in a fixed order.

    Each of the 56 pairs of colour and ground is held out for exactly one digit: a tenth of all combinations, spread
    evenly, and every digit, colour, ground and pair of them is still seen in training.

    Returns:
        56 combinations.
    """
    pairs = [(color, ground) for color in COLOR_NAMES for ground in COLOR_NAMES if color != ground]
    return tuple(ColorDigit(index % 10, color, ground) for index, (color, ground) in enumerate(pairs))


def train_combinations() -> tuple[ColorDigit, ...]:
    """The combinations that are not held out, in a fixed order.

    Returns:
        504 combinations.
    """
    held_out = set(held_out_combinations())
    everything = (
        ColorDigit(digit, color, ground)
        for digit in range(10)
        for color in COLOR_NAMES
        for ground in COLOR_NAMES
        if color != ground
    )
    return tuple(combination for combination in everything if combination not in held_out)


def compose(combinations: Sequence[ColorDigit], *, seed: int, split: Split = "train") -> Tensor:
    """Draws one picture for each combination.

    Which scan of the digit is drawn, and where, comes from a generator seeded with `seed`. Equal arguments give equal
    pictures.

    Args:
        combinations: what to draw, N entries, at least one.
        seed: seed of the generator.
        split: "train" draws from four fifths of the scans, "test" from the others.

    Returns:
        Pictures, [N, 3, 32, 32] float32 in [-1, 1].

    Raises:
        ValueError: when `combinations` is empty or `split` is unknown.
    """
    if not combinations:
        raise ValueError("combinations is empty; allowed is one entry or more. Pass what to draw.")
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; allowed are 'train' and 'test'. Pass one of them.")
    scans = _load_scans(split)
    generator = torch.Generator().manual_seed(seed)
    digit_N = torch.tensor([combination.digit for combination in combinations])
    draw_N = torch.rand(len(combinations), generator=generator, dtype=torch.float64)
    index_N = scans.start[digit_N] + (draw_N * scans.count[digit_N]).long()
    shift_N2 = (torch.rand(len(combinations), 2, generator=generator) * 2 - 1) * _MAX_SHIFT
    ink_N1HW = _draw_ink(scans.scan[index_N], shift_N2)
    color_NC11 = _rgb([combination.color for combination in combinations])
    ground_NC11 = _rgb([combination.ground for combination in combinations])
    return torch.lerp(ground_NC11, color_NC11, ink_N1HW)


def sample_training_set(num_images: int, seed: int) -> tuple[Tensor, tuple[ColorDigit, ...]]:
    """Draws pictures of combinations that are not held out, each combination about equally often.

    Args:
        num_images: how many pictures, at least 1.
        seed: seed of the order of the combinations and of the pictures.

    Returns:
        The pictures, [num_images, 3, 32, 32] float32 in [-1, 1], and what is on each.

    Raises:
        ValueError: when `num_images` is below 1.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; allowed is 1 or more. Ask for at least one picture.")
    allowed = train_combinations()
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-num_images // len(allowed))
    order = torch.cat([torch.randperm(len(allowed), generator=generator) for _ in range(rounds)])[:num_images]
    combinations = tuple(allowed[index] for index in order.tolist())
    return compose(combinations, seed=seed), combinations


@dataclass(frozen=True)
class _Scans:
    """Scans of one split, ordered by digit: those of digit d are `start[d]` to `start[d] + count[d]`."""

    scan: Tensor  # [N, 1, 8, 8] in [0, 1]
    start: Tensor
    count: Tensor


@lru_cache(maxsize=2)
def _load_scans(split: Split) -> _Scans:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, digits = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(digits)), test_size=_TEST_SHARE, stratify=digits, random_state=_SPLIT_SEED
    )
    chosen = train if split == "train" else test
    chosen = chosen[np.argsort(digits[chosen], kind="stable")]
    count = torch.from_numpy(np.bincount(digits[chosen], minlength=10))
    scan_N1HW = torch.from_numpy(scans[chosen].astype(np.float32) / 16).view(-1, 1, 8, 8)
    return _Scans(scan_N1HW, torch.cumsum(count, 0) - count, count)


def _draw_ink(scan_N1HW: Tensor, shift_N2: Tensor) -> Tensor:
    """Enlarges 8x8 scans to coverage in [0, 1] on the full picture, [N, 1, 32, 32], shifted by (x, y) pixels."""
    half = _DIGIT_SIZE / 2
    theta_N23 = torch.zeros(len(scan_N1HW), 2, 3)
    theta_N23[:, 0, 0] = theta_N23[:, 1, 1] = IMAGE_SIZE / 2 / half
    theta_N23[:, :, 2] = -shift_N2 / half
    grid = F.affine_grid(theta_N23, [len(scan_N1HW), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    smooth = F.grid_sample(scan_N1HW, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return ((smooth - _EDGE_LEVEL) * _EDGE_GAIN + 0.5).clamp(0, 1)


def _rgb(names: Sequence[str]) -> Tensor:
    """Colours as [N, 3, 1, 1] in [-1, 1]."""
    index = torch.tensor([COLOR_NAMES.index(name) for name in names])
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float32) / 127.5 - 1
    return palette[index].view(-1, 3, 1, 1)
