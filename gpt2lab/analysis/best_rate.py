"""The difference between arms at their best learning rates, given the trials of a search.

A search picks the best of a few rates on a grid, by noisy losses. So each arm is evaluated somewhat off its best rate,
by an amount that further seeds at that rate cannot show. Two arms that are equal at their best rates would then be
found to differ: with octaves between rates and ten low-noise seeds, in two thirds of studies.

Here each arm has a curve: two half parabolas over the rate's octaves that meet at the best rate, through the trials and
the runs at the chosen rate. The best rate, the steepness and the asymmetry are unknown; every lowest loss for which
some such curve fits counts as possible (a profile likelihood). The interval of the difference between two lowest losses
is at least as wide as that at the chosen rates. The self-test simulates it over steepness, noise, seeds and shapes.

Shapes: P points of a curve, S candidate best rates, L candidate lowest losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PLACES = 61
"""Candidate positions of the best rate between the outermost trials."""
LOPSIDED = np.array([-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.98])
"""(right - left) / (right + left) steepness: from nine times as steep below the best rate to 99 times above."""
EXPECTED = 0.6
"""Prior standard deviation of that, where it is negative. Losses rise faster towards divergence, so the prior is flat
over positive values."""
CONFUSED = 4.0
"""Trials within this many standard deviations of the best one may be better than it."""
NEIGHBOURS = 2
"""Trials on either side of the chosen rate that are always used."""
STEPS = 500
"""Candidate lowest losses on either side of an arm's mean."""


@dataclass(frozen=True, kw_only=True)
class RateSearch:
    """One arm's search: `tried` settings with their final losses, and the `chosen` one; rates are in octaves. The best
    setting does not lie beyond `diverged` ones."""

    tried: tuple[float, ...]
    losses: tuple[float, ...]
    chosen: float
    diverged: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightedArm:
    """One arm of a contrast: its weight, its final losses at the chosen setting, and its search, if it had one."""

    weight: float
    losses: Array
    search: RateSearch | None


class BestRateDifference:
    """A sum of weights x lowest losses of several arms, and its profile likelihood."""

    def __init__(self, arms: Sequence[WeightedArm]) -> None:
        spreads = np.array([arm.losses.var(ddof=1) for arm in arms])
        variances = np.maximum(spreads, 1e-6 * spreads.max())  # avoid zero variances
        self._arms = list(zip(arms, variances, strict=True))
        self.difference = float(sum(arm.weight * arm.losses.mean() for arm in arms))
        """at the settings that were chosen"""
        self._se = math.sqrt(sum(arm.weight**2 * variance / len(arm.losses) for arm, variance in self._arms))
        self._reach = sum(
            abs(arm.weight) * float(np.ptp(_near(arm.search, math.sqrt(variance))[1]))
            for arm, variance in self._arms
            if arm.search
        )  # no lowest loss lies further below the trials

    def interval(self, critical: float) -> tuple[float, float]:
        """The values whose distance is at most `critical`."""
        if not math.isfinite(critical):
            return -math.inf, math.inf
        differences, distance = self._distances(1.5 * critical * self._se + self._reach)
        inside = differences[distance <= critical]
        return (float(inside[0]), float(inside[-1])) if len(inside) else (self.difference, self.difference)

    def distance(self, value: float) -> float:
        """The t statistic of a true difference of `value`: the distance of the data from it, in standard errors."""
        differences, distance = self._distances(1.05 * abs(value - self.difference) + 2 * self._se + self._reach)
        return float(np.interp(value, differences, distance))

    def _distances(self, span: float) -> tuple[Array, Array]:
        """Distances over a grid of differences that reaches `span` to either side.  -> (L,), (L,)"""
        offsets = np.linspace(-span, span, 2 * STEPS + 1)
        deviances = [_deviance(arm, variance, offsets / arm.weight) for arm, variance in self._arms]
        total = reduce(_least_sum, deviances)
        return self.difference + offsets, np.sqrt(np.maximum(total - total.min(), 0.0))


def _least_sum(a: Array, b: Array) -> Array:
    """The minimum of a + b over all ways to divide a difference between two arms.  (L,), (L,) -> (L,)"""
    middle, least = len(a) // 2, np.full(len(a), np.inf)
    for i, deviance in enumerate(a):  # a[i] takes i - middle steps of the difference, b the rest
        shift = i - middle
        low, high = max(0, shift), min(len(a), len(a) + shift)
        least[low:high] = np.minimum(least[low:high], deviance + b[low - shift : high - shift])
    return least


def _deviance(arm: WeightedArm, variance: float, offsets: Array) -> Array:
    """Minus twice the log likelihood, up to a constant, where the arm's lowest loss is its mean plus each offset.  (L,)
    -> (L,)

    Of the best curve for each: through the trials near the chosen one, one seed each, and the mean at the chosen one.
    """
    n, search = len(arm.losses), arm.search
    if search is None:
        return np.asarray(offsets**2 * n / variance)
    bottoms = float(arm.losses.mean()) + offsets
    at, losses = _near(search, math.sqrt(variance))
    places = np.linspace(*_ends(search, at), PLACES)
    weights = np.append(np.ones(len(at)), n) / variance  # (P,)
    at, losses = np.append(at, search.chosen), np.append(losses, float(arm.losses.mean()))
    away = at - places[:, None]  # (S, P)
    above = losses[:, None] - bottoms  # (P, L)
    sides = [np.where(away < 0, away**2, 0.0), np.where(away < 0, 0.0, away**2)]  # the rise of a curve of steepness 1
    squares = [(weights * side**2).sum(-1)[:, None] for side in sides]  # (S, 1)
    products = [(weights * side) @ above for side in sides]  # (S, L)
    left, right = (np.maximum(p, 0.0) / np.maximum(q, 1e-300) for p, q in zip(products, squares, strict=True))
    fitted = np.clip((right - left) / np.maximum(right + left, 1e-300), LOPSIDED[0], LOPSIDED[-1])
    # each lopsidedness, and the one fitted to the trials on both sides, which quiet trials determine
    lopsided = np.concatenate([np.broadcast_to(LOPSIDED[:, None, None], (len(LOPSIDED), *fitted.shape)), fitted[None]])
    product = (1 - lopsided) * products[0] + (1 + lopsided) * products[1]
    square = (1 - lopsided) ** 2 * squares[0] + (1 + lopsided) ** 2 * squares[1]
    steepness = np.maximum(product, 0.0) / np.maximum(square, 1e-300)  # convex only
    prior = (np.minimum(lopsided, 0.0) / EXPECTED) ** 2
    deviance = (weights @ above**2) - steepness * np.maximum(product, 0.0) + prior
    return np.asarray(deviance.min((0, 1)))


def _near(search: RateSearch, sd: float) -> tuple[Array, Array]:
    """The trials that a curve is fitted to: those that may be the best given the noise, and neighbours of the chosen
    one."""
    order = np.argsort(search.tried)
    at, losses = np.asarray(search.tried)[order], np.asarray(search.losses)[order]
    confused = np.flatnonzero(losses <= losses.min() + CONFUSED * sd)
    below, above = np.unique(at[at < search.chosen]), np.unique(at[at > search.chosen])
    neighbours = np.flatnonzero(np.isin(at, [*below[-NEIGHBOURS:], search.chosen, *above[:NEIGHBOURS]]))
    first, last = min(confused[0], neighbours[0]), max(confused[-1], neighbours[-1])
    return at[first : last + 1], losses[first : last + 1]


def _ends(search: RateSearch, fitted: Array) -> tuple[float, float]:
    """The range of the best setting: that of the fitted trials, or up to a diverged one where no finite trial lies
    between."""
    low, high = float(fitted.min()), float(fitted.max())
    below = max((d for d in search.diverged if d < low), default=low)
    above = min((d for d in search.diverged if d > high), default=high)
    return (
        low if any(below < at < low for at in search.tried) else below,
        high if any(high < at < above for at in search.tried) else above,
    )
