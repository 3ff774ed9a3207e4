"""Tests, intervals and estimators against scipy, statsmodels and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind

from gpt2lab.analysis import compare
from gpt2lab.analysis.calibration import nominal_level, valid_p
from gpt2lab.analysis.statistics import (
    adjust,
    blocked,
    borrowed,
    document_error,
    holm,
    paired,
    permutation,
    sensitivity,
    welch,
)
from gpt2lab.errors import ConfigError

RNG = np.random.default_rng(7)


def test_welch_is_scipys_welch_calibrated_with_any_leading_dimensions_and_up_to_twice_the_seeds() -> None:
    arm, against = RNG.normal(1, 2, (4, 5, 3)), RNG.normal(0, 1, (4, 5, 6))
    ours = welch(arm, against, alpha=0.1)
    for index in np.ndindex(4, 5):
        reference = stats.ttest_ind(arm[index], against[index], equal_var=False)
        interval = reference.confidence_interval(1 - float(nominal_level(0.1, (3, 6))))
        assert ours.p[index] == pytest.approx(float(valid_p(reference.pvalue, (3, 6))))
        assert ours.p[index] >= reference.pvalue
        assert ours.df[index] == pytest.approx(reference.df)
        assert (ours.low[index], ours.high[index]) == pytest.approx((interval.low, interval.high))
        assert ours.difference[index] == pytest.approx(arm[index].mean() - against[index].mean())
        assert ours.difference[index] / ours.se[index] == pytest.approx(reference.statistic)


def test_equivalence_is_statsmodels_with_unequal_variances_calibrated() -> None:
    arm, against = np.array([-4.0, -1, 1, 4]), np.linspace(-0.5, 0.5, 8)
    ours = float(welch(arm, against, margin=6.0).p_equivalence)
    one_sided = ttost_ind(arm, against, -6, 6, usevar="unequal")[0]
    assert ours == pytest.approx(float(valid_p(2 * one_sided, (4, 8))) / 2)
    assert ours > one_sided > 5 * ttost_ind(arm, against, -6, 6)[0]  # its default pools


def test_holm_is_statsmodels_holm_for_every_family_at_once() -> None:
    p = RNG.uniform(0, 0.2, (8, 5)) ** 2
    p[0] = 0.01  # ties
    expected = np.array([multipletests(row, method="holm")[1] for row in p])
    assert holm(p) == pytest.approx(expected)
    assert holm(np.array([0.03])) == pytest.approx([0.03])
    with_gap = holm(np.array([0.01, np.nan, 0.02]))  # a comparison without p still counts
    assert np.isnan(with_gap[1])
    assert with_gap[[0, 2]] == pytest.approx(holm(np.array([0.01, 1.0, 0.02]))[[0, 2]])


def test_an_adjusted_interval_leaves_out_zero_exactly_when_holm_rejects() -> None:
    baseline = RNG.normal(size=(3000, 4))
    arms = [RNG.normal(shift, 1, (3000, 4)) for shift in (-3.5, -3, -2.5, 0)]
    family = adjust([welch(arm, baseline) for arm in arms])
    rejected = family.p_holm < 0.05
    assert np.array_equal((family.low > 0) | (family.high < 0), rejected)
    assert np.any(rejected & (family.p >= 0.05 / 4)), (
        "no case in which Holm is finer than Bonferroni: nothing was tested"
    )
    assert np.all(family.low[~rejected] <= family.raw_low[~rejected])
    later = rejected & (family.p >= 0.05 / 4)
    assert np.array_equal(family.low != family.joint_low, later)


def test_dropped_contrasts_stay_members_of_the_family() -> None:
    arm, baseline = RNG.normal(-2, 1, (100, 5)), RNG.normal(size=(100, 5))
    alone, among = (adjust([welch(arm, baseline)], dropped=dropped) for dropped in (0, 3))
    assert among.p_holm == pytest.approx(np.minimum(4 * alone.p_holm, 1))
    assert (among.high - among.low > alone.high - alone.low).all()


@pytest.mark.parametrize("offset", [0.0, 3.28, -1e6])
def test_without_spread_there_is_no_p_and_no_warning(offset: float) -> None:
    result = welch(np.full(3, offset + 0.1), np.full(4, offset + 0.2), margin=0.05)
    assert np.isnan([result.p, result.low, result.high, result.p_equivalence]).all()
    assert float(result.difference) == pytest.approx(-0.1, rel=1e-6)


def test_one_still_arm_is_tested_by_the_noise_of_the_other() -> None:
    arm, against = np.array([2.0, 2.1, 2.2]), np.full(3, 0.1)
    result = welch(arm, against)
    assert float(result.df) == pytest.approx(2)
    assert float(result.p) == pytest.approx(float(valid_p(stats.ttest_1samp(arm, 0.1).pvalue, (3, 3))))


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (1, 3), (3, 1)])
def test_too_few_seeds_give_nan_and_no_warning(sizes: tuple[int, int]) -> None:
    result = welch(np.arange(float(sizes[0])), np.arange(float(sizes[1])), margin=1.0)
    assert np.isnan(result.p) and np.isnan(result.p_equivalence) and np.isnan(result.low)
    assert np.isnan(result.difference) == (0 in sizes)


def test_borrowed_noise_is_inflated_and_keeps_the_lenders_degrees_of_freedom() -> None:
    result = borrowed(np.array([1.9]), np.array([2.0, 2.2]), sd=0.02, df=11, margin=0.3)
    se = 1.5 * 0.02 * np.sqrt(1 + 1 / 2)
    assert float(result.p) == pytest.approx(2 * stats.t.sf(0.2 / se, 11))
    assert float(result.high) == pytest.approx(-0.2 + stats.t.ppf(0.975, 11) * se)
    assert float(result.p_equivalence) == pytest.approx(stats.t.sf(0.1 / se, 11))


def test_the_equivalence_interval_lies_inside_the_margin_exactly_when_equivalence_passes() -> None:
    baseline = RNG.normal(size=(500, 5))
    family = adjust([welch(RNG.normal(size=(500, 5)), baseline, margin=2.5) for _ in range(3)])
    passed = family.p_equivalence_holm < 0.05
    inside = np.maximum(-family.same_low, family.same_high) < 2.5
    assert np.array_equal(inside[passed], passed[passed]) and not np.any(inside & ~passed)
    assert 50 < passed.sum() < passed.size - 50


FOUR = ("base", "norm", "mlp", "both")
MAIN = {"arm": "mlp=swiglu", "against": "mlp=gelu", "weights": {"mlp": 0.5, "both": 0.5, "base": -0.5, "norm": -0.5}}
TOGETHER = {
    "arm": "norm with mlp",
    "against": "their effects added",
    "weights": {"both": 1, "base": 1, "norm": -1, "mlp": -1},
}


def factorial(effect: float = 0.0, extra: float = 0.0, n: int = 5) -> pd.DataFrame:
    """A 2 x 2 study: `effect` of the mlp, `extra` where both changes meet."""
    rng = np.random.default_rng(4)
    shift = {"base": 0.0, "norm": -0.1, "mlp": effect, "both": effect - 0.1 + extra}
    rows = [(arm, seed, 2 + shift[arm] + rng.normal(0, 0.01)) for arm in FOUR for seed in range(n)]
    return pd.DataFrame(rows, columns=["arm", "seed", "value"])


def test_main_effect_and_interaction_get_their_words() -> None:
    for extra, word in ((0.0, "no difference larger than 0.05"), (0.15, "worse")):
        frame = factorial(-0.2, extra)
        main, together = compare(frame, baseline="base", smallest_effect=0.05, contrasts=[MAIN, TOGETHER]).contrasts
        assert (main.arm, main.word, together.word) == ("mlp=swiglu", "better", word)
        assert main.difference == pytest.approx(-0.2 + extra / 2, abs=0.01)
    frame.loc[0, "value"] = np.nan  # a failed run in any arm makes it unstable
    failed = compare(frame, baseline="base", smallest_effect=0.05, contrasts=[MAIN]).contrasts[0]
    assert failed.word == "unstable (1 of 5 failed)"


@pytest.mark.parametrize("weights", [{"base": 1}, {"base": 1, "mlp": -0.5}, {"base": 0, "mlp": 0}])
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="weights that add up to 0"):
        compare(factorial(), baseline="base", smallest_effect=0.05, contrasts=[{**MAIN, "weights": weights}])


DRAWN = np.random.default_rng(3)


def arm(n: int, shift: float = 0.0, first: int = 0) -> dict[str, float]:
    return {str(seed): float(v) for seed, v in enumerate(shift + DRAWN.normal(size=n), start=first)}


def test_paired_uses_the_shared_seeds_by_name() -> None:
    a, b = arm(4), arm(5)
    b = dict(reversed(b.items()))
    expected = stats.ttest_rel([a[s] for s in "0123"], [b[s] for s in "0123"])
    ours = paired(a, b)
    assert ours["p"] == pytest.approx(expected.pvalue) and ours["n"] == 4
    assert (ours["low"], ours["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_blocked_equals_paired_for_two_arms_and_gains_degrees_of_freedom_from_the_others() -> None:
    runs = {"a": arm(4), "b": arm(4)}
    two = blocked(runs, ["a"], "b")["a"]
    assert two == pytest.approx(paired(runs["a"], runs["b"]))
    runs |= {"c": arm(4), "d": arm(4)}
    table = np.array([list(own.values()) for own in runs.values()])  # (arm, seed)
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    df = 3 * 3
    t = (table[0].mean() - table[1].mean()) / np.sqrt((residual**2).sum() / df * 2 / 4)
    assert blocked(runs, ["a"], "b")["a"]["p"] == pytest.approx(2 * stats.t.sf(abs(t), df))


def test_blocked_is_least_squares_of_statsmodels_where_arms_lack_seeds() -> None:
    runs = {"a": arm(5), "b": arm(4), "c": arm(3, first=1)}
    rows = [(name, seed, runs[name][seed]) for name in runs for seed in "0123" if seed in runs[name]]
    design = np.array([[1, n == "a", n == "c", *(s == seed for seed in "123")] for n, s, _ in rows], float)
    fit = sm.OLS(np.array([value for _, _, value in rows]), design).fit()
    expected = {"difference": fit.params[1], "p": fit.pvalues[1], "n": 4}
    expected |= dict(zip(("low", "high"), fit.conf_int(0.05)[1], strict=True))
    assert blocked(runs, ["a", "c"], "b")["a"] == pytest.approx(expected)


def test_permutation_is_exact_where_it_can_be() -> None:
    a, b = arm(4), arm(4, shift=1.5)
    pooled = np.array([*a.values(), *b.values()])
    observed = abs(pooled[:4].mean() - pooled[4:].mean())
    splits = [list(c) for c in itertools.combinations(range(8), 4)]
    gaps = [abs(pooled[s].mean() - np.delete(pooled, s).mean()) for s in splits]
    assert permutation({"a": a, "b": b}, ["a"], "b")["a"] == {
        "p": pytest.approx(np.mean(np.array(gaps) >= observed - 1e-12)),
        "n": 4,
        "exact": 1,
    }
    runs = {"a": arm(13), "b": arm(13), "c": arm(3), "d": arm(13)}
    results = permutation(runs, ["a", "c", "d"], "b")
    assert results["a"]["exact"] == 0 and results["d"] == permutation(runs, ["d"], "b")["d"] and "c" not in results


def test_what_cannot_be_done_is_left_out_without_a_warning() -> None:
    still = {"0": 2.1, "1": 2.1, "2": 2.1}
    shifted = {seed: value + 0.1 for seed, value in still.items()}
    assert sensitivity({"a": still, "b": shifted}, ["a"], "b", alpha=0.05) == {"a": {}}
    assert sensitivity({"a": {}, "b": arm(3)}, ["a"], "b", alpha=0.05) == {"a": {}}
    assert sensitivity({"a": arm(3), "b": arm(3, first=500)}, ["a"], "b", alpha=0.05) == {"a": {}}  # no seed in common


def test_arms_with_other_seeds_do_not_disturb_the_blocked_estimate() -> None:
    runs = {"a": arm(4), "b": arm(4)}
    alone = blocked(runs, ["a"], "b")
    assert blocked(runs | {"control": arm(4, first=500)}, ["a"], "b") == alone


def windows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of `count` documents of unequal length: differences that documents share, targets and documents."""
    dice = np.random.default_rng(seed)
    documents = np.repeat(np.arange(count), dice.integers(1, 30, count))
    shared = dice.normal(0.1, 0.2, count)[documents]
    return shared + dice.normal(0, 0.1, len(documents)), dice.integers(1, 50, len(documents)), documents


def test_it_is_the_cluster_robust_error_of_a_weighted_mean() -> None:
    difference, targets, documents = windows(25)
    model = sm.WLS(difference, np.ones(len(difference)), weights=targets)
    reference = model.fit(cov_type="cluster", cov_kwds={"groups": documents}).bse[0]
    found, count = document_error([difference], [np.zeros(len(difference))], documents, targets=targets)
    assert found == pytest.approx(reference, rel=1e-9) and count == 25
    values = np.random.default_rng(1).normal(size=40)  # with one window for each document, the error of a mean
    found, count = document_error([values], [np.zeros(40)], np.arange(40))
    assert found == pytest.approx(stats.sem(values), rel=1e-12) and count == 40


def test_it_is_the_spread_of_the_difference_over_documents_drawn_again() -> None:
    difference, targets, documents = windows(200)
    sums, sizes = np.bincount(documents, targets * difference), np.bincount(documents, targets)
    picks = np.random.default_rng(2).integers(0, 200, (4000, 200))
    bootstrap = (sums[picks].sum(1) / sizes[picks].sum(1)).std()
    found, _ = document_error([difference], [np.zeros(len(difference))], documents, targets=targets)
    assert found == pytest.approx(bootstrap, rel=0.05)
    alone, _ = document_error([difference], [np.zeros(len(difference))], np.arange(len(difference)), targets=targets)
    assert alone < 0.5 * found  # windows of one document are no independent sample


def test_seeds_are_averaged_before_and_what_both_arms_share_cancels() -> None:
    difference, targets, documents = windows(30)
    noise = np.random.default_rng(3).normal(size=(3, len(difference)))
    hard = np.random.default_rng(4).normal(3, 1, len(difference))
    a = [hard + difference + noise[0], hard + difference - noise[0]]
    b = [hard + noise[1], hard + noise[2], hard - noise[1] - noise[2]]
    found = document_error(a, b, documents, targets=targets)
    alone = document_error([difference], [np.zeros(len(difference))], documents, targets=targets)
    assert found[0] == pytest.approx(alone[0], rel=1e-9) and found[1] == 30
    assert document_error(b, a, documents, targets=targets)[0] == pytest.approx(found[0], rel=1e-12)


def test_one_document_has_no_error_and_unequal_lengths_are_refused() -> None:
    found, count = document_error([[1.0, 2.0]], [[0.0, 0.0]], [7, 7])
    assert math.isnan(found) and count == 1
    for wrong in ([[1.0]], []):
        with pytest.raises(ValueError, match="one loss for each window"):
            document_error(wrong, [[0.0, 0.0]], [0, 1])
