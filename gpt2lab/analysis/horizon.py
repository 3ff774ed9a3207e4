"""How early does the order of arms show? Rank agreement of losses during training with those at the end.

It tells how short a screen may be: where the order at a quarter of training is that of the end, a screen of that length
would have picked the same arms. (A screen trained on a shorter schedule is another thing; this is its upper bound.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from gpt2lab.analysis.statistics import Array, welch

FRACTIONS = (0.1, 0.25, 0.5, 0.75)


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
    early: Mapping[str, Mapping[str, float]], final: Mapping[str, Mapping[str, float]], fraction: float,
    *, alpha: float = 0.05,
) -> Agreement | None:  # fmt: skip
    """From arm -> seed -> loss at a fraction of training and at the end; None with fewer than three arms.

    The interval is that of `tau_bounds`; NaN with one seed.
    """
    found = {arm: sorted(early[arm].keys() & final.get(arm, {}).keys()) for arm in early}
    pairs = {arm: np.array([(early[arm][s], final[arm][s]) for s in seeds]) for arm, seeds in found.items() if seeds}
    pairs = {arm: values for arm, values in pairs.items() if np.isfinite(values).all()}
    if len(pairs) < 3:
        return None
    means = np.array([values.mean(0) for values in pairs.values()])  # (arm, 2)
    tau = float(stats.kendalltau(means[:, 0], means[:, 1]).statistic)
    seeds = min(len(values) for values in pairs.values())
    low = high = math.nan
    if seeds >= 2 and math.isfinite(tau):
        then, now = ([values[:, at] for values in pairs.values()] for at in (0, 1))
        low, high = (float(end) for end in tau_bounds(then, now, alpha=alpha))
    return Agreement(fraction=fraction, tau=tau, low=low, high=high, arms=len(pairs), seeds=seeds)


def tau_bounds(early: Sequence[ArrayLike], final: Sequence[ArrayLike], *, alpha: float = 0.05) -> tuple[Array, Array]:
    """Between which values Kendall's tau of the arms' true means lies, from the pairs whose order is sure.

    One (..., seed) for each arm, two seeds or more; -> (...), (...). A pair agrees or disagrees for sure where its
    order is known at both points, and counts as either otherwise; so does one whose arms are equal in truth. An order
    is known where Welch's interval of the difference leaves out zero.

    With m pairs the intervals stand at 1 - 2 alpha / m. For a pair to be taken for reversed although it is not (or the
    other way round), one of its two differences must be given the wrong sign, which only one end of the interval can
    do: a chance of alpha / m at most, if the other is surely known, and less if it is not. So all pairs are right
    together with a chance of 1 - alpha (Bonferroni). That takes for granted that a seed which is lucky early is not
    bound to be unlucky at the end.
    """
    level = 2 * alpha / math.comb(len(early), 2)
    signs = _order(early, level) * _order(final, level)  # (..., pair): 1 the same, -1 reversed, 0 open
    return np.asarray(np.where(signs > 0, 1, -1).mean(-1)), np.asarray(np.where(signs < 0, -1, 1).mean(-1))


def _order(arms: Sequence[ArrayLike], level: float) -> Array:
    """Of every pair of arms, 1 where the first is surely above the second, -1 below, 0 open.  -> (..., pair)"""
    found = [welch(first, second, alpha=level) for first, second in combinations(arms, 2)]
    return np.stack([(one.low > 0).astype(np.float64) - (one.high < 0) for one in found], axis=-1)
