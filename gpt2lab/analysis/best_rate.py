"""The difference between arms at each one's own best learning rate, judged from what a search of rates has seen.

A search tries a few rates and picks the best of them: on a grid, and by noisy losses. So the arm is judged somewhat
beside its best rate, by an amount that no number of further seeds at that rate reveals. Two arms that are equal at
their own best would then differ: at octaves between rates and ten quiet seeds, in two thirds of studies.

Here each arm has a curve: two half parabolas over the rate's octaves that meet at the best rate, through the trials and
the runs at the rate that was picked. The place of the best rate, the steepness and how lopsided the curve is are all
unknown; every lowest loss counts as possible for which some such curve fits (a profile likelihood). The interval of the
difference between two lowest losses is then at least as wide as that between the rates that were picked. Simulated in
the self-test over steepness, noise, seeds and lopsidedness.

Shapes: P points of a curve, S places of its lowest point, L lowest losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

PLACES = 61
"""Places between the outermost trials at which the best rate may lie."""
LOPSIDED = np.array([-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.98])
"""(right - left) / (right + left) steepness: from nine times as steep below the best rate to 99 times above."""
EXPECTED = 0.6
"""Standard deviation of that, where it is negative, before any trial is seen. Losses rise faster towards divergence, so
any positive value is as good as another."""
CONFUSED = 4.0
"""Trials within so many standard deviations of the best one could be the best but for noise."""
BESIDE = 2
"""Trials on either side of the picked rate that are used in any case; further ones tell of other parts of the curve."""
STEPS = 500
"""Losses on either side of an arm's mean at which its curve is tried."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """One arm's search: `tried` settings with their final losses, and which one was `chosen`; in octaves for rates.
    At `diverged` settings nothing was learned: they bound where the best one may lie."""

    tried: tuple[float, ...]
    losses: tuple[float, ...]
    chosen: float
    diverged: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightedArm:
    """One arm of a contrast: its weight, its final losses at the chosen setting, and its search, if it had one."""

    weight: float
    losses: Array
    search: Search | None


class OwnBest:
    """A sum of weights x lowest losses, and how well each value of it agrees with all that was seen."""

    def __init__(self, arms: Sequence[WeightedArm], sizes: Sequence[int] = ()) -> None:
        """sizes: seeds per arm in the place of those that there are, to see what more of them would bring."""
        spreads = np.array([arm.losses.var(ddof=1) for arm in arms])
        variances = np.maximum(spreads, 1e-6 * spreads.max())  # equal values cannot be infinitely sure
        self._arms = list(zip(arms, variances, sizes or [len(arm.losses) for arm in arms], strict=True))
        self.difference = float(sum(arm.weight * arm.losses.mean() for arm in arms))
        """at the settings that were chosen"""
        self._se = math.sqrt(sum(arm.weight**2 * variance / n for arm, variance, n in self._arms))
        self._reach = sum(
            abs(arm.weight) * float(np.ptp(_near(arm.search, math.sqrt(variance))[1]))
            for arm, variance, _ in self._arms
            if arm.search
        )  # no lowest loss lies further below what was seen
        self._known: dict[float, tuple[float, float]] = {}

    def interval(self, critical: float) -> tuple[float, float]:
        """The values whose distance is at most `critical`."""
        if not math.isfinite(critical):
            return -math.inf, math.inf
        if critical not in self._known:
            self._known[critical] = self._interval(critical)
        return self._known[critical]

    def _interval(self, critical: float) -> tuple[float, float]:
        at, distance = self._distances(1.5 * critical * self._se + self._reach)
        inside = at[distance <= critical]
        return (float(inside[0]), float(inside[-1])) if len(inside) else (self.difference, self.difference)

    @property
    def estimate(self) -> float:
        """The value that agrees best with all that was seen."""
        return sum(self.interval(0.05)) / 2

    def distance(self, value: float) -> float:
        """How far the data are from a true difference of `value`, in standard errors: a t statistic."""
        at, distance = self._distances(1.05 * abs(value - self.difference) + 2 * self._se + self._reach)
        return float(np.interp(value, at, distance))

    def _distances(self, span: float) -> tuple[Array, Array]:
        """Distances over a grid of differences that reaches `span` to either side.  -> (L,), (L,)"""
        offsets = np.linspace(-span, span, 2 * STEPS + 1)
        each = [_deviance(arm, variance, n, offsets / arm.weight) for arm, variance, n in self._arms]
        total = reduce(_least_sum, each)
        return self.difference + offsets, np.sqrt(np.maximum(total - total.min(), 0.0))


def _least_sum(a: Array, b: Array) -> Array:
    """The least a + b over all ways to share a difference out between two arms.  (L,), (L,) -> (L,)"""
    middle, found = len(a) // 2, np.full(len(a), np.inf)
    for i, one in enumerate(a):  # a[i] takes i - middle steps of the difference, b the rest
        shift = i - middle
        low, high = max(0, shift), min(len(a), len(a) + shift)
        found[low:high] = np.minimum(found[low:high], one + b[low - shift : high - shift])
    return found


@dataclass(frozen=True, kw_only=True)
class _Curves:
    """Every curve that is tried for one arm with each of some lowest losses. All fields but `places` (S,) are
    (lopsidedness, S, L), or broadcast to that."""

    places: Array
    lopsided: Array
    steepness: Array
    deviance: Array
    """twice the lack of log likelihood"""


def _curves(arm: WeightedArm, search: Search, variance: float, n: int, bottoms: Array) -> _Curves:
    """Through the trials near the chosen one, one seed each, and the mean of n seeds at the chosen one."""
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
    # each lopsidedness, and the one that the trials on both sides show: quiet trials leave no other
    lopsided = np.concatenate([np.broadcast_to(LOPSIDED[:, None, None], (len(LOPSIDED), *fitted.shape)), fitted[None]])
    product = (1 - lopsided) * products[0] + (1 + lopsided) * products[1]
    square = (1 - lopsided) ** 2 * squares[0] + (1 + lopsided) ** 2 * squares[1]
    steepness = np.maximum(product, 0.0) / np.maximum(square, 1e-300)  # they bend upwards only
    doubt = (np.minimum(lopsided, 0.0) / EXPECTED) ** 2
    deviance = (weights @ above**2) - steepness * np.maximum(product, 0.0) + doubt
    return _Curves(places=places, lopsided=lopsided, steepness=steepness, deviance=deviance)


def _deviance(arm: WeightedArm, variance: float, n: int, offsets: Array) -> Array:
    """Twice the lack of log likelihood where the arm's lowest loss is its mean plus each offset.  (L,) -> (L,)"""
    if arm.search is None:
        return np.asarray(offsets**2 * n / variance)
    curves = _curves(arm, arm.search, variance, n, float(arm.losses.mean()) + offsets)
    return np.asarray(curves.deviance.min((0, 1)))


def closer(arm: WeightedArm) -> Search:
    """The arm's search with one more trial halfway to each neighbour of the chosen setting, with the losses that the
    best curve has there: what a closer search would see if the curve is as it looks now."""
    search = arm.search
    assert search is not None
    tried, highest = np.asarray(search.tried), max(*search.losses, float(arm.losses.mean()))
    beside = [*_last(tried[tried < search.chosen])[-1:], *_first(tried[tried > search.chosen])[:1]]
    extra = (search.chosen + np.asarray(beside)) / 2
    lowest = min(*search.losses, float(arm.losses.mean()))
    bottoms = np.linspace(2 * lowest - highest, lowest, STEPS)
    curves = _curves(arm, search, max(float(arm.losses.var(ddof=1)), 1e-300), len(arm.losses), bottoms)
    likely = curves.deviance + (np.maximum(curves.lopsided, 0.0) / EXPECTED) ** 2  # of equal ones the least lopsided
    best = np.unravel_index(int(np.argmin(likely)), likely.shape)
    away, lopsided = extra - curves.places[best[1]], curves.lopsided[best]
    losses = bottoms[best[2]] + curves.steepness[best] * np.where(away < 0, 1 - lopsided, 1 + lopsided) * away**2
    return Search(
        tried=(*search.tried, *map(float, extra)), losses=(*search.losses, *map(float, losses)), chosen=search.chosen
    )


def _near(search: Search, sd: float) -> tuple[Array, Array]:
    """The trials that a curve is drawn through: those that noise could confuse with the best, and those beside it."""
    order = np.argsort(search.tried)
    at, losses = np.asarray(search.tried)[order], np.asarray(search.losses)[order]
    confused = np.flatnonzero(losses <= losses.min() + CONFUSED * sd)
    beside = np.flatnonzero(
        np.isin(at, [*_last(at[at < search.chosen]), search.chosen, *_first(at[at > search.chosen])])
    )
    first, last = min(confused[0], beside[0]), max(confused[-1], beside[-1])
    return at[first : last + 1], losses[first : last + 1]


def _ends(search: Search, at: Array) -> tuple[float, float]:
    """Between which settings the best one may lie: those of the curve, or up to a diverged one where nothing finite was
    tried between."""
    low, high = float(at.min()), float(at.max())
    below = max((d for d in search.diverged if d < low), default=low)
    above = min((d for d in search.diverged if d > high), default=high)
    return (
        low if any(below < one < low for one in search.tried) else below,
        high if any(high < one < above for one in search.tried) else above,
    )


def _last(values: ArrayLike) -> Array:
    return np.unique(values)[-BESIDE:]


def _first(values: ArrayLike) -> Array:
    return np.unique(values)[:BESIDE]
