"""Tests of differences between arms: Welch's test, equivalence, the adjustment for a family; also other estimators for
the sensitivity table, and the standard error over validation documents.

The functions up to `adjust` keep leading dimensions, so that the self-test runs the code that judges one study on
thousands of simulated studies at once. Shapes: (..., seed) values of one arm, (...) one comparison, (..., contrast) a
family. A difference is arm minus against, in the unit of the metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from gpt2lab.analysis.best_rate import BestRateDifference
from gpt2lab.analysis.calibration import degrees, nominal_level, valid_p

Array = NDArray[np.float64]

ROUNDING = 16 * float(np.finfo(np.float64).eps)
"""Relative difference below which values differ by rounding only."""

INFLATION = 1.5
"""Borrowed noise is multiplied by this: an arm may be noisier than the baseline that the noise was measured on."""
LEAST_TO_PERMUTE = 4
MOST_PERMUTATIONS = 20_000
RELABELLINGS = 9_999
"""Drawn at random where all of them are more than MOST_PERMUTATIONS."""
BATCH = 100
"""Relabellings that are held in memory at a time."""

Runs = Mapping[str, float]
"""seed -> final value of one arm, failed runs left out"""


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
    """seeds of each arm, which the calibration depends on; empty where the noise is borrowed"""
    best_rates: BestRateDifference | None = None
    """for arms whose rates were searched: the difference at each arm's best rate, to which p and intervals refer"""

    def critical(self, level: ArrayLike) -> Array:
        """Standard errors from the difference to either end of its 1 - level interval."""
        nominal = nominal_level(level, self.sizes) if self.sizes else np.asarray(level, dtype=np.float64)
        return np.asarray(-scipy.special.stdtrit(self.df, nominal / 2))

    def interval(self, level: ArrayLike) -> tuple[Array, Array]:
        """The 1 - level confidence interval of the difference."""
        critical = self.critical(level)
        low, high = self.difference - critical * self.se, self.difference + critical * self.se
        if self.best_rates is None:
            return low, high
        ends = self.best_rates.interval(float(critical))
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
    """interval of the equivalence test: inside +-margin exactly when p_equivalence_holm < alpha"""


def welch(arm: ArrayLike, against: ArrayLike, *, alpha: float = 0.05, margin: float | None = None) -> Comparison:
    """Welch's t-test of arm minus against, its interval, and equivalence to within +-`margin`.  (..., seed) -> (...)

    p, interval and equivalence hold at any ratio of spreads and any number of seeds: see calibration.py. Statistic and,
    up to twice as many seeds in one arm as in the other, degrees of freedom are those of
    scipy.stats.ttest_ind(equal_var=False).
    """
    return linear([arm, against], [1.0, -1.0], alpha=alpha, margin=margin)


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
        equivalent = nothing if margin is None else _equivalence(result, margin)
        p = _two_sided(difference / se, df, sizes)
    return replace(result, p=p, low=low, high=high, p_equivalence=equivalent)


def at_best_rates(comparison: Comparison, best: BestRateDifference, *, alpha: float, margin: float) -> Comparison:
    """The comparison with the uncertainty of the rate search in its p, interval and equivalence; scalars only.

    Accounting for the search never makes a result more certain: each p is the larger, each interval the wider of both.
    """
    widened = replace(comparison, best_rates=best)
    distances = {value: float(best.distance(value)) for value in (0.0, -margin, margin)}
    p = np.maximum(comparison.p, _two_sided(np.asarray(distances[0.0]), comparison.df, comparison.sizes))
    nearest = min(distances[-margin], distances[margin]) if abs(best.difference) < margin else 0.0
    same = np.maximum(comparison.p_equivalence, _one_sided(np.asarray(nearest), comparison.df, comparison.sizes))
    low, high = widened.interval(alpha)
    return replace(widened, p=p, low=low, high=high, p_equivalence=same)


def _two_sided(t: Array, df: Array, sizes: tuple[int, ...]) -> Array:
    nominal = 2 * scipy.special.stdtr(df, -np.abs(t))
    return valid_p(nominal, sizes) if sizes else np.asarray(nominal)


def _one_sided(t: Array, df: Array, sizes: tuple[int, ...]) -> Array:
    """One-sided p, small for large t."""
    half = _two_sided(t, df, sizes) / 2
    return np.asarray(np.where(t >= 0, half, 1 - half))


def _equivalence(c: Comparison, margin: float) -> Array:
    """p of "the difference is at least as large as the margin": the larger of two one-sided p (TOST)."""
    ends = (margin + c.difference) / c.se, (margin - c.difference) / c.se
    return np.maximum(*(_one_sided(np.asarray(t), c.df, c.sizes) for t in ends))


def borrowed(
    arm: ArrayLike, against: ArrayLike, *, sd: ArrayLike, df: float, margin: float, alpha: float = 0.05
) -> Comparison:
    """As `welch`, with the noise of other runs: `sd` of a baseline's repeats, times INFLATION, and its `df`.

    The only way to judge one or two seeds; valid if the arms are no noisier than that.  (..., seed) -> (...)
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (arm, against))
    difference = _mean(a) - _mean(b)
    nothing = np.full(difference.shape, np.nan)
    size = INFLATION * np.asarray(sd, dtype=np.float64) * np.sqrt(1 / max(a.shape[-1], 1) + 1 / max(b.shape[-1], 1))
    se, freedom = np.full(difference.shape, size), np.full(difference.shape, float(df))
    result = Comparison(difference, se, freedom, nothing, nothing, nothing, nothing)
    low, high = result.interval(alpha)
    return replace(result, p=_two_sided(difference / se, freedom, ()), low=low, high=high,
                   p_equivalence=_equivalence(result, margin))  # fmt: skip


def holm(p: ArrayLike, *, dropped: int = 0) -> Array:
    """Holm's step-down adjustment over the last axis.  (..., contrast) -> (..., contrast)

    A comparison without a p (NaN) still counts as a member of the family, as if its p were 1, and stays NaN; so do
    `dropped` further ones. Vectorised over families, unlike statsmodels' `multipletests`, to which a test compares it.
    """
    values = np.asarray(p, dtype=np.float64)
    filled = np.where(np.isnan(values), 1.0, values)
    order = np.argsort(filled, axis=-1, kind="stable")
    remaining = filled.shape[-1] + dropped - np.arange(filled.shape[-1])
    ascending = np.maximum.accumulate(np.take_along_axis(filled, order, -1) * remaining, axis=-1)
    adjusted = np.empty_like(filled)
    np.put_along_axis(adjusted, order, np.minimum(ascending, 1.0), -1)
    return np.where(np.isnan(values), np.nan, adjusted)


def adjust(comparisons: Sequence[Comparison], *, alpha: float = 0.05, dropped: int = 0) -> Family:
    """Comparisons of the shape (...) as one family (..., contrast): Holm p values and intervals that agree with them.

    Joint intervals have level 1 - alpha / m for m contrasts (Bonferroni), so that all of them hold together. Bonferroni
    is Holm's first step: wherever such an interval excludes zero, Holm p < alpha. Holm's later steps are finer and may
    find a difference whose joint interval still includes zero; the interval of the verdict is then at the level of
    the step that found it, and holds at 1 - alpha by itself.

    dropped: contrasts that were declared and are no longer compared; they count as members with p = 1.
    """
    difference, se, df, p, raw_low, raw_high, p_equivalence = (
        np.stack([getattr(c, name) for c in comparisons], axis=-1)
        for name in ("difference", "se", "df", "p", "low", "high", "p_equivalence")
    )
    m = p.shape[-1] + dropped
    p_holm, p_same = (holm(values, dropped=dropped) for values in (p, p_equivalence))
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


def no_spread(values: Array) -> NDArray[np.bool_]:
    """Whether the values along the last axis are all the same, but for rounding.  (..., seed) -> (...)"""
    return np.asarray(np.ptp(values, axis=-1) <= ROUNDING * np.abs(values).max(axis=-1))


def _mean(values: Array) -> Array:
    """The mean over the last axis, NaN (and no warning) over nothing."""
    return np.asarray(values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan))


def sensitivity(
    runs: Mapping[str, Runs], arms: Sequence[str], against: str, *, alpha: float
) -> dict[str, dict[str, dict[str, float]]]:
    """arm -> name -> {p, n, ...} of every other estimator that these runs allow. None decides a verdict; the report
    mentions disagreement with Welch's test."""
    estimators = {
        "paired": {arm: paired(runs[arm], runs[against], alpha=alpha) for arm in arms},
        "blocked": blocked(runs, arms, against, alpha=alpha),
        "permutation": permutation(runs, arms, against),
    }
    return {arm: {name: own for name, results in estimators.items() if (own := results.get(arm))} for arm in arms}


def paired(arm: Runs, against: Runs, *, alpha: float = 0.05) -> dict[str, float]:
    """Paired t-test over the seeds that both arms have: difference, low, high, p, n. Empty when it cannot be done."""
    seeds = sorted(arm.keys() & against.keys())
    first, second = (np.array([runs[seed] for seed in seeds]) for runs in (arm, against))
    if len(first) < 2 or bool(no_spread(first - second)):
        return {}
    differences = first - second
    se = differences.std(ddof=1) / math.sqrt(len(first))
    return _tested(differences.mean(), se, len(first) - 1, alpha, len(first))


def blocked(
    runs: Mapping[str, Runs], arms: Sequence[str], against: str, *, alpha: float = 0.05
) -> dict[str, dict[str, float]]:
    """arm -> {difference, low, high, p, n}, where it can be done: an analysis of variance with arm and seed as factors,
    over all arms at the seeds that the two share (OLS)."""
    shared = {arm: tuple(sorted(runs[arm].keys() & runs[against].keys())) for arm in arms}
    effects = {seeds: _arm_effects(runs, against, seeds) for seeds in set(shared.values())}
    return {
        arm: _tested(*effects[seeds][arm], alpha, len(seeds)) for arm, seeds in shared.items() if arm in effects[seeds]
    }


def _arm_effects(runs: Mapping[str, Runs], against: str, seeds: Sequence[str]) -> dict[str, tuple[float, float, int]]:
    """Arm -> its effect, the standard error of that, and its degrees of freedom; empty where there is no residual."""
    if len(seeds) < 2:
        return {}
    rows = [(name, seed, values[seed]) for name, values in runs.items() for seed in seeds if seed in values]
    names = sorted({name for name, _, _ in rows} - {against})
    values = np.array([value for _, _, value in rows])
    of_arm, of_seed = (np.array([row[factor] for row in rows])[:, None] for factor in (0, 1))  # (row, 1)
    columns = [np.ones((len(rows), 1)), of_arm == np.array(names), of_seed == np.array(seeds[1:])]
    design = np.ascontiguousarray(np.concatenate(columns, axis=1))
    if len(rows) <= design.shape[1]:
        return {}
    # In units of the spread and around the mean, so that "no residual at all" is a question of rounding alone.
    centre, unit = values.mean(), np.ptp(values)
    if unit <= 1e-12 * abs(centre):
        return {}
    scaled, inverse = (values - centre) / unit, np.linalg.pinv(design)
    residuals, df = scaled - design @ (inverse @ scaled), len(rows) - int(np.linalg.matrix_rank(design))
    if df < 1 or residuals @ residuals < 1e-20:
        return {}
    weights = dict(zip(names, inverse[1:], strict=False))  # of the values in the effect of each arm
    return {
        arm: (own @ scaled * unit, math.sqrt(residuals @ residuals / df * (own @ own)) * unit, df)
        for arm, own in weights.items()
    }


def _difference_of_means(a: Array, b: Array, axis: int) -> Array:
    first, second = (np.ascontiguousarray(x).mean(axis) for x in (a, b))  # the order of a sum decides ties
    return np.asarray(first - second)


def permutation(runs: Mapping[str, Runs], arms: Sequence[str], against: str) -> dict[str, dict[str, float]]:
    """arm -> {p, n, exact}, of a permutation test of the difference of means; exact: 1 where all relabellings were
    tried, 0 where some were drawn.

    From 4 seeds per arm on: with 3 and 3 the smallest possible p is 0.10.
    """
    results: dict[str, dict[str, float]] = {}
    n = len(runs[against])
    for size in sorted({len(runs[arm]) for arm in arms}):  # arms of equal size share the relabellings
        members = [arm for arm in arms if len(runs[arm]) == size]
        first, second = ([list(runs[name].values()) for name in side] for side in (members, [against] * len(members)))
        if min(size, n) < LEAST_TO_PERMUTE:
            continue
        exact = math.comb(size + n, size) <= MOST_PERMUTATIONS
        test = scipy.stats.permutation_test(
            (first, second), _difference_of_means, vectorized=True, axis=-1, batch=BATCH,
            rng=np.random.default_rng(0), n_resamples=np.inf if exact else RELABELLINGS,
        )  # fmt: skip
        for arm, p in zip(members, test.pvalue, strict=True):
            results[arm] = {"p": float(p), "n": float(min(size, n)), "exact": float(exact)}
    return results


def _tested(difference: float, se: float, df: int, alpha: float, n: int) -> dict[str, float]:
    """Student's t test of a difference with this standard error."""
    half, p = -scipy.special.stdtrit(df, alpha / 2) * se, 2 * scipy.special.stdtr(df, -abs(difference) / se)
    return {"difference": float(difference), "low": float(difference - half), "high": float(difference + half),
            "p": float(p), "n": float(n)}  # fmt: skip


def document_error(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], documents: ArrayLike, *, targets: ArrayLike | None = None
) -> tuple[float, int]:
    """Standard error, over validation documents, of arm a's mean loss minus arm b's; and the number of documents.

    a, b:      one array (windows,) of mean losses per window for each seed of the arm, on the same windows.
    documents: (windows,) the document that each window belongs to.
    targets:   (windows,) how many targets each window's mean is over; equal unless given.
    Seeds are averaged first, so this is the noise of the text alone. A ratio estimator: the documents are the sample,
    and the size of each is random as well. NaN for fewer than two documents. Raises ValueError for arrays that differ
    in length.  Source: Cochran, Sampling Techniques, 3rd edition, section 6.3; with equal weights it is the
    cluster-robust standard error of a mean.
    """
    labels = np.asarray(documents)
    weights = np.ones(labels.shape) if targets is None else np.asarray(targets, dtype=np.float64)
    rows = [np.asarray(row, dtype=np.float64) for row in (*a, *b)]
    if labels.ndim != 1 or any(row.shape != labels.shape for row in (weights, *rows)) or not a or not b:
        raise ValueError("every seed of both arms needs one loss for each window, and every window its document")
    difference = np.mean(rows[: len(a)], axis=0) - np.mean(rows[len(a) :], axis=0)  # (windows,)
    names, index = np.unique(labels, return_inverse=True)
    count = len(names)
    if count < 2:
        return math.nan, count
    sums = np.bincount(index, weights * difference)  # (documents,)
    sizes = np.bincount(index, weights)
    residuals = sums - sums.sum() / sizes.sum() * sizes
    variance = count / (count - 1) * np.square(residuals).sum() / sizes.sum() ** 2
    return math.sqrt(variance), count


def effective_documents(documents: ArrayLike, *, targets: ArrayLike | None = None) -> float:
    """The number of equally large documents with the same information: (sum of sizes)^2 / sum of squared sizes.

    One less is the degrees of freedom of `document_error`.
    """
    index = np.unique(np.asarray(documents), return_inverse=True)[1]
    sizes = np.bincount(index, np.ones(index.shape) if targets is None else np.asarray(targets, dtype=np.float64))
    return float(sizes.sum() ** 2 / np.square(sizes).sum())
