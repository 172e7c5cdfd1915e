"""The baseline that a small language model has to beat: an n-gram model with interpolated modified Kneser-Ney smoothing.

S. F. Chen and J. Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1999, section 3.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_Gram = tuple[int, ...]


class NgramModel:
    """Probability of the next token given the `order - 1` before it.

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + g(h) p(w | h without its first token), where the counts of every order but
    the highest are numbers of different tokens to the left, except after the document's start, which has none. The discounts
    D(1), D(2), D(3 and more) come from the counts of counts, g(h) hands on exactly what they take, and below one token the
    distribution is uniform.

    Args:
        documents: Tokens of each training document, without the start.
        order: Longest run of tokens counted, 1 or more.
        vocabulary_size: Number of tokens, for the uniform distribution.
        start: Token that stands before every document; it is never predicted.
    """

    def __init__(self, documents: Sequence[Sequence[int]], *, order: int, vocabulary_size: int, start: int) -> None:
        self.order, self.start = order, start
        self._uniform = 1 / vocabulary_size
        counts = _adjusted_counts([(start, *document) for document in documents], order, start)
        self._discounts = [_discounts(level) for level in counts]
        self._counts = counts
        self._contexts = [_contexts(level, steps) for level, steps in zip(counts, self._discounts, strict=True)]

    def probability(self, history: Sequence[int], token: int) -> float:
        """p(token | history), of which the last `order - 1` tokens count."""
        history = tuple(history)[max(0, len(history) - self.order + 1) :]
        value = self._uniform
        for length in range(len(history) + 1):
            context = history[len(history) - length :]
            known = self._contexts[length].get(context)
            if known is None:
                break  # a longer context is unknown too
            count = self._counts[length].get((*context, token), 0)
            kept = max(count - _discount(self._discounts[length], count), 0.0)
            value = kept / known.total + known.passed_on * value
        return value

    def nats(self, documents: Sequence[Sequence[int]]) -> float:
        """Sum of -log p over all tokens of the documents, each predicted from its document's start."""
        total = 0.0
        for document in documents:
            tokens = (self.start, *document)
            for place in range(1, len(tokens)):
                total -= math.log(self.probability(tokens[max(0, place - self.order + 1) : place], tokens[place]))
        return total


@dataclass(frozen=True)
class _Context:
    """What is known about one history: sum of its counts, and the weight of the shorter history."""

    total: int
    passed_on: float


@dataclass
class _Followers:
    total: int = 0
    taken: float = 0.0


def _adjusted_counts(documents: list[_Gram], order: int, start: int) -> list[Counter[_Gram]]:
    """Counts of grams of 1 to `order` tokens: plain in the highest, numbers of left neighbours below."""
    plain: list[Counter[_Gram]] = [Counter() for _ in range(order)]
    for document in documents:
        for end in range(1, len(document)):
            for length in range(1, min(order, end + 1) + 1):
                plain[length - 1][document[end - length + 1 : end + 1]] += 1
    adjusted = [Counter[_Gram](gram[1:] for gram in longer) for longer in plain[1:]] + [plain[-1]]
    for length in range(1, order):
        for gram, count in plain[length - 1].items():
            if gram[0] == start:
                adjusted[length - 1][gram] = count
    return adjusted


def _discounts(counts: Counter[_Gram]) -> tuple[float, ...]:
    """D(1), D(2), D(3+) of Chen and Goodman's equation 26; a half where the data show no ones or twos."""
    number_of = Counter(counts.values())
    one, two, three, four = (number_of[count] for count in (1, 2, 3, 4))
    if not (one and two and three):
        return 0.5, 0.5, 0.5
    share = one / (one + 2 * two)
    found = (1 - 2 * share * two / one, 2 - 3 * share * three / two, 3 - 4 * share * four / three)
    return tuple(min(max(value, 0.0), float(count)) for count, value in enumerate(found, 1))


def _discount(discounts: Sequence[float], count: int) -> float:
    return discounts[min(count, 3) - 1] if count else 0.0


def _contexts(counts: Counter[_Gram], discounts: Sequence[float]) -> dict[_Gram, _Context]:
    followers: defaultdict[_Gram, _Followers] = defaultdict(_Followers)
    for gram, count in counts.items():
        entry = followers[gram[:-1]]
        entry.total += count
        entry.taken += min(_discount(discounts, count), count)
    return {context: _Context(entry.total, entry.taken / entry.total) for context, entry in followers.items()}
