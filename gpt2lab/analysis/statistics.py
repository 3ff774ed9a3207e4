"""Differences between arms and what they are worth: Welch's test, equivalence, and the adjustment for a family.

Every function takes arrays whose `axis` runs over seeds and keeps the leading dimensions, so that the code which judges
one study is the code which the self-test runs on thousands of drawn studies at once.

Shapes: (..., seed) values of one arm, (...) one comparison, (..., contrast) a family. A difference is arm minus
against, in the unit of the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from gpt2lab.analysis.best_rate import OwnBest
from gpt2lab.analysis.calibration import degrees, nominal_level, valid_p

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
    sizes: tuple[int, ...] = ()
    """seeds of each arm, which the calibration goes by; none where the noise is borrowed"""
    own_best: OwnBest | None = None
    """for arms whose rates were searched: the difference at each arm's own best rate, which p and intervals are of"""

    def critical(self, level: ArrayLike) -> Array:
        """Standard errors from the difference to the ends of its interval at 1 - level."""
        nominal = nominal_level(level, self.sizes) if self.sizes else np.asarray(level, dtype=np.float64)
        return np.asarray(-special.stdtrit(self.df, nominal / 2))

    def interval(self, level: ArrayLike) -> tuple[Array, Array]:
        """Between which two values the difference lies, at 1 - level."""
        critical = self.critical(level)
        low, high = self.difference - critical * self.se, self.difference + critical * self.se
        if self.own_best is None:
            return low, high
        ends = self.own_best.interval(float(critical))
        return np.minimum(low, ends[0]), np.maximum(high, ends[1])


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
    """interval at the level at which the contrast was decided: it leaves out zero exactly when p_holm < alpha"""
    joint_low: Array
    joint_high: Array
    """interval at 1 - alpha / m: all of these hold together with 1 - alpha"""
    same_low: Array
    same_high: Array
    """interval that equivalence goes by: inside +-margin exactly when p_equivalence_holm < alpha"""


def welch(
    arm: ArrayLike, against: ArrayLike, *, alpha: float = 0.05, margin: float | None = None, axis: int = -1
) -> Comparison:
    """Welch's t-test of arm minus against, its interval, and equivalence to within +-`margin`.  (..., seed) -> (...)

    p, interval and equivalence hold at any ratio of spreads and any number of seeds: see calibration.py. Statistic and,
    up to twice as many seeds in one arm as in the other, degrees of freedom are those of
    scipy.stats.ttest_ind(equal_var=False).
    """
    return linear([np.moveaxis(np.asarray(x, np.float64), axis, -1) for x in (arm, against)], [1.0, -1.0],
                  alpha=alpha, margin=margin)  # fmt: skip


def linear(
    arms: Sequence[ArrayLike], weights: Sequence[float], *, alpha: float = 0.05, margin: float | None = None
) -> Comparison:
    """The sum of weights x means of several arms, each with its own variance: main effects and interactions.

    arms: one (..., seed) each, with equal leading dimensions; -> (...). NaN, never a division by zero, where there is
    nothing to test with: fewer than two seeds in an arm, or no spread between the seeds of any arm (equal values to the
    last digit carry no information about noise).
    """
    values = [np.asarray(arm, dtype=np.float64) for arm in arms]
    difference = np.asarray(sum(w * _mean(v) for w, v in zip(weights, values, strict=True)))
    nothing = np.full(difference.shape, np.nan)
    sizes = tuple(v.shape[-1] for v in values)
    if min(sizes) < 2:
        return Comparison(difference, nothing, nothing, nothing, nothing, nothing, nothing)
    still = np.logical_and.reduce([no_spread(v) for v in values])
    parts = np.stack(
        [w**2 * v.var(-1, ddof=1) / v.shape[-1] for w, v in zip(weights, values, strict=True)], axis=-1
    )  # (..., arm)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.where(still, np.nan, parts.sum(-1))
        df = degrees(parts / variance[..., None], sizes)
        se = np.sqrt(variance)
        result = Comparison(difference, se, df, nothing, nothing, nothing, nothing, sizes)
        low, high = result.interval(alpha)
        equivalent = nothing if margin is None else _inside(result, margin)
        p = _two_sided(difference / se, df, sizes)
    return replace(result, p=p, low=low, high=high, p_equivalence=equivalent)


def at_own_best(comparison: Comparison, own_best: OwnBest, *, alpha: float, margin: float) -> Comparison:
    """The comparison with what the search of rates leaves open in its p, interval and equivalence; scalars only.

    The search makes nothing surer: each p is the larger, each interval the wider of the two.
    """
    found = replace(comparison, own_best=own_best)
    bounds = {at: float(own_best.distance(at)) for at in (0.0, -margin, margin)}
    p = np.maximum(comparison.p, _two_sided(np.asarray(bounds[0.0]), comparison.df, comparison.sizes))
    inside = abs(own_best.difference) < margin
    nearest = min(bounds[-margin], bounds[margin]) if inside else 0.0
    same = np.maximum(comparison.p_equivalence, _one_sided(np.asarray(nearest), comparison.df, comparison.sizes))
    low, high = found.interval(alpha)
    return replace(found, p=p, low=low, high=high, p_equivalence=same)


def _two_sided(t: Array, df: Array, sizes: tuple[int, ...]) -> Array:
    nominal = 2 * special.stdtr(df, -np.abs(t))
    return valid_p(nominal, sizes) if sizes else np.asarray(nominal)


def _one_sided(t: Array, df: Array, sizes: tuple[int, ...]) -> Array:
    """p of "not above": small for large t."""
    half = _two_sided(t, df, sizes) / 2
    return np.asarray(np.where(t >= 0, half, 1 - half))


def _inside(found: Comparison, margin: float) -> Array:
    """p of "the difference is at least as large as the margin": the larger of two one-sided p."""
    ends = (margin + found.difference) / found.se, (margin - found.difference) / found.se
    return np.maximum(*(_one_sided(np.asarray(t), found.df, found.sizes) for t in ends))


def borrowed(
    arm: ArrayLike, against: ArrayLike, *, sd: ArrayLike, df: float, margin: float, alpha: float = 0.05, axis: int = -1
) -> Comparison:
    """As `welch`, with the noise of other runs: `sd` of a baseline's repeats, times INFLATION, and its `df`.

    The only way to judge one or two seeds, and only as good as the loan.  (..., seed) -> (...)
    """
    a, b = (np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1) for x in (arm, against))
    difference = _mean(a) - _mean(b)
    nothing = np.full(difference.shape, np.nan)
    size = INFLATION * np.asarray(sd, dtype=np.float64) * np.sqrt(1 / max(a.shape[-1], 1) + 1 / max(b.shape[-1], 1))
    se, freedom = np.full(difference.shape, size), np.full(difference.shape, float(df))
    result = Comparison(difference, se, freedom, nothing, nothing, nothing, nothing)
    low, high = result.interval(alpha)
    return replace(result, p=_two_sided(difference / se, freedom, ()), low=low, high=high,
                   p_equivalence=_inside(result, margin))  # fmt: skip


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


def adjust(comparisons: Sequence[Comparison], *, alpha: float = 0.05, dropped: int = 0) -> Family:
    """Comparisons of the shape (...) as one family (..., contrast): Holm p values and intervals that agree with them.

    Two intervals are given. The joint one stands at 1 - alpha / m for m contrasts (Bonferroni), so that all of them
    hold together. Bonferroni is Holm's first step: wherever such an interval leaves out zero, Holm p < alpha. Holm's
    later steps are finer and may find a difference whose joint interval still touches zero; the interval that stands
    beside the word is then at the level of the step that found it. Each of those holds at 1 - alpha by itself.

    dropped: contrasts that were declared and are no longer compared; they count as members with p = 1.
    """
    difference, se, df, p, raw_low, raw_high, p_equivalence = (
        np.stack([getattr(c, name) for c in comparisons], axis=-1)
        for name in ("difference", "se", "df", "p", "low", "high", "p_equivalence")
    )
    m = p.shape[-1] + dropped
    p_holm, p_same = (_holm_among(values, dropped) for values in (p, p_equivalence))
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.where((p_holm < alpha) & (p * m >= alpha), p_holm / p, float(m))
        steps_same = np.where(p_same < alpha, p_same / p_equivalence, float(m))
        decided, joint, same = (
            [np.stack(ends, axis=-1) for ends in zip(*(c.interval(level[..., i]) for i, c in enumerate(comparisons)),
                                                     strict=True)]
            for level in (alpha / steps, np.full(p.shape, alpha / m), 2 * alpha / steps_same)
        )  # fmt: skip
    return Family(
        difference=difference, se=se, df=df, p=p, p_holm=p_holm,
        p_equivalence=p_equivalence, p_equivalence_holm=p_same,
        raw_low=raw_low, raw_high=raw_high, low=decided[0], high=decided[1],
        joint_low=joint[0], joint_high=joint[1], same_low=same[0], same_high=same[1],
    )  # fmt: skip


def _holm_among(p: Array, dropped: int) -> Array:
    absent = np.full((*p.shape[:-1], dropped), np.nan)
    return holm(np.concatenate([p, absent], axis=-1))[..., : p.shape[-1]]


def no_spread(values: Array) -> NDArray[np.bool_]:
    """Whether the values along the last axis are all the same, but for rounding.  (..., seed) -> (...)"""
    return np.asarray(np.ptp(values, axis=-1) <= ROUNDING * np.abs(values).max(axis=-1))


def _mean(values: Array) -> Array:
    """The mean over the last axis, NaN (and no warning) over nothing."""
    return np.asarray(values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan))
