"""From scores to the next token: filters, and a draw from what they leave.

Each filter is a pure function that equals the class of transformers named beside it, on the same scores; `filtered`
applies them in the order in which transformers' `generate` does.

Shapes: n samples, V vocabulary, S tokens so far.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gpt2lab.schema import Settings

NEVER = float("-inf")


class Sampling(Settings):
    """How a continuation is drawn."""

    max_new_tokens: int = Field(100, ge=1)
    """Tokens after which a sample ends in any case."""
    temperature: float = Field(1.0, ge=0)
    """Scores are divided by it; 0 takes the best token always."""
    top_k: int | None = Field(None, ge=1)
    """Only the k best tokens can be drawn; null for all."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Only the fewest best tokens that have this probability together can be drawn; null for all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Only tokens with at least this share of the best one's probability can be drawn; null for all."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1 makes tokens that are in the text already less likely; 1 for none."""
    seed: int = Field(0, ge=0)
    """Each sample has a generator of its own, from this and its number."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a sample; the id itself is its last token."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample; its text ends before them."""


def penalise_repetition(scores: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Scores of tokens that occurred made worse: divided by `penalty` above zero, multiplied below.

    (n, V), (n, S) int64 -> (n, V).  Source: CTRL, arXiv:1909.05858, section 4.1; RepetitionPenaltyLogitsProcessor.
    CTRL divides scores of either sign, which would make negative ones better.
    """
    found = scores.gather(1, tokens)
    return scores.scatter(1, tokens, torch.where(found < 0, found * penalty, found / penalty))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf below the k-th best score; ties with it stay.  (n, V) -> (n, V)

    Source: arXiv:1805.04833, section 5.1; TopKLogitsWarper.
    """
    worst = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < worst, NEVER)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest best tokens whose probabilities add up to p or more.  (n, V) -> (n, V)

    Source: nucleus sampling, arXiv:1904.09751, section 3.1; TopPLogitsWarper.
    """
    rising, order = scores.sort()
    out = rising.softmax(-1).cumsum(-1) <= 1 - p
    out[:, -1] = False  # one stays in any case
    return scores.masked_fill(out.scatter(1, order, out), NEVER)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """-inf for tokens with less than p times the best one's probability.  (n, V) -> (n, V)

    Source: arXiv:2407.01082; MinPLogitsWarper.
    """
    odds = scores.softmax(-1)
    return scores.masked_fill(odds < p * odds.amax(-1, keepdim=True), NEVER)


def filtered(scores: Tensor, tokens: Tensor, settings: Sampling) -> Tensor:
    """Scores from which the next token is drawn.  (n, V) float32, (n, S) -> (n, V)

    At temperature 0 only the repetition penalty matters, as the best token passes every filter.
    """
    if settings.repetition_penalty != 1:
        scores = penalise_repetition(scores, tokens, settings.repetition_penalty)
    if settings.temperature == 0:
        return scores
    if settings.temperature != 1:
        scores = scores / settings.temperature
    if settings.top_k is not None:
        scores = keep_top_k(scores, settings.top_k)
    if settings.top_p is not None and settings.top_p < 1:
        scores = keep_top_p(scores, settings.top_p)
    if settings.min_p is not None:
        scores = keep_min_p(scores, settings.min_p)
    return scores


class Dice:
    """A sample's own random numbers: they depend on the seed and the sample's number, not on how many are drawn at
    once, nor on the device. Its stream (PCG64's raw output) is one that numpy promises to keep."""

    def __init__(self, seed: int, sample: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, sample]))

    def roll(self) -> float:
        """The next number, uniform in [0, 1)."""
        return float(int(self._bits.random_raw()) >> 11) * 2.0**-53


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """One token of each row by its odds, softmax(scores): the first at which they add up to more than `uniform`.

    (n, V), (n,) float64 in [0, 1) -> (n,) int64, both on the CPU
    """
    reached = scores.softmax(-1).cpu().double().cumsum(-1)  # (n, V)
    total = reached[:, -1:]
    last = (reached < total).sum(-1)  # no token behind it has any odds, and rounding may not reach there
    return torch.searchsorted(reached, uniform[:, None] * total, right=True)[:, 0].minimum(last)


def choose(scores: Tensor, tokens: Tensor, settings: Sampling, dice: list[Dice]) -> Tensor:
    """The next token of every sample.  (n, V) float32, (n, S), n dice -> (n,) int64 on the CPU"""
    scores = filtered(scores, tokens, settings)
    if settings.temperature == 0:
        return scores.argmax(-1).cpu()
    return draw(scores, torch.tensor([one.roll() for one in dice], dtype=torch.float64))
