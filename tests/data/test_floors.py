"""Unigram and bigram floors against counts taken by hand and in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from gpt2lab.data import floors as module
from gpt2lab.data.floors import floors


def plain(train: list[int], validation: list[int], size: int) -> tuple[float, float]:
    """The definition, token by token."""
    single, double, heads = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    kinds = Counter(h for h, _ in double)
    uni = [(single[w] + 1) / (len(train) + size) for w in range(size)]
    both = [0.0, 0.0]
    for h, w in pairwise(validation):
        both[0] -= math.log(uni[w])
        seen = heads[h] + kinds[h]
        both[1] -= math.log((double[h, w] + kinds[h] * uni[w]) / seen if seen else uni[w])
    return both[0] / (len(validation) - 1), both[1] / (len(validation) - 1)


def test_by_hand() -> None:
    # a b a b a, then b a: p(a) = 4/7 of V = 2; after b came a twice, one kind: (2 + 4/7) / 3 = 6/7.
    found = floors(np.array([0, 1, 0, 1, 0]), np.array([1, 0]), 2, 99)
    assert found == pytest.approx({"unigram": -math.log(4 / 7), "bigram": -math.log(6 / 7)})
    # After an unseen head, the unigram alone.
    alone = floors(np.array([0, 1, 0]), np.array([2, 0]), 3, 99)
    assert alone == pytest.approx({"unigram": math.log(2), "bigram": math.log(2)})


@pytest.mark.parametrize("size", [2, 7, 300, 70_000])
def test_against_plain_python(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRETCH", 64)
    rng = np.random.default_rng(size)
    train = np.maximum(size - rng.geometric(0.1, 900), 0)  # mostly high ids, whose pairs are the largest numbers
    validation = np.concatenate([rng.choice(train, 200), [size - 1, 0, size - 1, size - 1]])
    found = floors(train, validation, size, 10**6)
    assert (found["unigram"], found["bigram"]) == pytest.approx(plain(train.tolist(), validation.tolist(), size))


def test_the_bigram_is_a_distribution() -> None:
    train = np.random.default_rng(0).integers(0, 5, 60)
    for head in range(6):
        total = sum(math.exp(-floors(train, np.array([head, w]), 6, 99)["bigram"]) for w in range(6))
        assert total == pytest.approx(1)


def test_no_more_than_the_limit_is_read() -> None:
    train, validation = np.random.default_rng(0).integers(0, 9, (2, 400))
    assert floors(train, validation, 9, 150) == floors(train[:150], validation[:150], 9, 400)
