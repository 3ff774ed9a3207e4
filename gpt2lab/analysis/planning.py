"""Planning: numbers of seeds, detectable effects, exaggeration, and the levels of interim looks.

Effects are in units of the sd between seeds unless stated otherwise. Power is that of the test that decides verdicts
(see calibration.py) with equally noisy arms.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from gpt2lab.analysis.calibration import nominal_level, power
from gpt2lab.analysis.statistics import Array

POWER = 0.8
UPPER = 0.8
"""Confidence of the upper limit of an sd that plans rely on."""
CALIBRATED = 30
"""Seeds per arm beyond which the calibration of Welch's test hardly changes."""

PAIR = (1.0, -1.0)

FIRST = 0.8
"""Share of alpha for the declared seeds, or looks."""
LATER = 0.07
"""Share of alpha for each look after seeds were added. The rest stays unspent, for the same reason as SPENT."""
SPENT = {1: 1.0, 2: 0.9, 3: 0.9}
"""Share of their alpha that so many declared looks spend, more than three SPENT_BY_MORE: the t statistics of few seeds
move more from look to look than the Gaussian ones from which levels are computed."""
SPENT_BY_MORE = 0.8
MULTIPLES = (2, 4)
"""Multiples of the declared seeds at which added ones are judged."""
NODES = 400
"""Quadrature nodes per look."""


def sd_upper(sd: ArrayLike, df: ArrayLike) -> Array:
    """The one-sided upper limit of a Gaussian sd that was estimated with `df` degrees of freedom (chi-square)."""
    df = np.asarray(df, dtype=np.float64)
    return np.asarray(np.asarray(sd) * np.sqrt(df / (2 * scipy.special.gammaincinv(df / 2, 1 - UPPER))))


def seeds_for_halfwidth(
    sd: float, halfwidth: float, *, alpha: float = 0.05, df_per_seed: float = 2.0, weight: float = 2.0
) -> int:
    """The smallest n per arm at which the interval of a difference is no wider than +-`halfwidth`.

    sd:          between seeds, the same in both arms (or their root mean square), in the unit of `halfwidth`.
    alpha:       1 - the confidence of the interval; alpha / m for one that is adjusted for m contrasts.
    df_per_seed: degrees of freedom gained per seed: 2 for equal sds, down to 1 when one arm makes all the noise.
    weight:      sum of the squared weights of the arms' means: 2 for one arm minus another.
    """

    def fits(n: int) -> bool:
        nominal = float(nominal_level(alpha, (min(n, CALIBRATED),) * 2))
        quantile = -float(scipy.special.stdtrit(df_per_seed * (n - 1), nominal / 2))
        return quantile * sd * math.sqrt(weight / n) <= halfwidth

    return smallest(fits)


def seeds_for_power(effect: float, *, alpha: float = 0.05) -> int:
    """The smallest n per arm at which a difference of `effect` sd is found with the power POWER."""
    if not effect > 0:
        raise ValueError(f"an effect of {effect} sd cannot be resolved by any number of seeds")
    return smallest(lambda n: power(effect, (n, n), alpha=alpha) >= POWER)


def smallest(enough: Callable[[int], bool]) -> int:
    """The smallest n from 2 on that is enough, given that all larger ones are too."""
    most = 2
    while not enough(most):
        most *= 2
    return bisect.bisect_left(range(most), True, lo=max(2, most // 2), key=enough)


HOPELESS = 500.0
"""A quantile of t beyond which nothing is called detectable; scipy's noncentral t does not converge far beyond it."""


@functools.lru_cache(maxsize=4096)
def detectable(
    sizes: tuple[int, ...], weights: tuple[float, ...] = PAIR, *, alpha: float = 0.05, df: float | None = None
) -> float:
    """The true difference, in sd, that arms of these sizes detect with the power POWER; else infinity.

    df: degrees of freedom of a noise estimated from other runs; from the arms unless given.
    """
    if df is None and min(sizes) < 2:
        return math.inf
    scale = math.sqrt(sum(w**2 / n for w, n in zip(weights, sizes, strict=True)))
    quantile = -float(scipy.special.stdtrit(df or min(sizes) - 1, _nominal(alpha, sizes, df) / 2))
    if quantile > HOPELESS:
        return math.inf
    # this power never needs more, and the noncentral t loses precision far beyond it
    largest = scale * (2 * quantile + 5)

    def shortfall(effect: float) -> float:
        if df is None:
            return power(effect, sizes, weights, alpha=alpha) - POWER
        return 1 - float(scipy.special.nctdtr(df, effect / scale, quantile)) - POWER

    return float(scipy.optimize.brentq(shortfall, 1e-9, largest, xtol=1e-4)) if shortfall(largest) > 0 else math.inf


def exaggeration(
    sizes: tuple[int, ...], weights: tuple[float, ...] = PAIR, *, df: float, alpha: float = 0.05,
    inflation: float | None = None,
) -> float:  # fmt: skip
    """The mean factor by which a significant estimate is too large where the true effect is one sd.

    The estimate is Gaussian, the squared standard error an independent chi-square with `df` degrees of freedom.
    inflation: factor on a noise estimated from other runs; None for the arms' noise.
    Source: Gelman and Carlin 2014 (type M error), integrated here.
    """
    se = math.sqrt(sum(w**2 / n for w, n in zip(weights, sizes, strict=True)))
    nominal = _nominal(alpha, sizes, None if inflation is None else df)
    bar = -float(scipy.special.stdtrit(df, nominal / 2)) * se * (inflation or 1.0)

    def passing(x: float) -> float:
        return float(_density((x - 1) / se) / se * scipy.special.chdtr(df, df * (x / bar) ** 2))

    ends = (1 - 9 * se, 1 + 9 * se)
    passed = scipy.integrate.quad(passing, *ends, limit=200)[0]
    return float(scipy.integrate.quad(lambda x: abs(x) * passing(x), *ends, limit=200)[0] / passed)


def _nominal(alpha: float, sizes: tuple[int, ...], df: float | None) -> float:
    """The level of the t quantile; with the `df` of a noise estimated from other runs it needs no calibration."""
    return alpha if df is not None else float(nominal_level(alpha, sizes))


# Interim looks. Testing after every seed and stopping at the first significant result is wrong in one null study out of
# seven. Here each look has its own level, so that all of them together keep alpha, and nothing is judged in between.
# Looks are declared beforehand, or they are those of every study: after a verdict seeds may be added, and open
# contrasts are judged again at twice and four times the seeds, for which a fifth of alpha is reserved.


@dataclass(frozen=True)
class Look:
    """Seeds per arm, and the level at which contrasts are judged there."""

    n: int
    level: float
    note: str = ""
    """for the verdict: which of several looks it is"""
    declared: bool = True
    """whether it was declared; else it is reached by adding seeds"""


def declared_looks(looks: Sequence[int], alpha: float) -> tuple[Look, ...]:
    """Looks at these numbers of seeds, each at the same level (Pocock 1977)."""
    level, count = look_alpha(tuple(looks), alpha), len(looks)
    return tuple(
        Look(n, level, f"look {i} of {count} (n = {n}), each at alpha {level:g}") for i, n in enumerate(looks, 1)
    )


def extendable_looks(looks: Sequence[int], alpha: float) -> tuple[Look, ...]:
    """The declared looks (one, where seeds alone were declared), and those at which added seeds are judged."""
    first = declared_looks(looks, FIRST * alpha)
    seeds = [multiple * looks[-1] for multiple in MULTIPLES]
    levels = _later_levels(tuple(looks), alpha)
    return (
        *(first if len(looks) > 1 else (Look(looks[0], first[0].level),)),
        *(Look(n, a, f"judged again at {n} seeds, at alpha {a:g}", False) for n, a in zip(seeds, levels, strict=True)),
    )


@functools.lru_cache(maxsize=256)
def look_alpha(looks: tuple[int, ...], alpha: float = 0.05) -> float:
    """The level of each look at which all of them together err with probability `alpha`, rounded down to 4 places.

    The same at every look (Pocock 1977), for Gaussian means of 3, 5, 8, ... seeds that share their first ones; of alpha
    only the share SPENT.
    """
    if len(looks) == 1:
        return alpha
    spent = _spent(looks) * alpha
    bound = scipy.optimize.brentq(lambda c: _crossing([c] * len(looks), looks) - spent, 0.5, 8.0, xtol=1e-9)
    return _level(bound)


def _spent(looks: Sequence[int]) -> float:
    return SPENT.get(len(looks), SPENT_BY_MORE)


@functools.lru_cache(maxsize=256)
def _later_levels(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """The levels of the looks after the declared ones: each adds LATER x alpha to the chance of any false claim."""
    seeds, levels = list(looks), []
    bounds = [-float(scipy.special.ndtri(look_alpha(looks, FIRST * alpha) / 2))] * len(looks)
    for i, multiple in enumerate(MULTIPLES, 1):
        seeds.append(multiple * looks[-1])
        spent = (FIRST * _spent(looks) + i * LATER) * alpha
        bounds.append(scipy.optimize.brentq(lambda c, s=spent: _crossing([*bounds, c], seeds) - s, 0.5, 8.0, xtol=1e-9))
        levels.append(_level(bounds[-1]))
    return tuple(levels)


def _level(bound: float) -> float:
    return math.floor(2 * float(scipy.special.ndtr(-bound)) * 1e4) / 1e4


def _density(z: ArrayLike) -> Array:
    """Of the standard normal distribution."""
    return np.asarray(np.exp(-(np.asarray(z) ** 2) / 2) / math.sqrt(2 * math.pi))


@functools.cache
def _quadrature() -> tuple[Array, Array]:
    """Nodes and weights of Gauss and Legendre on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return np.asarray(nodes), np.asarray(weights)


def _crossing(bounds: Sequence[float], looks: Sequence[int]) -> float:
    """Probability that |z| exceeds its bound at any look, by quadrature over the running sum of seeds."""
    nodes, weights = _quadrature()
    half = bounds[0] * math.sqrt(looks[0])  # the sum of n standard normal seeds stays within +-bound sqrt(n)
    at = nodes * half
    density = _density(at / math.sqrt(looks[0])) / math.sqrt(looks[0]) * weights * half
    for (before, now), bound in zip(itertools.pairwise(looks), bounds[1:], strict=True):
        half = bound * math.sqrt(now)
        scale = math.sqrt(now - before)
        step = _density((nodes[:, None] * half - at[None, :]) / scale) / scale
        at, density = nodes * half, (step @ density) * weights * half
    return 1.0 - float(density.sum())
