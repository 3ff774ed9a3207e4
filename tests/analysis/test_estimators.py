"""The estimators of the sensitivity column, against scipy and against a hand-made analysis of variance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from gpt2lab.analysis.statistics import blocked, paired, permutation, sensitivity

RNG = np.random.default_rng(3)


def arm(n: int, shift: float = 0.0, first: int = 0) -> dict[str, float]:
    return {str(seed): float(v) for seed, v in enumerate(shift + RNG.normal(size=n), start=first)}


def test_paired_uses_the_shared_seeds_by_name() -> None:
    a, b = arm(4), arm(5)
    b = dict(reversed(b.items()))
    expected = stats.ttest_rel([a[s] for s in "0123"], [b[s] for s in "0123"])
    ours = paired(a, b)
    assert ours["p"] == pytest.approx(expected.pvalue) and ours["n"] == 4
    assert (ours["low"], ours["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_blocked_equals_paired_for_two_arms_and_gains_degrees_of_freedom_from_the_others() -> None:
    runs = {"a": arm(4), "b": arm(4)}
    two = blocked(runs, "a", "b")
    assert two == pytest.approx(paired(runs["a"], runs["b"]))
    runs |= {"c": arm(4), "d": arm(4)}
    table = np.array([list(own.values()) for own in runs.values()])  # (arm, seed)
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    df = 3 * 3
    t = (table[0].mean() - table[1].mean()) / np.sqrt((residual**2).sum() / df * 2 / 4)
    assert blocked(runs, "a", "b")["p"] == pytest.approx(2 * stats.t.sf(abs(t), df))


def test_permutation_is_exact_where_it_can_be() -> None:
    a, b = arm(4), arm(4, shift=1.5)
    pooled = np.array([*a.values(), *b.values()])
    observed = abs(pooled[:4].mean() - pooled[4:].mean())
    splits = [list(c) for c in itertools.combinations(range(8), 4)]
    gaps = [abs(pooled[s].mean() - np.delete(pooled, s).mean()) for s in splits]
    assert permutation(a, b) == {"p": pytest.approx(np.mean(np.array(gaps) >= observed - 1e-12)), "n": 4, "exact": 1}
    assert permutation(arm(13), arm(13))["exact"] == 0
    assert permutation(arm(3), arm(8)) == {}


def test_what_cannot_be_done_is_left_out_without_a_warning() -> None:
    still = {"0": 2.1, "1": 2.1, "2": 2.1}
    shifted = {seed: value + 0.1 for seed, value in still.items()}
    assert sensitivity({"a": still, "b": shifted}, "a", "b", alpha=0.05) == {}
    assert sensitivity({"a": {}, "b": arm(3)}, "a", "b", alpha=0.05) == {}
    assert sensitivity({"a": arm(3), "b": arm(3, first=500)}, "a", "b", alpha=0.05) == {}  # no seed in common


def test_arms_with_other_seeds_do_not_disturb_the_blocked_estimate() -> None:
    runs = {"a": arm(4), "b": arm(4)}
    alone = blocked(runs, "a", "b")
    assert blocked(runs | {"control": arm(4, first=500)}, "a", "b") == alone
