"""How early does the order of arms show? Rank agreement of losses during training with those at the end.

It tells how short a screen may be: where the order at a quarter of training is that of the end, a screen of that length
would have picked the same arms. (A screen trained on a shorter schedule is another thing; this is its upper bound.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gpt2lab.analysis.statistics import Array

FRACTIONS = (0.1, 0.25, 0.5, 0.75)
DRAWS = 4000


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

    The interval: the arms' means are drawn again 4,000 times with their noise (multivariate t of the seeds' joint
    spread, early and late together, n - 1 degrees of freedom), and the order of each draw compared. The seeds
    themselves are too few to be resampled.
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
        rng = np.random.default_rng(0)
        drawn = np.stack([_redrawn(values, rng) for values in pairs.values()], axis=1)  # (draw, arm, 2)
        low, high = (float(x) for x in np.quantile(_taus(drawn), (alpha / 2, 1 - alpha / 2)))
    return Agreement(fraction=fraction, tau=tau, low=low, high=high, arms=len(pairs), seeds=seeds)


def _redrawn(values: Array, rng: np.random.Generator) -> Array:
    """Means as other seeds might have given them.  (seed, 2) -> (draw, 2)"""
    n = len(values)
    spread = np.cov(values, rowvar=False) / n
    noise = rng.multivariate_normal(np.zeros(2), spread, DRAWS, method="eigh")
    return np.asarray(values.mean(0) + noise / np.sqrt(rng.chisquare(n - 1, (DRAWS, 1)) / (n - 1)))


def _taus(drawn: Array) -> Array:
    """Kendall's tau of each draw (no ties among continuous values).  (draw, arm, 2) -> (draw,)"""
    first, second = np.triu_indices(drawn.shape[1], 1)
    signs = np.sign(drawn[:, first] - drawn[:, second])  # (draw, pair, 2)
    return np.asarray((signs[..., 0] * signs[..., 1]).mean(-1))
