"""A small closed language of spoken phrases: what the tiny text-to-speech teacher learns to say.

A phrase is "VERB COLOUR DIGIT", as in "draw red seven", or "VERB COLOUR DIGIT PLACE COLOUR", as in "draw red seven under
blue". Phrases are random draws, some are held out of training; every word is still heard in training.
"""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import product

from fraqat.data.color_digits import COLOR_NAMES, DIGIT_NAMES

VERBS = ("draw", "find", "move", "take")
PLACES = ("on", "under", "near", "behind")
PHRASE_WORDS = (*VERBS, *COLOR_NAMES, *DIGIT_NAMES, *PLACES)
"""The 26 words of the language."""

_HELD_OUT_SHARE = 0.1
_SEED = 20240501


@lru_cache(maxsize=1)
def _split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All phrases in a fixed random order, long and short ones alternating as far as they go: held out, then training."""
    random_order = random.Random(_SEED)  # noqa: S311  # no secret
    short = [" ".join(words) for words in product(VERBS, COLOR_NAMES, DIGIT_NAMES)]
    long = [f"{first} {place} {color}" for first in short for place in PLACES for color in COLOR_NAMES]
    long = [phrase for phrase in long if phrase.split()[1] != phrase.split()[4]]
    random_order.shuffle(short)
    random_order.shuffle(long)
    held_out, training = _alternate(short, long, True), _alternate(short, long, False)
    return held_out, training


def _alternate(short: list[str], long: list[str], is_held_out: bool) -> tuple[str, ...]:
    parts = [
        phrases[: round(_HELD_OUT_SHARE * len(phrases))]
        if is_held_out
        else phrases[round(_HELD_OUT_SHARE * len(phrases)) :]
        for phrases in (short, long)
    ]
    mixed = [phrase for pair in zip(*parts, strict=False) for phrase in pair]
    return tuple(mixed + parts[1][len(parts[0]) :])


def held_out_phrases() -> tuple[str, ...]:
    """The phrases that no model of the package is trained on, short and long ones alternating, then long ones."""
    return _split()[0]


def training_phrases() -> tuple[str, ...]:
    """All other phrases, short and long ones alternating, then long ones."""
    return _split()[1]
