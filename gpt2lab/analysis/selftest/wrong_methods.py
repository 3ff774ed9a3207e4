"""Negative controls: ways to analyse the same studies that are known to be wrong.

Each is held against the yardstick that our own rates are held against. A yardstick that lets one pass is blunt, and
what it accepts proves nothing. No arm differs from the baseline in any of these studies.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gpt2lab.analysis.selftest.noise import BANKS, Draws
from gpt2lab.analysis.selftest.rows import ALPHA, Row, flagged
from gpt2lab.analysis.statistics import Array, welch

Flags = NDArray[np.bool_]

RESAMPLES = 400
ARMS = 10
PEEKS = range(3, 11)
NOISY_SD = 4.0


def controls(draws: Draws) -> Iterator[Row]:
    """Every control on every noise bank; each must be flagged."""
    for bank in BANKS:
        for n in (3, 5):
            baseline, arm = draws.studies("bootstrap", bank, n, shifts=(0.0,))
            wrong = bootstrap_differs(baseline, arm, draws.generator("resamples", bank, n))
            yield flagged("control: percentile bootstrap", wrong, bank, n)
        ten = draws.studies("uncorrected", bank, 5, shifts=(0.0,) * ARMS)
        yield flagged(f"control: uncorrected p over {ARMS} arms", uncorrected_differs(ten), bank, 5)
        baseline, arm = draws.studies("peeking", bank, PEEKS[-1], shifts=(0.0,))
        check = f"control: peeking at each n from {PEEKS[0]} to {PEEKS[-1]}"
        yield flagged(check, peeking_differs(baseline, arm), bank, PEEKS[-1])
        noisy = draws.studies("pooled", bank, 5, sds=(NOISY_SD, 1.0, 1.0, 1.0))
        yield flagged(f"control: one pooled variance, one arm at {NOISY_SD:g} sd", pooled_differs(noisy), bank, 5)


def bootstrap_differs(baseline: Array, arm: Array, rng: np.random.Generator) -> Flags:
    """Whether the percentile interval of the difference over resampled seeds leaves out 0.  (draws, seed) -> (draws,)

    The resamples, as weights of the seeds, are the same for every study.
    """
    n = arm.shape[-1]
    of_arm, of_baseline = (rng.multinomial(n, [1 / n] * n, RESAMPLES).T / n for _ in range(2))
    means = arm @ of_arm - baseline @ of_baseline  # (draws, resample)
    low, high = np.quantile(means, (ALPHA / 2, 1 - ALPHA / 2), axis=-1)
    return np.asarray((low > 0) | (high < 0))


def uncorrected_differs(arms: list[Array]) -> Flags:
    """Whether each arm's own p is small enough, as if it were the only one.  -> (draws, contrast)"""
    return np.stack([welch(arm, arms[0]).p < ALPHA for arm in arms[1:]], axis=-1)


def peeking_differs(baseline: Array, arm: Array) -> Flags:
    """Whether p is small enough after so many seeds, for every look.  -> (draws, look)"""
    return np.stack([welch(arm[:, :n], baseline[:, :n]).p < ALPHA for n in PEEKS], axis=-1)


def pooled_differs(arms: list[Array]) -> Flags:
    """Whether the first, noisiest arm differs by a t-test with one variance pooled over all arms.  -> (draws,)"""
    n = arms[0].shape[-1]
    pooled = np.mean([arm.var(-1, ddof=1) for arm in arms], axis=0)
    t = (arms[1].mean(-1) - arms[0].mean(-1)) / np.sqrt(pooled * 2 / n)
    return np.asarray(2 * stats.t.sf(np.abs(t), (n - 1) * len(arms)) < ALPHA)
