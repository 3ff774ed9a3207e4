"""Across budgets: compute multipliers and rank agreement.

A curve is the final losses of one recipe at several budgets, each on its own schedule (several seeds each). It is
assumed to be convex: to fall ever more slowly with the logarithm of the budget, as every power law with a floor does.
Then it lies below the chord between two neighbouring budgets, and above the lines through the next two on either side.
An interval contains every budget whose loss between these bounds is consistent with the target, given the noise of
curve and target. Where the losses contradict convexity, only their order counts. Budgets are never extrapolated.

The rank agreement of losses during training with the final ones shows how short a screen may be: where the order of
arms at a quarter of training is the final one, a screen of that length would have picked the same arms. (For a screen
on a shorter schedule this is an upper bound.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from gpt2lab.analysis.statistics import Array, welch

POINTS = 2001
"""Budgets at which the curve is compared with the target."""
EXPONENTS = np.linspace(0, 4, 401)
"""Of the fitted laws; 0 is a straight line over the logarithm of the budget."""
ALPHA = 0.05
"""1 - the confidence of all intervals."""
CONCAVE = 0.01
"""Level of the test of convexity."""
FRACTIONS = (0.1, 0.25, 0.5, 0.75)
"""Of training, at which the order of arms is compared with the final one."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The budget at which a curve reaches a loss; `low` is 0 and `high` infinity where the curve ends before that."""

    value: float = math.nan
    """by the fitted law; NaN when the loss lies beyond the curve"""
    low: float = 0.0
    high: float = math.inf
    reason: str = ""
    """why there is no value"""

    @property
    def spans_one(self) -> bool:
        """Whether the interval contains 1."""
        return not (self.low > 1 or self.high < 1)


def reach(curve: Mapping[float, ArrayLike], target: ArrayLike | float) -> Reach:
    """The budget at which `curve` (budget -> final losses of its seeds) reaches `target`: a loss, or losses of seeds.

    With the baseline's curve over multiples of its budget and an arm's losses, it is the arm's compute multiplier; with
    an arm's own curve and the baseline's losses, the share of the budget that the arm needs.
    """
    budgets = sorted(curve)
    losses = [np.atleast_1d(np.asarray(curve[b], dtype=np.float64)) for b in budgets]
    goal = np.atleast_1d(np.asarray(target, dtype=np.float64))
    means = np.array([values.mean() for values in losses]) if all(len(values) for values in losses) else np.array([])
    if len(budgets) < 2 or not len(goal) or not np.isfinite([*means, goal.mean()]).all() or not len(means):
        return Reach(reason="no curve of losses at two budgets or more")
    if np.any(np.diff(means) >= 0):
        return Reach(reason="the loss does not fall with every larger budget")
    logs = np.log(budgets)
    value = _by_law(logs, means, np.array([len(values) for values in losses]), float(goal.mean()))
    reason = "" if math.isfinite(value) else "the loss lies beyond the budgets that were run"
    if any(len(values) < 2 for values in losses) or (len(goal) < 2 and np.ndim(target) > 0):
        return Reach(value=value, reason=reason)
    x = np.union1d(np.linspace(logs[0], logs[-1], POINTS), logs)
    low, high = _ends(x, possible(x, logs, losses, target), above=bool(goal.mean() > means[0]))
    if math.isfinite(value):  # the fitted law may lie slightly outside the bounds where means are noisy
        low, high = min(low, value), max(high, value)
    return Reach(value=value, low=low, high=high, reason=reason)


def _by_law(logs: Array, means: Array, counts: Array, goal: float) -> float:
    """The budget at which the best law E + A b^-beta reaches `goal`; with two budgets, a straight line over log b.

    NaN beyond the budgets.  (budget,) each.
    """
    middle = logs.mean()
    beta = EXPONENTS[:, None] if len(logs) > 2 else np.zeros((1, 1))
    fall = np.where(beta > 0, -np.expm1(-beta * (logs - middle)) / np.where(beta > 0, beta, 1), logs - middle)
    weights = counts / counts.sum()
    centred, loss = fall - (fall @ weights)[:, None], means - means @ weights  # (law, budget), (budget,)
    slope = (centred * loss) @ weights / (centred**2 @ weights)
    best = int(np.argmin((loss - slope[:, None] * centred) ** 2 @ weights))
    at, b = (goal - means @ weights) / slope[best] + fall[best] @ weights, beta[best, 0]
    if b * at >= 1:
        return math.nan
    log = float((-np.log1p(-b * at) / b if b > 0 else at) + middle)
    return math.exp(log) if logs[0] - 1e-9 <= log <= logs[-1] + 1e-9 else math.nan


def possible(x: Array, logs: Array, losses: Sequence[ArrayLike], target: ArrayLike) -> NDArray[np.bool_]:
    """Whether the loss at the log budgets `x`, from the first to the last of `logs`, may equal the target's.

    losses: (..., seed) of each budget, two seeds or more; target: (..., seed), or a known number; x: (point,);
    -> (..., point). A point is ruled out where the target is significantly above the chord (one-sided, ALPHA / 2), or
    below one of two lower bounds (ALPHA / 4 each): lines through the next two budgets on either side and, where those
    end, the last budget's loss. Where the curve is significantly concave, the target must lie between the losses of the
    two budgets around the point.
    """
    goal = np.asarray(target, dtype=np.float64)
    sides = [*(np.asarray(values, dtype=np.float64) for values in losses), goal if goal.ndim else goal[None]]
    mean = np.stack(np.broadcast_arrays(*(v.mean(-1) for v in sides)), axis=-1)  # (..., budget + 1), the target last
    variance = np.stack(np.broadcast_arrays(*map(_variance, sides)), axis=-1)  # of each mean
    df = np.array([max(v.shape[-1] - 1, 1) for v in sides])

    def positive(weights: Array, target: float, level: Array | float) -> NDArray[np.bool_]:
        """Whether weights x means + `target` x the target's mean is significantly above zero: one-sided t test at
        `level`, degrees of freedom by Satterthwaite; never without any spread.  (point, budget) -> (..., point)"""
        full = np.concatenate([weights, np.full((len(weights), 1), target)], axis=-1)
        parts = full**2 * variance[..., None, :]
        total = parts.sum(-1)
        with np.errstate(invalid="ignore"):
            bar = scipy.special.stdtrit(total**2 / (parts**2 / df).sum(-1), 1 - level) * np.sqrt(total)
            return np.asarray(mean @ full.T > bar)

    unit, last = np.eye(len(logs)), len(logs) - 2
    at = np.clip(np.searchsorted(logs, x, side="right") - 1, 0, last)  # the budget next below each point
    right = np.where((at < last)[:, None], _line(x, logs, np.minimum(at + 1, last)), unit[-1])
    right = np.where((x <= logs[0])[:, None], unit[0], right)  # at a budget itself its loss is the bound
    left = np.where((at > 0)[:, None], _line(x, logs, np.maximum(at - 1, 0)), right)
    share = np.where(at > 0, ALPHA / 4, ALPHA / 2)  # below the second budget, both bounds are one
    too_high = positive(-_line(x, logs, at), 1, ALPHA / 2)
    convex = ~(too_high | positive(left, -1, share) | positive(right, -1, share))
    bent = positive(_line(logs[2:], logs, np.arange(last)) - unit[2:], 0, CONCAVE / max(last, 1))
    ordered = ~(positive(-unit[at], 1, ALPHA / 2) | positive(unit[at + 1], -1, ALPHA / 2))
    return np.where(bent.any(-1, keepdims=True), ordered, convex)


def _variance(values: Array) -> Array:
    """Of the mean over seeds; 0 for a single value, which is known.  (..., seed) -> (...)"""
    return np.asarray(
        values.var(-1, ddof=1) / values.shape[-1] if values.shape[-1] > 1 else np.zeros(values.shape[:-1])
    )


def _line(x: Array, logs: Array, first: NDArray[np.int64]) -> Array:
    """At `x`, the straight line through a budget and the next, as weights on budgets.  (point,) -> (point, budget)"""
    share = ((x - logs[first]) / (logs[first + 1] - logs[first]))[:, None]
    unit = np.eye(len(logs))
    return np.asarray((1 - share) * unit[first] + share * unit[first + 1])


def _ends(x: Array, near: NDArray[np.bool_], *, above: bool) -> tuple[float, float]:
    """The smallest and the largest possible budget; open where the curve ends before.

    Where none is possible, the target lies beyond one end: `above` the loss of the smallest budget, or below the last.
    """
    inside = np.flatnonzero(near)
    if not len(inside):
        return (0.0, float(np.exp(x[0]))) if above else (float(np.exp(x[-1])), math.inf)
    first, last = int(inside[0]), int(inside[-1])
    low = 0.0 if first == 0 else float(np.exp(x[first - 1]))
    return low, math.inf if last == len(x) - 1 else float(np.exp(x[last + 1]))


def multiplier_text(reach: Reach) -> str:
    """`worth 1.18x compute [1.11, 1.26]`; a phrase where an end is open or unknown."""
    if reach.reason and reach.low == 0 and math.isinf(reach.high):
        return f"compute multiplier unknown: {reach.reason}"
    if math.isinf(reach.high) and reach.low >= 1 and not math.isfinite(reach.value):
        return f"worth more than {reach.low:.2f}x compute"
    if reach.low == 0 and not math.isfinite(reach.value):
        return f"worth less than {reach.high:.2f}x compute"
    value = f"worth {reach.value:.2f}x compute " if math.isfinite(reach.value) else "worth compute "
    doubt = ": not distinguishable from 1" if reach.spans_one else ""
    return f"{value}{bounds(reach)}{doubt}"


def bounds(reach: Reach) -> str:
    """`[1.11, 1.26]`; an open end is `less` or `more`."""
    low = f"{reach.low:.2f}" if reach.low > 0 else "less"
    high = f"{reach.high:.2f}" if math.isfinite(reach.high) else "more"
    return f"[{low}, {high}]"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Kendall's tau between the order of arms at `fraction` of training and at its end: 1 the same, -1 reversed."""

    fraction: float
    tau: float
    low: float
    high: float
    arms: int
    seeds: int


def agreement(
    early: Mapping[str, Mapping[str, float]], final: Mapping[str, Mapping[str, float]], fraction: float
) -> Agreement | None:
    """From arm -> seed -> loss at a fraction of training and at its end; None with fewer than three arms.

    The interval is that of `tau_bounds`; NaN with one seed.
    """
    shared = {arm: sorted(early[arm].keys() & final.get(arm, {}).keys()) for arm in early}
    pairs = [np.array([(early[arm][s], final[arm][s]) for s in seeds]) for arm, seeds in shared.items() if seeds]
    pairs = [values for values in pairs if np.isfinite(values).all()]  # (seed, 2) of each arm
    if len(pairs) < 3:
        return None
    means = np.array([values.mean(0) for values in pairs])  # (arm, 2)
    first, last = (np.sign(np.subtract.outer(losses, losses)) for losses in means.T)
    ordered = math.sqrt((first**2).sum() * (last**2).sum())  # pairs without a tie
    tau = float((first * last).sum()) / ordered if ordered else math.nan
    seeds = min(map(len, pairs))
    low = high = math.nan
    if seeds >= 2 and math.isfinite(tau):
        before, after = ([values[:, at] for values in pairs] for at in (0, 1))
        low, high = (float(end) for end in tau_bounds(before, after))
    return Agreement(fraction=fraction, tau=tau, low=low, high=high, arms=len(pairs), seeds=seeds)


def tau_bounds(early: Sequence[ArrayLike], final: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """Bounds of Kendall's tau of the arms' true means, from the pairs of arms whose order is known.

    One (..., seed) for each arm, two seeds or more; -> (...), (...). An order is known where Welch's interval of the
    difference excludes zero. A pair agrees or disagrees where its order is known at both points, and otherwise counts
    as either, as does a pair of equal arms.

    With m pairs the intervals have level 1 - 2 ALPHA / m. A pair is misclassified only if one of its two differences
    gets the wrong sign, through one end of its interval: with probability ALPHA / m at most. So all pairs are right
    together with probability 1 - ALPHA (Bonferroni), provided that the early and final losses of a seed are not
    negatively correlated.
    """
    level = 2 * ALPHA / math.comb(len(early), 2)
    signs = _order(early, level) * _order(final, level)  # (..., pair): 1 the same, -1 reversed, 0 open
    return np.asarray(np.where(signs > 0, 1, -1).mean(-1)), np.asarray(np.where(signs < 0, -1, 1).mean(-1))


def _order(arms: Sequence[ArrayLike], level: float) -> Array:
    """Of every pair of arms, 1 where the first is significantly above the second, -1 below, 0 open.  -> (..., pair)"""
    if len({np.shape(arm) for arm in arms}) == 1:  # all pairs in one call: a hundred arms have thousands
        every, (first, second) = np.stack(arms, axis=-2), np.triu_indices(len(arms), 1)
        test = welch(every[..., first, :], every[..., second, :], alpha=level)
        return np.asarray((test.low > 0).astype(np.float64) - (test.high < 0))
    tests = [welch(first, second, alpha=level) for first, second in combinations(arms, 2)]
    return np.stack([(test.low > 0).astype(np.float64) - (test.high < 0) for test in tests], axis=-1)
