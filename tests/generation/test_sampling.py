"""Every filter equals its counterpart in transformers, in its order; draws follow the odds."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers.generation import logits_process as theirs

from gpt2lab.generation import Sampling, decoding
from gpt2lab.generation.decoding import RandomStream, choose, draw, filtered

TOKENS = torch.tensor([[3, 3, 10, 96], [0, 1, 2, 3], [50, 50, 50, 50]])


def scores(seed: int = 0) -> Tensor:
    """With equal ones among them, as rounding makes in half precision."""
    made = torch.randn(3, 97, generator=torch.Generator().manual_seed(seed)) * 3
    made[1] = made[1].round()
    return made


@pytest.mark.parametrize("seed", range(5))
def test_filters_equal_those_of_transformers(seed: int) -> None:
    x = scores(seed)
    for k in (1, 5, 97, 1000):
        assert torch.equal(decoding.keep_top_k(x, k), theirs.TopKLogitsWarper(k)(TOKENS, x))
    for p in (0.001, 0.3, 0.9, 0.999):
        assert torch.equal(decoding.keep_top_p(x, p), theirs.TopPLogitsWarper(p)(TOKENS, x))
    for p in (0.0, 0.02, 0.5, 1.0):
        assert torch.equal(decoding.keep_min_p(x, p), theirs.MinPLogitsWarper(p)(TOKENS, x))
    for penalty in (0.5, 1.3):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(TOKENS, x.clone())
        assert torch.equal(decoding.penalise_repetition(x, TOKENS, penalty), expected)


@pytest.mark.parametrize("seed", range(5))
def test_all_together_equal_those_of_transformers_in_its_order(seed: int) -> None:
    settings = Sampling(temperature=0.7, top_k=30, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    chain = theirs.LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(1.2),
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(30),
            theirs.TopPLogitsWarper(0.8),
            theirs.MinPLogitsWarper(0.05),
        ]
    )
    x, before = scores(seed), scores(seed)
    found = filtered(x, TOKENS, settings)
    assert torch.equal(found, chain(TOKENS, x.clone()))
    assert torch.equal(x, before), "the scores given were changed"
    assert (found.isinf().sum(-1) > 60).all()


def test_settings_of_one_change_nothing() -> None:
    x = scores()
    assert filtered(x, TOKENS, Sampling(top_p=1.0, top_k=97, min_p=0.0)).equal(x)


def test_at_temperature_0_the_penalised_best_is_taken() -> None:
    x = torch.tensor([[0.0, 2.0, 1.9, -1.0]])
    tokens = torch.tensor([[1]])
    assert choose(x, tokens, Sampling(temperature=0, top_k=1), []).tolist() == [1]
    assert choose(x, tokens, Sampling(temperature=0, repetition_penalty=1.1), []).tolist() == [2]


def test_a_draw_is_where_the_odds_add_up() -> None:
    odds = torch.tensor([[0.125, 0.0, 0.25, 0.625, 0.0]])
    wanted = {0.0: 0, 0.1249: 0, 0.1251: 2, 0.3749: 2, 0.3751: 3, 1 - 2**-53: 3}
    for uniform, token in wanted.items():
        assert draw(odds.log(), torch.tensor([uniform], dtype=torch.float64)).item() == token


def test_draws_follow_the_odds() -> None:
    odds, n = torch.tensor([0.5, 0.2, 0.0, 0.2, 0.1]), 4000
    dice = RandomStream(0, 0)
    uniform = torch.tensor([dice.uniform() for _ in range(n)], dtype=torch.float64)
    counts = draw(odds.log().expand(n, -1), uniform).bincount(minlength=5)
    assert counts[2] == 0
    kept = odds > 0
    assert stats.chisquare(counts[kept].numpy(), (odds[kept] * n).numpy(), sum_check=False).pvalue > 0.01


def test_dice_differ_by_seed_and_sample_and_stay_what_they_are() -> None:
    def rolls(seed: int, sample: int) -> list[float]:
        dice = RandomStream(seed, sample)
        return [dice.uniform() for _ in range(3)]

    assert rolls(0, 1) == rolls(0, 1)
    assert len({tuple(rolls(seed, sample)) for seed in range(3) for sample in range(3)}) == 9
    assert all(0 <= u < 1 and math.isfinite(u) for u in rolls(2**40, 7))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0},
     {"max_new_tokens": 0}, {"seed": -1}, {"temperature": float("nan")}, {"beams": 3}],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Sampling(**wrong)
