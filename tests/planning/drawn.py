"""Power by drawing studies and judging them with the test that writes verdicts, where plans integrate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gpt2lab.analysis.statistics import linear

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
