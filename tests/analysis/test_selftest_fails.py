"""Wrong code does not pass the self-test: each part is replaced by a wrong one, for the length of one test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from gpt2lab.analysis import judging, verdicts
from gpt2lab.analysis.planning import Look, seeds_for_power
from gpt2lab.analysis.selftest import claims, plans, sameness, selftest
from gpt2lab.analysis.selftest.noise import table
from gpt2lab.analysis.statistics import Comparison, Family, adjust, welch
from gpt2lab.analysis.verdicts import decide

FEW = 1000
Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def few_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, studies take long; these faults show in any twenty."""
    monkeypatch.setattr(sameness, "MOST_TABLES", 20)
    monkeypatch.setattr(sameness, "MOST_LOOKS", 5)


def failed(part: str) -> set[str]:
    """The checks of one part that do not come out as they should."""
    return {row.check for row in selftest(FEW, parts=[part]).wrong}


def patched_welch(monkeypatch: pytest.MonkeyPatch, change: Callable[[Comparison, Array, Array], Comparison]) -> None:
    """Let `findings` use another estimator; `compare` keeps the right one."""

    def estimator(arm: ArrayLike, against: ArrayLike, **terms: Any) -> Comparison:
        return change(welch(arm, against, **terms), np.asarray(arm), np.asarray(against))

    monkeypatch.setattr(verdicts, "welch", estimator)


def test_a_percentile_bootstrap_fails_where_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def bootstrap(right: Comparison, arm: Array, against: Array) -> Comparison:
        means = [x[..., np.random.default_rng(i).integers(0, x.shape[-1], (200, x.shape[-1]))].mean(-1)
                 for i, x in enumerate((arm, against))]  # fmt: skip
        above = (means[0] > means[1]).mean(-1)
        return replace(right, p=2 * np.minimum(above, 1 - above))

    patched_welch(monkeypatch, bootstrap)
    monkeypatch.setattr(claims, "TIMES", 1)  # 200 resamples of each
    wrong = failed("rates")
    assert {"all null: any better/worse", "one arm at 2 sd: better/worse", "one arm at 4 sd: better/worse"} <= wrong


def test_a_variance_pooled_over_all_arms_fails_with_a_noisy_arm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The variance of four quiet arms, lent to the noisy one, as a pooled analysis of variance does."""

    def pooled(right: Comparison, arm: Array, against: Array) -> Comparison:
        n = arm.shape[-1]
        se = np.sqrt((against.var(-1, ddof=1) * 4 + arm.var(-1, ddof=1)) / 5 * 2 / n)
        return replace(right, se=se, p=2 * stats.t.sf(np.abs(right.difference) / se, 5 * (n - 1)))

    patched_welch(monkeypatch, pooled)
    assert {"one arm at 4 sd: better/worse", "one of 4 arms at 4 sd: any better/worse"} <= failed("rates")


def test_no_adjustment_for_the_family_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def unadjusted(comparisons: Any, **terms: Any) -> Family:
        family = adjust(comparisons, **terms)
        return replace(family, p_holm=family.p, p_equivalence_holm=family.p_equivalence)

    monkeypatch.setattr(verdicts, "adjust", unadjusted)
    monkeypatch.setattr(plans, "adjust", unadjusted)
    wrong = failed("rates")
    assert {"all null: any better/worse", "all null: no difference larger than X", "true -2 sd: better"} <= wrong
    assert "95 % interval: holds the truth" not in wrong  # it is not adjusted in the first place


def test_a_turned_sign_fails_wherever_a_difference_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(difference: ArrayLike, *p: ArrayLike, **terms: Any) -> NDArray[np.str_]:
        return decide(-np.asarray(difference), *p, **terms)

    monkeypatch.setattr(verdicts, "decide", turned)
    assert failed("rates") == {"true -3 sd: better", "true -2 sd: better"}
    assert "compare against findings: other word" in failed("agreement")
    monkeypatch.setattr(judging, "decide", turned)
    assert failed("agreement") == {"compare against findings, with looks: other word"}  # consistent, and wrong:
    assert {row.check for row in selftest(FEW, parts=["golden"]).wrong} == {"golden mudd_skips: better"}


def test_a_one_sided_rule_fails_when_arm_and_baseline_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_sided(right: Comparison, arm: Array, against: Array) -> Comparison:
        return replace(right, p=np.where(right.difference < 0, right.p / 2, 1 - right.p / 2))

    patched_welch(monkeypatch, one_sided)
    assert failed("invariances") == {"arm and baseline swapped: more than the sign"}


def test_a_test_paired_by_seed_fails_when_seeds_are_relabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_welch(
        monkeypatch, lambda right, arm, against: replace(right, p=stats.ttest_rel(arm, against, axis=-1).pvalue)
    )
    assert failed("invariances") == {"seeds relabelled: changed"}


def test_a_relative_difference_fails_when_all_losses_are_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_welch(
        monkeypatch,
        lambda right, arm, against: replace(right, difference=right.difference / (1e4 + against.mean(-1))),
    )
    assert "all losses shifted: changed" in failed("invariances")


def test_equivalence_at_half_the_confidence_fails_at_a_difference_of_exactly_x(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_welch(monkeypatch, lambda right, *_: replace(right, p_equivalence=right.p_equivalence / 4))
    assert {"true difference X: called smaller", "all null: no difference larger than X"} <= failed("rates")


def test_looks_at_the_full_level_each_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "declared_looks", lambda at, alpha: [Look(n, alpha) for n in at])
    assert "n = 3, 5, 8, 1 arm, all null: any better/worse" in failed("looks")


def test_looks_judged_otherwise_than_declared_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["gpt2lab.analysis.compare"], "declared_looks", lambda at, alpha: [Look(n, alpha / 50) for n in at]
    )
    assert failed("agreement") == {"compare against findings, with looks: other word"}


def test_a_planner_that_asks_for_one_seed_too_few_or_too_many_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for more in (-1, 1):
        monkeypatch.setattr(
            plans, "seeds_for_power", lambda effect, *, alpha, by=more: seeds_for_power(effect, alpha=alpha) + by
        )
        wrong = selftest(FEW, parts=["planner"]).wrong
        assert len([row for row in wrong if row.bank == "computed"]) == 11  # ten powers, and the count
        assert any(row.bank == "Gaussian" for row in wrong) and wrong[-1].measured == 10


def test_a_blunt_yardstick_is_noticed_because_wrong_methods_pass_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2lab.analysis.selftest.rows.SIGMAS", 30.0)
    result = selftest(FEW, parts=["controls"])
    assert not result.ok and {row.status for row in result.wrong} == {"missed"}


def test_golden_data_that_says_otherwise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(name: str) -> list[dict[str, str]]:
        rows = table(name)
        (arm,) = {row["arm"] for row in rows if row["contrast"] == "mudd_skips"} - {"baseline"}
        turned = {"baseline": arm, arm: "baseline"}
        return [row | {"arm": turned[row["arm"]]} if row["contrast"] == "mudd_skips" else row for row in rows]

    monkeypatch.setattr(sameness, "table", swapped)
    assert failed("golden") == {"golden mudd_skips: better"}
