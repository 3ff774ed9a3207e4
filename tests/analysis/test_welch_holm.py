"""Welch, equivalence, Holm and the intervals against scipy and statsmodels, and at the edges of what can be tested."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind

from gpt2lab.analysis.calibration import nominal_level, valid_p
from gpt2lab.analysis.statistics import adjust, borrowed, holm, welch

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


def test_axis_says_where_the_seeds_are() -> None:
    arm, against = RNG.normal(size=(5, 4)), RNG.normal(size=(3, 4))
    assert welch(arm, against, axis=0).p == pytest.approx(welch(arm.T, against.T).p)


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


def test_a_comparison_without_p_still_counts_in_the_family() -> None:
    with_gap = holm(np.array([0.01, np.nan, 0.02]))
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


def test_joint_intervals_hold_together() -> None:
    shifts = np.array([-3.5, -3, -2, 0])
    baseline = RNG.normal(size=(4000, 5))
    family = adjust([welch(RNG.normal(s, 1, (4000, 5)), baseline) for s in shifts])
    all_cover = ((family.joint_low <= shifts) & (shifts <= family.joint_high)).all(-1).mean()
    raw_cover = ((family.raw_low <= shifts) & (shifts <= family.raw_high)).all(-1).mean()
    assert all_cover >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 4000)
    assert raw_cover < 0.92  # what the adjustment is for


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
