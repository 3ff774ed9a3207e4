"""Why verdicts do not use a moderated t test: its error rates, and the most that any valid test could gain.

A moderated test (Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3(1):3, the estimator of limma)
replaces each arm's variance by a mean of it and a prior variance from other runs of the same scale. Here the prior is
exactly the sd 1 of the baseline, which favours the moderated tests. `python -m benchmarks.moderated` prints the table
of docs/statistics.md.

Shapes: D simulated studies, S spreads between seeds that are tried for each arm.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import scipy
from numpy.typing import NDArray

from gpt2lab.analysis.calibration import SKEWED
from gpt2lab.analysis.selftest import BANKS, GAUSSIAN, noise
from gpt2lab.analysis.statistics import welch

Array = NDArray[np.float64]

CANDIDATES = LIMMA, FALLS_BACK, ONE_SIDED = "moderated", "moderated, falling back", "moderated upwards only"
PRIOR_DF = 10.0
"""Degrees of freedom of the prior: those of a noise floor of eleven repeats."""
DISAGREES, STEEPNESS = 1.5, 6.0
"""Ratio of an arm's variance to the prior's at which half of the prior's degrees of freedom are withdrawn, and the
power of that ratio in the decline."""
SPREADS = ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (4.0, 1.0), (4.0, 4.0))
"""True sd of the two arms, in units of the prior's."""


def moderated(arm: Array, against: Array, kind: str) -> Array:
    """Two-sided p of the difference of means with moderated variances.  (D, seed) twice -> (D,)

    Degrees of freedom by Satterthwaite from those of each arm and of the prior. FALLS_BACK withdraws the prior from an
    arm the more its variance exceeds the prior's, so that a noisy arm is judged as by Welch's test; ONE_SIDED also
    never replaces a variance by a smaller one.
    """
    variances, freedom = [], []
    for values in (arm, against):
        n, observed = values.shape[-1], values.var(-1, ddof=1)
        prior = np.full_like(observed, PRIOR_DF)
        if kind != LIMMA:
            prior = PRIOR_DF / (1 + (observed / DISAGREES) ** STEEPNESS)
        shrunk = (prior + (n - 1) * observed) / (prior + n - 1)
        variances.append((np.maximum(shrunk, observed) if kind == ONE_SIDED else shrunk) / n)
        freedom.append(prior + n - 1)
    total = variances[0] + variances[1]
    df = 1 / sum((v / total) ** 2 / f for v, f in zip(variances, freedom, strict=True))
    t = (arm.mean(-1) - against.mean(-1)) / np.sqrt(total)
    return np.asarray(2 * scipy.special.stdtr(df, -np.abs(t)))


def best_power(n: int, effect: float, alpha: float = 0.05, *, cells: int = 22, differences: int = 44) -> float:
    """About the most power for a difference of `effect` prior sd that a test can have if it rejects with at most
    `alpha` / SKEWED without an effect, whatever the spread of either arm; both arms as noisy as the prior says.

    A linear programme over all tests that depend on the difference and both arms' sd, in `cells` steps of each sd and
    so many `differences`; the spreads that are tried reach from an eighth to sixteen times the prior's. Finer steps
    move it by about .01. Welch's calibrated test keeps the same level; its power is `calibration.power`.
    """
    sds = np.concatenate([[0.0], np.geomspace(0.08, 20.0, cells - 1), [np.inf]])
    steps = np.concatenate([[0.0], np.geomspace(0.3, 60.0, differences - 1), [np.inf]])  # in standard errors
    first, second = np.triu_indices(cells)  # the order of the arms does not matter
    tried = 2.0 ** (np.arange(-9, 13) / 3)
    at_sd = np.stack([np.diff(scipy.stats.chi2.cdf((n - 1) * (sds / s) ** 2, n - 1)) for s in tried])  # (S, cell)

    def chance(i: int, j: int, in_steps: Array) -> Array:
        both = at_sd[i][first] * at_sd[j][second] + at_sd[i][second] * at_sd[j][first]
        return np.asarray(np.outer(np.where(first == second, both / 2, both), in_steps).ravel())

    null = []
    for i, j in itertools.combinations_with_replacement(range(len(tried)), 2):
        spread = np.sqrt((tried[i] ** 2 + tried[j] ** 2) / 2)
        null.append(chance(i, j, np.diff(2 * scipy.special.ndtr(steps / spread) - 1)))
    as_prior = int(np.argmin(np.abs(tried - 1)))
    gained = chance(as_prior, as_prior, np.diff(scipy.special.ndtr(steps - effect / np.sqrt(2 / n))))
    kept = gained > 1e-9
    limit = np.full(len(null), alpha / SKEWED)
    best = scipy.optimize.linprog(-gained[kept], A_ub=np.stack(null)[:, kept], b_ub=limit, bounds=(0, 1))
    return float(-best.fun)


def main(draws: int = 100_000, seed: int = 0) -> None:
    """Prints, by test and seeds per arm: the largest share of false differences at .05 over SPREADS in each noise bank
    (intervals miss the truth as often), and the power for 3 sd at .05, at .05 / 4, and at most."""
    tests = {"Welch, calibrated": lambda a, b: welch(a, b).p}
    tests |= {kind: functools.partial(moderated, kind=kind) for kind in CANDIDATES}
    print("test, n: worst false differences by noise; power for 3 sd at .05 and .05 / 4")
    for n, (name, p) in itertools.product((2, 3, 5, 8), tests.items()):
        rng = np.random.default_rng([seed, n])
        worst = []
        for bank in BANKS:
            wrong = [
                [sd * noise(rng, bank, (draws, n)) for sd in sds] for sds in SPREADS
            ]  # pairs of arms without a difference
            worst.append(max((p(*arms) < 0.05).mean() for arms in wrong))
        found = p(noise(rng, GAUSSIAN, (draws, n)) - 3, noise(rng, GAUSSIAN, (draws, n)))
        powers = [(found < level).mean() for level in (0.05, 0.05 / 4)]
        print(f"{name}, {n}: {', '.join(f'{w:.3f}' for w in worst)}; {', '.join(f'{power:.2f}' for power in powers)}")
    for n in (3, 5, 8):
        most = [best_power(n, 3.0, level) for level in (0.05, 0.05 / 4)]
        print(f"at most, {n}: {', '.join(f'{power:.2f}' for power in most)}")


if __name__ == "__main__":
    main()
