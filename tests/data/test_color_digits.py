"""Laws of the colour-digits data set."""

from collections import Counter
from itertools import product

import pytest
import torch

from fraqat.data.color_digits import (
    COLOR_NAMES,
    PALETTE,
    ColorDigit,
    _load_scans,
    compose,
    held_out_combinations,
    sample_training_set,
    train_combinations,
)

EVERYTHING = train_combinations() + held_out_combinations()


def palette_value(name: str) -> torch.Tensor:
    return torch.tensor(PALETTE[name]) / 127.5 - 1


def test_held_out_and_training_combinations_are_disjoint_and_complete() -> None:
    assert len(EVERYTHING) == len(set(EVERYTHING)) == 10 * 8 * 7
    assert len(held_out_combinations()) == 56


@pytest.mark.parametrize("combinations", [train_combinations(), held_out_combinations()], ids=["train", "held_out"])
def test_every_digit_color_and_ground_occurs(combinations: tuple[ColorDigit, ...]) -> None:
    assert {item.digit for item in combinations} == set(range(10))
    assert {item.color for item in combinations} == set(COLOR_NAMES)
    assert {item.ground for item in combinations} == set(COLOR_NAMES)


def test_every_pair_that_is_held_out_occurs_in_training_with_another_partner() -> None:
    train = train_combinations()
    for pair in ("color", "ground"):
        seen = {(item.digit, getattr(item, pair)) for item in train}
        assert seen == set(product(range(10), COLOR_NAMES))
    assert len({(item.color, item.ground) for item in train}) == 56


def test_held_out_combinations_are_spread_evenly() -> None:
    held_out = held_out_combinations()
    assert set(Counter(item.digit for item in held_out).values()) == {5, 6}
    assert set(Counter(item.color for item in held_out).values()) == {7}
    assert set(Counter(item.ground for item in held_out).values()) == {7}


def test_prompt_round_trips() -> None:
    assert ColorDigit(7, "red", "white").prompt == "a red seven on white"
    assert [ColorDigit.from_prompt(item.prompt) for item in EVERYTHING] == list(EVERYTHING)


@pytest.mark.parametrize(
    "prompt", ["", "red seven on white", "a red seven in white", "a red eleven on white", "a red seven on white now"]
)
def test_prompt_of_another_form_raises(prompt: str) -> None:
    with pytest.raises(ValueError, match="allowed is 'a <colour> <digit> on <ground>'"):
        ColorDigit.from_prompt(prompt)


def test_combination_outside_the_allowed_values_raises() -> None:
    with pytest.raises(ValueError, match="digit is 10; allowed are the integers 0 to 9"):
        ColorDigit(10, "red", "white")
    with pytest.raises(ValueError, match="color is 'pink'; allowed are red, green"):
        ColorDigit(1, "pink", "white")
    with pytest.raises(ValueError, match="ground is 'grey'; allowed are red, green"):
        ColorDigit.from_prompt("a red one on grey")
    with pytest.raises(ValueError, match="Pass two different colours"):
        ColorDigit(1, "red", "red")


def test_compose_is_deterministic_in_its_seed() -> None:
    first = compose(held_out_combinations(), seed=3)
    assert torch.equal(first, compose(held_out_combinations(), seed=3))
    assert not torch.equal(first, compose(held_out_combinations(), seed=4))
    assert not torch.equal(first, compose(held_out_combinations(), seed=3, split="test"))


def test_compose_gives_images_in_range() -> None:
    images = compose(EVERYTHING, seed=0)
    assert images.shape == (len(EVERYTHING), 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1


def test_images_have_the_ground_in_their_corner_and_the_color_somewhere() -> None:
    images = compose(EVERYTHING, seed=0)
    for image, item in zip(images, EVERYTHING, strict=True):
        assert torch.allclose(image[:, 0, 0], palette_value(item.ground), atol=1e-6)
        distance = (image - palette_value(item.color).view(3, 1, 1)).abs().amax(0)
        assert (distance < 1e-5).sum() >= 20  # pixels fully covered by the stroke


def test_digit_covers_a_sensible_share_of_the_image() -> None:
    images = compose(train_combinations() * 4, seed=1)
    inked = ((images - images[:, :, :1, :1]).abs().amax(1) > 0.3).float().mean((1, 2))
    assert inked.min() > 0.03 and inked.max() < 0.4


def test_splits_share_no_scan_and_miss_none() -> None:
    train, test = _load_scans("train"), _load_scans("test")
    assert len(train.scan) + len(test.scan) == 1797
    assert train.count.min() > 100 and test.count.min() > 25
    distance = torch.cdist(train.scan.flatten(1), test.scan.flatten(1))
    assert distance.min() > 0


def test_training_set_never_shows_held_out_combinations() -> None:
    images, combinations = sample_training_set(1100, seed=0)
    assert images.shape == (1100, 3, 32, 32)
    assert set(combinations) == set(train_combinations())
    assert set(Counter(combinations).values()) == {2, 3}
    again, same = sample_training_set(1100, seed=0)
    assert torch.equal(images, again) and combinations == same


def test_arguments_out_of_range_raise() -> None:
    with pytest.raises(ValueError, match="combinations is empty; allowed is one entry or more"):
        compose([], seed=0)
    with pytest.raises(ValueError, match="split is 'valid'; allowed are 'train' and 'test'"):
        compose(held_out_combinations(), seed=0, split="valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_images is 0; allowed is 1 or more"):
        sample_training_set(0, seed=0)
