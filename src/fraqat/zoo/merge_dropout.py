"""BPE dropout: the same words in other pieces at every look, a strong guard against learning a small text by heart.

I. Provilkov, D. Emelianenko and E. Voita, BPE-Dropout: Simple and Effective Subword Regularization, 2020.
"""

import itertools
import json
import random
from collections.abc import Sequence

from tokenizers import Tokenizer


class MergeDropout:
    """Splits texts with a byte-level BPE tokenizer whose merges are left out at random, from a seed.

    The tokenizers library has this too, but draws from a generator that cannot be seeded.

    Args:
        tokenizer: The trained tokenizer.
        share: Probability that a merge is left out each time it could be made, in [0, 1].
    """

    def __init__(self, tokenizer: Tokenizer, share: float) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        self._vocabulary: dict[str, int] = model["vocab"]
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self._split = tokenizer.pre_tokenizer.pre_tokenize_str
        self._share = share

    def encode(self, texts: Sequence[str], seed: int) -> list[list[int]]:
        """Tokens of each text; a word that comes twice in one text is split the same way in it."""
        draw = random.Random(seed)  # noqa: S311 - no secret
        encoded: list[list[int]] = []
        for text in texts:
            pieces: dict[str, list[int]] = {}
            tokens: list[int] = []
            for word, _ in self._split(text):
                if word not in pieces:
                    pieces[word] = [self._vocabulary[piece] for piece in self._pieces(word, draw)]
                tokens += pieces[word]
            encoded.append(tokens)
        return encoded

    def _pieces(self, word: str, draw: random.Random) -> list[str]:
        pieces = list(word)
        while True:
            found = [
                (rank, place)
                for place, pair in enumerate(itertools.pairwise(pieces))
                if (rank := self._ranks.get(pair)) is not None and draw.random() >= self._share
            ]
            if not found:
                return pieces
            _, place = min(found)
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
