"""Made-up noise floors, and power by drawing studies and judging them with the test that writes verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from gpt2lab.analysis.statistics import linear
from gpt2lab.planning.noise import Floor
from gpt2lab.store import now

DRAWS = 100_000
NOISE = 3 * (0.8 * 0.2 / DRAWS) ** 0.5
"""Three standard errors of a power of 80 % by so many draws."""


def power(effect: float, sizes: Sequence[int], weights: Sequence[float] = (1.0, -1.0), *, level: float) -> float:
    """How often a sum of weights x means of `effect` sd is found with its right sign, all arms equally noisy."""
    rng = np.random.default_rng([7, *sizes])
    arms = [rng.normal(size=(DRAWS, n)) for n in sizes]
    arms[0] += effect / weights[0]
    found = linear(arms, weights)
    return float(((found.p < level) & (found.difference > 0)).mean())


def is_smallest(n: int, power_of: Callable[[int], float], least: int = 2) -> bool:
    """Whether n seeds find what is asked for in 80 % of studies, and one fewer do not; as far as draws can tell."""
    return power_of(n) > 0.8 - NOISE and (n == least or power_of(n - 1) < 0.8 + NOISE)


def floor(sd: float, df: int = 9) -> Floor:
    """A floor of that sd from df + 1 repeats; what plans do not read is made up."""
    return Floor(
        scale="tiny", sd=sd, low=0.7 * sd, high=1.8 * sd, df=df,
        values={str(s): 2.0 for s in range(min(df + 1, 99))}, runs=(), failed=0, same_seed={}, parameters=1, tokens=1,
        data="d", evaluation="e", stack={}, created=now(),
    )  # fmt: skip


def upper(sd: float, df: int) -> float:
    """The sd at its one-sided 80 % limit."""
    return float(sd * math.sqrt(df / stats.chi2.ppf(0.2, df)))
