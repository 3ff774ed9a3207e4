"""What a difference is worth: read off the losses that other budgets reach, each at the end of its own schedule.

A curve is the final losses of one recipe at several budgets (several seeds each). Between two budgets the loss is taken
to be linear in the logarithm of the budget; beyond them nothing is said. An interval holds every budget at which the
curve cannot be told from the target (Fieller's way: the noise of the curve counts as well as that of the target).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from gpt2lab.analysis.statistics import Array, Comparison, linear

POINTS = 4001
"""Budgets at which the curve is compared with the target."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The budget at which a curve comes to a loss; `low` is 0 and `high` infinity where the curve ends before that."""

    value: float
    """NaN when the loss lies beyond the curve"""
    low: float
    high: float
    se_log: float
    """standard error of the logarithm of `value`; NaN where it cannot be had"""
    df: float
    reason: str = ""
    """why there is no value"""

    @property
    def spans_one(self) -> bool:
        """Whether it cannot be told from 1."""
        return not (self.low > 1 or self.high < 1)


def reach(curve: Mapping[float, ArrayLike], target: ArrayLike | float, *, alpha: float = 0.05) -> Reach:
    """The budget at which `curve` (budget -> final losses of its seeds) reaches `target`: a loss, or losses of seeds.

    With the baseline's curve over multiples of its budget and an arm's losses, it is the arm's compute multiplier; with
    an arm's own curve and the baseline's losses, the share of the budget that the arm needs.
    """
    budgets = sorted(curve)
    losses = [np.atleast_1d(np.asarray(curve[b], dtype=np.float64)) for b in budgets]
    goal = np.atleast_1d(np.asarray(target, dtype=np.float64))
    known = np.ndim(target) == 0
    means = np.array([values.mean() for values in losses]) if all(len(values) for values in losses) else np.array([])
    if len(budgets) < 2 or not len(goal) or not np.isfinite([*means, goal.mean()]).all() or not len(means):
        return _nothing("no curve of losses at two budgets or more")
    if np.any(np.diff(means) >= 0):
        return _nothing("the loss does not fall with every larger budget")
    logs = np.log(budgets)
    x = np.union1d(np.linspace(logs[0], logs[-1], POINTS), logs)
    shares = _shares(x, logs)  # (point, budget)
    gap = goal.mean() - shares @ means
    value = float(np.exp(np.interp(0.0, gap, x))) if gap[0] <= 0 <= gap[-1] else math.nan
    reason = "" if math.isfinite(value) else "the loss lies beyond the budgets that were run"
    if any(len(values) < 2 for values in losses) or (len(goal) < 2 and not known):
        return Reach(value=value, low=0.0, high=math.inf, se_log=math.nan, df=math.nan, reason=reason)
    variance, df = _noise(shares, losses, goal, known=known)
    near = np.abs(gap) <= stats.t.ppf(1 - alpha / 2, df) * np.sqrt(variance)
    low, high = _ends(x, near, gap)
    se_log, freedom = math.nan, math.nan
    if math.isfinite(value):
        at = int(np.argmin(np.abs(x - math.log(value))))
        segment = min(max(int(np.searchsorted(logs, math.log(value))), 1), len(logs) - 1)
        slope = (means[segment] - means[segment - 1]) / (logs[segment] - logs[segment - 1])
        se_log, freedom = float(math.sqrt(variance[at]) / abs(slope)), float(df[at])
    return Reach(value=value, low=low, high=high, se_log=se_log, df=freedom, reason=reason)


def _nothing(reason: str) -> Reach:
    return Reach(value=math.nan, low=0.0, high=math.inf, se_log=math.nan, df=math.nan, reason=reason)


def _shares(x: Array, logs: Array) -> Array:
    """How much each budget counts at each point: linear between neighbours.  (point,), (budget,) -> (point, budget)"""
    return np.stack([np.interp(x, logs, unit) for unit in np.eye(len(logs))], axis=-1)


def _noise(shares: Array, losses: Sequence[Array], goal: Array, *, known: bool) -> tuple[Array, Array]:
    """Variance of (target - curve) at every point, and its degrees of freedom (Satterthwaite).  -> (point,) each"""
    own = np.array([values.var(ddof=1) / len(values) for values in losses])
    freedoms = np.array([len(values) - 1 for values in losses])
    theirs = 0.0 if known else goal.var(ddof=1) / len(goal)
    parts = shares**2 * own
    variance = np.maximum(parts.sum(-1) + theirs, 1e-300)
    bottom = (parts**2 / freedoms).sum(-1) + (0.0 if known else theirs**2 / (len(goal) - 1))
    return variance, variance**2 / np.maximum(bottom, 1e-300)


def _ends(x: Array, near: Array, gap: Array) -> tuple[float, float]:
    """The smallest and the largest budget that cannot be told from the target; open where the curve ends before."""
    inside = np.flatnonzero(near)
    if not len(inside):  # surely beyond one end, or between two points
        return (float(np.exp(x[-1])), math.inf) if gap[-1] < 0 else (0.0, float(np.exp(x[0])))
    first, last = int(inside[0]), int(inside[-1])
    low = 0.0 if first == 0 else float(np.exp(x[first]))
    high = math.inf if last == len(x) - 1 else float(np.exp(x[last]))
    return low, high


def trend(sizes: Sequence[float], reaches: Sequence[Reach], *, alpha: float = 0.05) -> tuple[float, float, float]:
    """(factor, low, high) by which a compute multiplier changes with every tenfold of size; NaN where it cannot be had.

    The least-squares slope of its logarithm over log10 of the size, with the noise of each scale's multiplier.
    """
    usable = [(math.log10(s), r) for s, r in zip(sizes, reaches, strict=True) if r.se_log > 0]
    weights = slope_weights([x for x, _ in usable])
    if not len(weights):
        return math.nan, math.nan, math.nan
    slope = sum(w * math.log(r.value) for w, (_, r) in zip(weights, usable, strict=True))
    parts = [(w * r.se_log) ** 2 for w, (_, r) in zip(weights, usable, strict=True)]
    df = sum(parts) ** 2 / sum(part**2 / r.df for part, (_, r) in zip(parts, usable, strict=True))
    half = float(stats.t.ppf(1 - alpha / 2, df)) * math.sqrt(sum(parts))
    return math.exp(slope), math.exp(slope - half), math.exp(slope + half)


def difference_trend(
    sizes: Sequence[float], pairs: Sequence[tuple[ArrayLike, ArrayLike]], *, alpha: float = 0.05
) -> Comparison:
    """How a difference (losses of an arm, of the baseline) changes with every tenfold of size: a weighted sum of arms.

    A negative change means that the arm gains with scale.
    """
    weights = slope_weights([math.log10(size) for size in sizes])
    values = [side for pair in pairs for side in pair]
    return linear(values, [sign * float(w) for w in weights for sign in (1, -1)], alpha=alpha)


def slope_weights(x: Sequence[float]) -> Array:
    """Weights w such that the sum of w y is the least-squares slope of y over x; none where x does not vary."""
    at = np.asarray(x, dtype=np.float64)
    if len(at) < 2 or np.ptp(at) < 1e-9:
        return np.array([])
    centred = at - at.mean()
    return np.asarray(centred / (centred**2).sum())


def tell_multiplier(reach: Reach) -> str:
    """`worth 1.18x compute [1.11, 1.26]`, in words where an end is open or nothing is known."""
    if reach.reason and reach.low == 0 and math.isinf(reach.high):
        return f"compute multiplier unknown: {reach.reason}"
    if math.isinf(reach.high) and reach.low >= 1 and not math.isfinite(reach.value):
        return f"worth more than {reach.low:.2f}x compute"
    if reach.low == 0 and not math.isfinite(reach.value):
        return f"worth less than {reach.high:.2f}x compute"
    value = f"worth {reach.value:.2f}x compute " if math.isfinite(reach.value) else "worth compute "
    doubt = ": not to be told from 1" if reach.spans_one else ""
    return f"{value}{bounds(reach)}{doubt}"


def tell_share(reach: Reach, whose: str) -> str:
    """`reaches learned's loss in 84 % of the tokens [80, 89]`."""
    if not math.isfinite(reach.value) and reach.low == 0 and math.isfinite(reach.high):
        return f"reaches {whose}'s loss in less than {100 * reach.high:.0f} % of the tokens"
    if not math.isfinite(reach.value) and reach.low > 0 and math.isinf(reach.high):
        return f"needs more than {100 * reach.low:.0f} % of the tokens to {whose}'s loss"
    if not math.isfinite(reach.value):
        return f"share of tokens to {whose}'s loss unknown: {reach.reason}"
    low = f"{100 * reach.low:.0f}" if reach.low > 0 else "less"
    high = f"{100 * reach.high:.0f}" if math.isfinite(reach.high) else "more"
    return f"reaches {whose}'s loss in {100 * reach.value:.0f} % of the tokens [{low}, {high}]"


def bounds(reach: Reach) -> str:
    """`[1.11, 1.26]`; an open end is `less` or `more`."""
    low = f"{reach.low:.2f}" if reach.low > 0 else "less"
    high = f"{reach.high:.2f}" if math.isfinite(reach.high) else "more"
    return f"[{low}, {high}]"
