"""Critical values of Welch's test that are valid for any spreads of the arms.

Welch's test estimates its degrees of freedom from the observed spreads. Where few seeds of one arm happen to be close
together, it underestimates that arm's noise and rejects too often: three seeds against fifty, both equally noisy,
"differ" at the level 0.005 in 2.6 % of cases. Here the exact rejection probability is computed for every share of the
noise that either arm may have, and the largest of them, times SKEWED, is the reported p value. So p is valid at any
number of seeds and any ratio of spreads; noise other than Gaussian is simulated in the self-test.

Given each arm's share of the observed noise, the statistic is a multiple of Student's t with all degrees of freedom
together (Wang 1971, Journal of the American Statistical Association 66:605), which leaves one integral over that share.

Shapes: S shares of the true noise, K points of the integral, A arms, L levels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

SKEWED = 1.1
"""Losses of seeds are a little skewed (0.27 over 1,261 seeds at 124M), which raises chances by about this factor."""

POINTS = 120
"""Points of the integral for two arms (Gauss and Jacobi)."""
DRAWN = 1024
"""Points for more arms (Sobol)."""
LEVELS = np.exp(np.linspace(np.log(1e-12), 0.0, 70))
"""Nominal levels at which the exact probability is computed; between them it is interpolated."""
LOGITS = np.linspace(-9.0, 9.0, 73)
"""Shares of the noise that the first of two arms may have, as log odds."""
PARTS = (0.0, 0.01, 0.1, 1.0)
"""Relative noise of each of several arms, in all combinations."""
TABULATED = (*itertools.combinations_with_replacement(range(2, 13), 2), *((size, size) for size in range(13, 41)))
"""Numbers of seeds whose actual levels lie in banks/calibration.npy, since a pair takes 0.1 to 0.3 s to compute;
`python -m benchmarks calibration` writes them."""


def exponent(sizes: Sequence[int]) -> float:
    """How strongly the larger share of the noise decides the degrees of freedom.

    2 as in Welch's test, unless one arm has more than twice the seeds of another; then less, because the calibrated
    test would otherwise lose power: with 3 and 50 seeds it would find less than with 3 and 3.
    """
    return float(2.0 * min(1.0, 2.0 * min(sizes) / max(sizes)) ** 0.75)


def degrees(shares: ArrayLike, sizes: Sequence[int]) -> Array:
    """Degrees of freedom from each arm's share of the squared standard error.  (..., A) -> (...)

    Source: Satterthwaite 1946, Biometrics Bulletin 2(6), for equal sizes.
    """
    freedom = np.asarray(sizes, dtype=np.float64) - 1.0
    return np.asarray(1.0 / (np.asarray(shares) ** exponent(sizes) / freedom).sum(-1))


def valid_p(nominal: ArrayLike, sizes: Sequence[int]) -> Array:
    """The probability, at the worst ratio of spreads, of a nominal two-sided p this small.  (...) -> (...)"""
    levels, chances = _table(tuple(sorted(sizes)))
    return _interpolated(nominal, levels, chances)


def nominal_level(level: ArrayLike, sizes: Sequence[int]) -> Array:
    """The nominal level at which the test has the level `level` at the worst ratio of spreads.  (...) -> (...)"""
    levels, chances = _table(tuple(sorted(sizes)))
    return _interpolated(level, chances, levels)


def power(effect: float, sizes: Sequence[int], weights: Sequence[float] = (1.0, -1.0), *, alpha: float = 0.05) -> float:
    """Probability of finding a true sum of weights x means of `effect` sd with its sign, all arms equally noisy."""
    parts = np.asarray(weights, dtype=np.float64) ** 2 / np.asarray(sizes, dtype=np.float64)
    points, chance = _points(tuple(sizes))
    bar, freedom = _bars(parts / parts.sum(), points, sizes, nominal_level(alpha, sizes))
    rejected = 1 - scipy.special.nctdtr(freedom, effect / np.sqrt(parts.sum()), bar)
    return float(np.nan_to_num(rejected, nan=0.0) @ chance)


def _interpolated(probability: ArrayLike, at: Array, values: Array) -> Array:
    """Linear in the logarithms, extrapolated below the lowest point."""
    at, values = np.log(at), np.log(values)
    slope = (values[1] - values[0]) / (at[1] - at[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.log(np.asarray(probability, dtype=np.float64))
        return np.exp(np.where(x < at[0], values[0] + slope * (x - at[0]), np.interp(x, at, values)))


def actual_levels(sizes: tuple[int, ...]) -> Array:
    """SKEWED x the actual level of each nominal one, at the worst ratio of spreads; sizes in rising order.  -> (L,)"""
    points, chance = _points(sizes)
    levels = _levels(sizes)
    worst = np.zeros(len(levels))
    for shares in _true_shares(sizes):
        bar, freedom = _bars(shares, points, sizes, levels[:, None])
        worst = np.maximum(worst, 2 * scipy.special.stdtr(freedom, -bar) @ chance)
    return np.maximum.accumulate(np.minimum(SKEWED * worst, 1.0))


def _levels(sizes: tuple[int, ...]) -> Array:
    return LEVELS if len(sizes) == 2 else LEVELS[::3]


@functools.lru_cache(maxsize=256)
def _table(sizes: tuple[int, ...]) -> tuple[Array, Array]:
    """Nominal levels with their actual ones, where these rise.  -> (L,), (L,)"""
    actual = _tabulated()[TABULATED.index(sizes)] if sizes in TABULATED else actual_levels(sizes)
    rising = np.concatenate([[True], np.diff(actual) > 0])
    return _levels(sizes)[rising], actual[rising]


@functools.cache
def _tabulated() -> Array:
    """`actual_levels` of TABULATED.  (pairs, L)"""
    with (files("gpt2lab.analysis") / "banks" / "calibration.npy").open("rb") as file:
        return np.asarray(np.load(file))


def _bars(shares: Array, points: Array, sizes: Sequence[int], level: Array) -> tuple[Array, int]:
    """The value that Student's t must exceed, given the observed shares, to reject at a nominal `level`.

    shares (A,) of the true noise, points (K, A), level () or (L, 1) -> (K,) or (L, K); and its degrees of freedom.
    """
    freedom = np.asarray(sizes, dtype=np.float64) - 1.0
    observed = shares * points / freedom  # (K, A)
    total = observed.sum(-1)
    quantile = -scipy.special.stdtrit(degrees(observed / total[:, None], sizes), np.asarray(level) / 2)
    return quantile * np.sqrt(freedom.sum() * total), int(freedom.sum())


@functools.lru_cache(maxsize=64)
def _points(sizes: tuple[int, ...]) -> tuple[Array, Array]:
    """Each arm's share of the sum of squares if all were equally noisy, with its probability.  -> (K, A), (K,)"""
    if len(sizes) == 2:
        first, second = ((size - 1) / 2 for size in sizes)
        nodes, chance = scipy.special.roots_jacobi(POINTS, second - 1, first - 1)
        share = (1 + nodes) / 2
        return np.stack([share, 1 - share], axis=-1), chance / chance.sum()
    uniform = scipy.stats.qmc.Sobol(len(sizes), seed=0).random(DRAWN)
    squares = scipy.special.gammaincinv((np.array(sizes) - 1) / 2, np.clip(uniform, 1e-9, 1 - 1e-9))
    return squares / squares.sum(-1, keepdims=True), np.full(DRAWN, 1 / DRAWN)


def _true_shares(sizes: Sequence[int]) -> list[Array]:
    """Every share of the true noise that is tried; among arms of one size the order does not matter.  -> (A,) each"""
    if len(sizes) == 2:
        tried = LOGITS if sizes[0] != sizes[1] else LOGITS[LOGITS >= 0]
        return [np.array([share, 1 - share]) for share in scipy.special.expit(tried)]
    mixtures = {
        tuple(part / max(mix) for _, part in sorted(zip(sizes, mix, strict=True)))
        for mix in itertools.product(PARTS, repeat=len(sizes))
        if max(mix) > 0
    }
    return [np.array(mix) / sum(mix) for mix in sorted(mixtures)]
