"""Other ways to analyse the same runs. None decides a verdict; where one disagrees with Welch, the report says so."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from gpt2lab.analysis.statistics import Array, no_spread

Runs = Mapping[str, float]
"""seed -> final value of one arm, failed runs left out"""

LEAST_TO_PERMUTE = 4
MOST_PERMUTATIONS = 20_000
DRAWS = 9_999


def sensitivity(runs: Mapping[str, Runs], arm: str, against: str, *, alpha: float) -> dict[str, dict[str, float]]:
    """name -> {p, n, ...} of every estimator that these runs allow; see each function."""
    found = {
        "paired": paired(runs[arm], runs[against], alpha=alpha),
        "blocked": blocked(runs, arm, against, alpha=alpha),
        "permutation": permutation(runs[arm], runs[against]),
    }
    return {name: result for name, result in found.items() if result}


def paired(arm: Runs, against: Runs, *, alpha: float = 0.05) -> dict[str, float]:
    """Paired t-test over the seeds that both arms have: difference, low, high, p, n. Empty when it cannot be done."""
    first, second = _shared(arm, against)
    if len(first) < 2 or bool(no_spread(first - second)):
        return {}
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(1 - alpha)
    return _result((first - second).mean(), low, high, test.pvalue, len(first))


def blocked(runs: Mapping[str, Runs], arm: str, against: str, *, alpha: float = 0.05) -> dict[str, float]:
    """Analysis of variance with arm and seed as factors, over all arms at the seeds that the two share (OLS)."""
    seeds = sorted(runs[arm].keys() & runs[against].keys())
    rows = [(name, seed, own[seed]) for name, own in runs.items() for seed in seeds if seed in own]
    names = sorted({name for name, _, _ in rows} - {against})
    values = np.array([value for _, _, value in rows])
    design = np.array([[1.0, *(n == name for name in names), *(s == seed for seed in seeds[1:])] for n, s, _ in rows])
    if len(seeds) < 2 or len(rows) <= design.shape[1]:
        return {}
    from statsmodels.regression.linear_model import OLS

    # In units of the spread and around the mean, so that "no residual at all" is a question of rounding alone.
    centre, unit = values.mean(), np.ptp(values)
    if unit <= 1e-12 * abs(centre):
        return {}
    fit = OLS((values - centre) / unit, design).fit()
    if fit.df_resid < 1 or fit.ssr < 1e-20:
        return {}
    contrast = np.array([0.0, *(name == arm for name in names), *(0.0 for _ in seeds[1:])])
    test = fit.t_test(contrast)
    low, high = test.conf_int(alpha)[0] * unit
    return _result(test.effect[0] * unit, low, high, test.pvalue, len(seeds))


def permutation(arm: Runs, against: Runs) -> dict[str, float]:
    """Permutation test of the difference of means: p, n, and whether all relabellings were tried (exact 1) or drawn.

    From 4 seeds per arm on: with 3 and 3 the smallest possible p is 0.10.
    """
    first, second = np.array(list(arm.values())), np.array(list(against.values()))
    smaller = min(len(first), len(second))
    if smaller < LEAST_TO_PERMUTE:
        return {}
    exact = math.comb(len(first) + len(second), len(first)) <= MOST_PERMUTATIONS
    test = stats.permutation_test(
        (first, second), _mean_difference, vectorized=True, rng=np.random.default_rng(0),
        n_resamples=np.inf if exact else DRAWS,
    )  # fmt: skip
    return {"p": float(test.pvalue), "n": float(smaller), "exact": float(exact)}


def _mean_difference(first: Array, second: Array, axis: int) -> Array:
    return np.asarray(first.mean(axis) - second.mean(axis))


def _shared(arm: Runs, against: Runs) -> tuple[Array, Array]:
    seeds = sorted(arm.keys() & against.keys())
    return np.array([arm[s] for s in seeds]), np.array([against[s] for s in seeds])


def _result(difference: float, low: float, high: float, p: float, n: int) -> dict[str, float]:
    return {"difference": float(difference), "low": float(low), "high": float(high), "p": float(p), "n": float(n)}
