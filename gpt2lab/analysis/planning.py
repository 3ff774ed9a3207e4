"""How many seeds, how small an effect, how exaggerated an estimate: arithmetic before and after a study.

Effects here are in units of the sd between seeds unless said otherwise. Power is that of the very test that writes
verdicts, see calibration.py, where all arms are equally noisy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate, optimize, stats

from gpt2lab.analysis.calibration import nominal_level, power
from gpt2lab.analysis.statistics import Array

POWER = 0.8
UPPER = 0.8
"""Confidence of the upper limit of an sd that plans rely on."""
CALIBRATED = 30
"""Seeds per arm beyond which the calibration of Welch's test hardly changes."""

PAIR = (1.0, -1.0)


def sd_upper(sd: ArrayLike, df: ArrayLike, *, confidence: float = UPPER) -> Array:
    """The one-sided upper limit of a Gaussian sd that was estimated with `df` degrees of freedom (chi-square)."""
    df = np.asarray(df, dtype=np.float64)
    return np.asarray(np.asarray(sd) * np.sqrt(df / stats.chi2.ppf(1 - confidence, df)))


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
        quantile = float(stats.t.isf(nominal / 2, df_per_seed * (n - 1)))
        return quantile * sd * math.sqrt(weight / n) <= halfwidth

    return _smallest(fits, 2)


def seeds_for_power(effect: float, *, alpha: float = 0.05, wanted: float = POWER) -> int:
    """The smallest n per arm at which a difference of `effect` sd is found with the power `wanted`."""
    if not effect > 0:
        raise ValueError(f"an effect of {effect} sd cannot be resolved by any number of seeds")
    return _smallest(lambda n: power(effect, (n, n), alpha=alpha) >= wanted, 2)


def _smallest(enough: Callable[[int], bool], least: int) -> int:
    """The smallest n from `least` on that is enough, where all larger ones are too."""
    few, many = least - 1, least
    while not enough(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


@functools.lru_cache(maxsize=4096)
def detectable(
    sizes: tuple[int, ...], weights: tuple[float, ...] = PAIR, *, alpha: float = 0.05, wanted: float = POWER,
    df: float | None = None,
) -> float:  # fmt: skip
    """The true difference, in sd, that arms of so many seeds show with the power `wanted`; infinity if none is.

    df: degrees of freedom of a noise that is known from elsewhere; the arms' own unless given.
    """
    if df is None and min(sizes) < 2:
        return math.inf
    scale = math.sqrt(sum(w**2 / n for w, n in zip(weights, sizes, strict=True)))
    quantile = float(stats.t.isf(_nominal(alpha, sizes, df) / 2, df or min(sizes) - 1))
    # a margin that power .8 or .9 never needs; the noncentral t loses its digits far beyond it
    highest = scale * (2 * quantile + 5)

    def missing(effect: float) -> float:
        if df is None:
            return power(effect, sizes, weights, alpha=alpha) - wanted
        return float(stats.nct.sf(quantile, df, effect / scale)) - wanted

    return float(optimize.brentq(missing, 1e-9, highest, xtol=1e-4)) if missing(highest) > 0 else math.inf


def exaggeration(
    effect: float, sizes: tuple[int, ...], weights: tuple[float, ...] = PAIR, *, df: float, alpha: float = 0.05,
    inflation: float | None = None,
) -> float:  # fmt: skip
    """How many times too large an estimate is on average, given that it was significant and `effect` sd is true.

    The estimate is Gaussian, the squared standard error an independent chi-square with `df` degrees of freedom.
    inflation: factor on a noise that is known from elsewhere; the arms' own noise unless given.
    Source: Gelman and Carlin 2014 (type M error), integrated here.
    """
    se = math.sqrt(sum(w**2 / n for w, n in zip(weights, sizes, strict=True)))
    nominal = _nominal(alpha, sizes, None if inflation is None else df)
    bar = float(stats.t.isf(nominal / 2, df)) * se * (inflation or 1.0)

    def passing(x: float) -> float:
        return float(stats.norm.pdf(x, effect, se) * stats.chi2.cdf(df * (x / bar) ** 2, df))

    ends = (effect - 9 * se, effect + 9 * se)
    passed = integrate.quad(passing, *ends, limit=200)[0]
    return float(integrate.quad(lambda x: abs(x) * passing(x), *ends, limit=200)[0] / passed / effect)


def _nominal(alpha: float, sizes: tuple[int, ...], df: float | None) -> float:
    """The level that the t quantile stands at; `df` of a noise that is known from elsewhere needs no calibration."""
    return alpha if df is not None else float(nominal_level(alpha, sizes))
