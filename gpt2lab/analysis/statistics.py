"""Differences between arms and what they are worth: Welch's test, equivalence, and the adjustment for a family.

Every function takes arrays whose `axis` runs over seeds and keeps the leading dimensions, so that the code which judges
one study is the code which the self-test runs on thousands of drawn studies at once.

Shapes: (..., seed) values of one arm, (...) one comparison, (..., contrast) a family. Lower is better: difference is
arm minus against, in the unit of the metric.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

ROUNDING = 16 * float(np.finfo(np.float64).eps)
"""Values of a size that differ by less than this share of it differ by rounding alone."""

INFLATION = 1.5
"""Borrowed noise is multiplied by this: an arm may be noisier than the baseline that lent it."""


@dataclass(frozen=True)
class Comparison:
    """One arm against another; every field has the shape (...), NaN where it cannot be computed."""

    difference: Array
    se: Array
    df: Array
    p: Array
    """two-sided, no adjustment"""
    low: Array
    high: Array
    """interval at 1 - alpha, no adjustment"""
    p_equivalence: Array
    """of "the difference is at least as large as the margin", no adjustment; NaN without a margin"""


@dataclass(frozen=True)
class Family:
    """The comparisons of one study, judged together; every field has the shape (..., contrast)."""

    difference: Array
    se: Array
    df: Array
    p: Array
    p_holm: Array
    p_equivalence: Array
    p_equivalence_holm: Array
    raw_low: Array
    raw_high: Array
    low: Array
    high: Array


def welch(
    arm: ArrayLike, against: ArrayLike, *, alpha: float = 0.05, margin: float | None = None, axis: int = -1
) -> Comparison:
    """Welch's t-test of arm minus against, its interval, and equivalence to within +-`margin`.  (..., seed) -> (...)

    NaN, never a division by zero, where there is nothing to test with: fewer than two seeds in an arm, or no spread
    between the seeds of either arm (equal values to the last digit carry no information about noise).
    Source: scipy.stats.ttest_ind(equal_var=False).
    """
    a, b = (np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1) for x in (arm, against))
    difference = _mean(a) - _mean(b)
    nothing = np.full(difference.shape, np.nan)
    if a.shape[-1] < 2 or b.shape[-1] < 2:
        return Comparison(difference, nothing, nothing, nothing, nothing, nothing, nothing)
    still = no_spread(a) & no_spread(b)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # scipy warns of lost precision when one arm has no spread; `still` decides below what may be used.
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_ind(a, b, axis=-1, equal_var=False)
        interval = test.confidence_interval(1 - alpha)
        equivalent = nothing if margin is None else _two_one_sided(a, b, margin)
    se = np.sqrt(a.var(-1, ddof=1) / a.shape[-1] + b.var(-1, ddof=1) / b.shape[-1])
    se, df, p, low, high, equivalent = (
        np.where(still, np.nan, x) for x in (se, test.df, test.pvalue, interval.low, interval.high, equivalent)
    )
    return Comparison(difference, se, df, p, low, high, equivalent)


def equivalence(arm: ArrayLike, against: ArrayLike, margin: float, *, axis: int = -1) -> Array:
    """p of "the arms differ by `margin` or more": two one-sided Welch tests, the larger p.  (..., seed) -> (...)"""
    return welch(arm, against, margin=margin, axis=axis).p_equivalence


def _two_one_sided(a: Array, b: Array, margin: float) -> Array:
    above = stats.ttest_ind(a + margin, b, axis=-1, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(a - margin, b, axis=-1, equal_var=False, alternative="less").pvalue
    return np.asarray(np.maximum(above, below))


def linear(
    arms: Sequence[ArrayLike], weights: Sequence[float], *, alpha: float = 0.05, margin: float | None = None
) -> Comparison:
    """The sum of weights x means of several arms, each with its own variance: main effects and interactions.

    arms: one (..., seed) each, with equal leading dimensions; -> (...). With the weights 1 and -1 it is `welch`, whose
    degrees of freedom are the same approximation for two arms.  Source: Satterthwaite 1946, Biometrics Bulletin 2(6).
    """
    values = [np.asarray(arm, dtype=np.float64) for arm in arms]
    difference = np.asarray(sum(w * _mean(v) for w, v in zip(weights, values, strict=True)))
    nothing = np.full(difference.shape, np.nan)
    if min(v.shape[-1] for v in values) < 2:
        return Comparison(difference, nothing, nothing, nothing, nothing, nothing, nothing)
    parts = [w**2 * v.var(-1, ddof=1) / v.shape[-1] for w, v in zip(weights, values, strict=True)]
    still = np.logical_and.reduce([no_spread(v) for v in values])
    variance = np.where(still, np.nan, sum(parts))
    with np.errstate(all="ignore"):
        df = variance**2 / sum(part**2 / (v.shape[-1] - 1) for part, v in zip(parts, values, strict=True))
        se = np.sqrt(variance)
        p = 2 * stats.t.sf(np.abs(difference) / se, df)
        low, high = stats.t.interval(1 - alpha, df, loc=difference, scale=se)
        equivalent = nothing if margin is None else _inside(difference, se, df, margin)
    return Comparison(difference, se, df, *(np.asarray(x) for x in (p, low, high, equivalent)))


def _inside(difference: Array, se: Array, df: Array, margin: float) -> Array:
    """p of "the difference is at least as large as the margin": the larger of two one-sided p."""
    return np.asarray(
        np.maximum(stats.t.sf((difference + margin) / se, df), stats.t.cdf((difference - margin) / se, df))
    )


def borrowed(
    arm: ArrayLike, against: ArrayLike, *, sd: float, df: float, margin: float, alpha: float = 0.05, axis: int = -1
) -> Comparison:
    """As `welch`, with the noise of other runs: `sd` of a baseline's repeats, times INFLATION, and its `df`.

    The only way to judge one or two seeds, and only as good as the loan.  (..., seed) -> (...)
    """
    a, b = (np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1) for x in (arm, against))
    difference = _mean(a) - _mean(b)
    size = INFLATION * sd * np.sqrt(1 / max(a.shape[-1], 1) + 1 / max(b.shape[-1], 1))
    se, freedom = np.full(difference.shape, size), np.full(difference.shape, float(df))
    p = 2 * stats.t.sf(np.abs(difference) / se, freedom)
    low, high = stats.t.interval(1 - alpha, freedom, loc=difference, scale=se)
    equivalent = _inside(difference, se, freedom, margin)
    return Comparison(difference, se, freedom, *(np.asarray(x) for x in (p, low, high, equivalent)))


def holm(p: ArrayLike) -> Array:
    """Holm's step-down adjustment over the last axis.  (..., contrast) -> (..., contrast)

    A comparison without a p (NaN) still counts as a member of the family, as if its p were 1, and stays NaN.
    Written here because statsmodels' `multipletests` takes one family at a time; a test holds the two equal.
    """
    values = np.asarray(p, dtype=np.float64)
    known = np.where(np.isnan(values), 1.0, values)
    order = np.argsort(known, axis=-1, kind="stable")
    left = known.shape[-1] - np.arange(known.shape[-1])
    ascending = np.maximum.accumulate(np.take_along_axis(known, order, -1) * left, axis=-1)
    adjusted = np.empty_like(known)
    np.put_along_axis(adjusted, order, np.minimum(ascending, 1.0), -1)
    return np.where(np.isnan(values), np.nan, adjusted)


def adjust(comparisons: Sequence[Comparison], *, alpha: float = 0.05) -> Family:
    """Comparisons of the shape (...) as one family (..., contrast): Holm p values and intervals that agree with them.

    Intervals stand at 1 - alpha / m for m contrasts (Bonferroni), so that all of them hold together. Bonferroni is
    Holm's first step: wherever such an interval leaves out zero, Holm p < alpha. Holm's later steps are finer and may
    find a difference whose Bonferroni interval still touches zero; that one interval stands at the level of the step
    that found it. So an interval leaves out zero exactly when Holm p < alpha, and no word contradicts its interval.
    """
    difference, se, df, p, raw_low, raw_high, p_equivalence = (
        np.stack([getattr(c, name) for c in comparisons], axis=-1)
        for name in ("difference", "se", "df", "p", "low", "high", "p_equivalence")
    )
    p_holm = holm(p)
    with np.errstate(invalid="ignore", divide="ignore"):
        rescued = (p_holm < alpha) & (p * p.shape[-1] >= alpha)
        steps = np.where(rescued, p_holm / p, float(p.shape[-1]))
        low, high = stats.t.interval(1 - alpha / steps, df, loc=difference, scale=se)
    return Family(
        difference=difference, se=se, df=df, p=p, p_holm=p_holm,
        p_equivalence=p_equivalence, p_equivalence_holm=holm(p_equivalence),
        raw_low=raw_low, raw_high=raw_high, low=np.asarray(low), high=np.asarray(high),
    )  # fmt: skip


def equivalence_interval(
    difference: float, se: float, df: float, p: float, p_holm: float, alpha: float
) -> tuple[float, float]:
    """The interval that two one-sided tests judge by: inside +-margin exactly when their Holm p < alpha.

    At 1 - 2 alpha for one contrast (the 90 % interval); for a family, at the level of Holm's step for this p.
    """
    low, high = stats.t.interval(1 - 2 * alpha * p / p_holm, df, loc=difference, scale=se)
    return float(low), float(high)


def no_spread(values: Array) -> NDArray[np.bool_]:
    """Whether the values along the last axis are all the same, but for rounding.  (..., seed) -> (...)"""
    return np.asarray(np.ptp(values, axis=-1) <= ROUNDING * np.abs(values).max(axis=-1))


def _mean(values: Array) -> Array:
    """The mean over the last axis, NaN (and no warning) over nothing."""
    return np.asarray(values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan))
