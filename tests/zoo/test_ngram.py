"""Laws of the n-gram baseline: a distribution, the published formula, and no handicap."""

from __future__ import annotations

import math
import random

import pytest

from fraqat.zoo.ngram import NgramModel

START = 0


def documents(num: int = 30, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    text: list[list[int]] = []
    for _ in range(num):
        tokens = [draw.randrange(1, 9)]
        while len(tokens) < 25:
            tokens.append((tokens[-1] * 2 + draw.choice((0, 0, 0, 1, 3))) % 8 + 1)
        text.append(tokens)
    return text


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("history", [(START,), (START, 3), (3, 7), (4, 4, 4, 4, 4), (99, 3)])
def test_probabilities_of_all_tokens_sum_to_one(order: int, history: tuple[int, ...]) -> None:
    model = NgramModel(documents(), order=order, vocabulary_size=12, start=START)
    values = [model.probability(history, token) for token in range(12)]
    assert sum(values) == pytest.approx(1.0, abs=1e-12)
    assert min(values) > 0


def test_bigrams_follow_the_formula_of_chen_and_goodman() -> None:
    text = [[1, 2, 1, 2, 1, 3], [1, 2, 3, 3, 1, 2], [4, 1, 2, 2, 5, 6]]
    model = NgramModel(text, order=2, vocabulary_size=10, start=START)
    pairs: dict[tuple[int, int], int] = {}
    for document in text:
        for left, right in zip((START, *document), document, strict=False):
            pairs[left, right] = pairs.get((left, right), 0) + 1
    ones, twos, threes = (sum(count == n for count in pairs.values()) for n in (1, 2, 3))
    assert ones and twos
    discounts = (0.5, 0.5, 0.5)
    if threes:
        share = ones / (ones + 2 * twos)
        fours = sum(count == 4 for count in pairs.values())
        discounts = (1 - 2 * share * twos / ones, 2 - 3 * share * threes / twos, 3 - 4 * share * fours / threes)
        discounts = tuple(min(max(value, 0.0), n) for n, value in enumerate(discounts, 1))

    def discount(count: int) -> float:
        return discounts[min(count, 3) - 1]

    lower = [model.probability((), token) for token in range(10)]
    for token in range(10):
        followers = {right: count for (left, right), count in pairs.items() if left == 2}
        total = sum(followers.values())
        passed_on = sum(discount(count) for count in followers.values()) / total
        count = followers.get(token, 0)
        kept = max(count - discount(count), 0) / total if count else 0.0
        assert model.probability((2,), token) == pytest.approx(kept + passed_on * lower[token], abs=1e-12)


def test_shorter_histories_count_left_neighbours_not_occurrences() -> None:
    # 7 is frequent but only ever follows 1; 5 is rare but follows many tokens.
    text = [[1, 7] * 12, [2, 5, 3, 5, 4, 5, 6, 5, 8, 5]]
    model = NgramModel(text, order=2, vocabulary_size=10, start=START)
    assert model.probability((9,), 5) > model.probability((9,), 7)
    assert NgramModel(text, order=1, vocabulary_size=10, start=START).probability((), 7) > model.probability((9,), 7)


def test_longer_orders_help_where_the_text_has_structure() -> None:
    train, test = documents(200), documents(20, seed=1)
    nats = [NgramModel(train, order=n, vocabulary_size=9, start=START).nats(test) for n in (1, 2, 3)]
    assert nats[1] < 0.8 * nats[0]
    assert nats[2] == pytest.approx(nats[1], rel=0.05)


def test_it_comes_close_to_the_entropy_of_the_source() -> None:
    train, test = documents(400), documents(40, seed=1)
    count = sum(len(text) - 1 for text in test)
    first = sum(len(text) for text in test) - count
    model = NgramModel(train, order=2, vocabulary_size=9, start=START)
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    expected = count * entropy + first * math.log(8)
    assert model.nats(test) == pytest.approx(expected, rel=0.04)
