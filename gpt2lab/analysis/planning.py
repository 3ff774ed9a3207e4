"""How many seeds, how small an effect, how exaggerated an estimate: arithmetic before and after a study.

Effects here are in units of the sd between seeds unless said otherwise.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, optimize, stats

from gpt2lab.analysis.statistics import Array

POWER = 0.8
UPPER = 0.8
"""Confidence of the upper limit of an sd that plans rely on."""


def sd_upper(sd: ArrayLike, df: ArrayLike, *, confidence: float = UPPER) -> Array:
    """The one-sided upper limit of a Gaussian sd that was estimated with `df` degrees of freedom (chi-square)."""
    df = np.asarray(df, dtype=np.float64)
    return np.asarray(np.asarray(sd) * np.sqrt(df / stats.chi2.ppf(1 - confidence, df)))


def seeds_for_halfwidth(
    sd: ArrayLike, halfwidth: float, *, confidence: float = 0.95, df_per_seed: ArrayLike = 2.0, weight: float = 2.0
) -> NDArray[np.int64]:
    """The smallest n per arm at which the interval of a difference is no wider than +-`halfwidth`.  (...) -> (...)

    sd:          between seeds, the same in both arms (or their root mean square), in the unit of `halfwidth`.
    confidence:  of the interval; 1 - alpha / m for one that is adjusted for m contrasts.
    df_per_seed: degrees of freedom gained per seed: 2 for equal sds, down to 1 when one arm makes all the noise.
    weight:      sum of the squared weights of the arms' means: 2 for one arm minus another.
    """
    spread, gain = np.broadcast_arrays(np.asarray(sd, dtype=np.float64), np.asarray(df_per_seed, dtype=np.float64))

    def wide(n: Array) -> Array:
        return np.asarray(stats.t.ppf((1 + confidence) / 2, gain * (n - 1)) * spread * np.sqrt(weight / n))

    enough = np.maximum(
        2.0, np.ceil(2 * (wide(np.full(spread.shape, 2.0)) / halfwidth) ** 2)
    )  # t only shrinks from 2 on
    short = np.ones(spread.shape)
    while np.any(enough - short > 1):  # bisection: `short` is too few, `enough` is enough
        middle = np.maximum(np.floor((short + enough) / 2), 2)
        fits = wide(middle) <= halfwidth
        enough, short = np.where(fits, middle, enough), np.where(fits, short, middle)
    return enough.astype(np.int64)


def power(effect: float, n_arm: float, n_against: float, *, alpha: float = 0.05, df: float | None = None) -> float:
    """Chance that a two-sided t-test finds a true difference of `effect` sd, with its right sign (noncentral t).

    Sizes need not be whole: a mean over k arms of n seeds each counts as k n seeds.
    statsmodels' TTestIndPower adds the chance of the wrong sign, which is nil wherever power matters, and is NaN there
    for degrees of freedom as small as Welch's.
    """
    freedom = n_arm + n_against - 2 if df is None else df
    shift = effect / math.sqrt(1 / n_arm + 1 / n_against)
    return float(stats.nct.sf(stats.t.isf(alpha / 2, freedom), freedom, shift))


def seeds_for_power(effect: float, *, alpha: float = 0.05, wanted: float = POWER) -> int:
    """The smallest n per arm at which a difference of `effect` sd is found with the power `wanted`."""
    if not effect > 0:
        raise ValueError(f"an effect of {effect} sd cannot be resolved by any number of seeds")
    few, enough = 1, 2
    while power(effect, enough, enough, alpha=alpha) < wanted:
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if power(effect, middle, middle, alpha=alpha) >= wanted else (middle, enough)
    return enough


@functools.lru_cache(maxsize=4096)
def detectable(
    n_arm: float, n_against: float, *, alpha: float = 0.05, df: float | None = None, wanted: float = POWER
) -> float:
    """The true difference, in sd, that a study of this size finds with the power `wanted`; infinity if none is."""

    def missing(effect: float) -> float:
        return power(effect, n_arm, n_against, alpha=alpha, df=df) - wanted

    freedom = n_arm + n_against - 2 if df is None else df
    if freedom <= 0:
        return math.inf
    scale = math.sqrt(1 / n_arm + 1 / n_against)
    # t quantile + a margin that power .8 or .9 never needs; the noncentral t loses its digits far beyond it
    highest = scale * (2 * float(stats.t.ppf(1 - alpha / 2, freedom)) + 5)
    return float(optimize.brentq(missing, 1e-9, highest)) if missing(highest) > 0 else math.inf


def exaggeration(
    effect: float, n_arm: float, n_against: float, *, df: float, alpha: float = 0.05, inflation: float = 1.0
) -> float:
    """How many times too large an estimate is on average, given that it was significant and `effect` sd is true.

    The estimate is Gaussian, the squared standard error an independent chi-square with `df` degrees of freedom, whose
    root the test multiplies by `inflation`.  Source: Gelman and Carlin 2014 (type M error), integrated here.
    """
    se = math.sqrt(1 / n_arm + 1 / n_against)
    bar = float(stats.t.ppf(1 - alpha / 2, df)) * se * inflation

    def passing(x: float) -> float:
        return float(stats.norm.pdf(x, effect, se) * stats.chi2.cdf(df * (x / bar) ** 2, df))

    ends = (effect - 9 * se, effect + 9 * se)
    passed = integrate.quad(passing, *ends, limit=200)[0]
    return float(integrate.quad(lambda x: abs(x) * passing(x), *ends, limit=200)[0] / passed / effect)
