"""Differences in tasks on two levels, seeds and questions: against statsmodels and scipy, and by simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from numpy.typing import NDArray
from scipy import stats

from gpt2lab.analysis.items import judge_items, over_items

Array = NDArray[np.float64]


def drawn(rng: np.random.Generator, n: int, items: int, *, seeds: float, questions: float, shift: float = 0.0) -> Array:
    """Scores of 0 and 1 of two arms: seeds and questions move the chance of a right answer.  -> (2, n, items)"""
    difficulty = rng.normal(0, 1, items)
    own = rng.normal(0, questions, (2, 1, items)) + rng.normal(0, seeds, (2, n, 1))
    logits = difficulty + own + np.array([shift, 0.0])[:, None, None]
    return (rng.random((2, n, items)) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def test_each_level_is_the_clustered_variance_of_statsmodels() -> None:
    n, items = 4, 60
    a, b = drawn(np.random.default_rng(0), n, items, seeds=0.5, questions=0.5)
    frame = pd.DataFrame(
        [(k, f"{k}{s}", i, y) for k, arm in enumerate((b, a)) for s, row in enumerate(arm) for i, y in enumerate(row)],
        columns=["arm", "run", "item", "y"],
    )
    frame["runs"] = frame.run.astype("category").cat.codes
    found, variances = over_items(a, b), {}
    for name in ("runs", "item"):
        fit = smf.ols("y ~ arm", frame).fit(
            cov_type="cluster", cov_kwds={"groups": frame[name], "use_correction": False}
        )
        assert fit.params["arm"] == pytest.approx(found.difference)
        variances[name] = fit.bse["arm"] ** 2
    assert found.seeds is not None
    assert float(found.seeds.se) ** 2 == pytest.approx(variances["runs"] * n / (n - 1))
    interaction = 0.0
    for arm in (a, b):
        whole = pd.DataFrame(arm).stack().reset_index(name="y").set_axis(["run", "item", "y"], axis=1)
        residual = smf.ols("y ~ C(run) + C(item)", whole).fit()
        interaction += residual.mse_resid / (n * items)
    assert found.questions_se**2 == pytest.approx(variances["item"] * items / (items - 1) - interaction)


def test_one_run_each_is_the_paired_t_test_over_questions() -> None:
    a, b = drawn(np.random.default_rng(1), 1, 200, seeds=0.5, questions=1.0, shift=0.4)
    found, paired = over_items(a, b), stats.ttest_rel(a[0], b[0])
    assert found.p() == pytest.approx(paired.pvalue, rel=1e-6)
    low, high = paired.confidence_interval(0.95)
    half = found.halfwidth(0.05)
    assert (found.difference - half, found.difference + half) == pytest.approx((low, high))
    [judged] = judge_items([("t/acc", "a", "b", a, b)], smallest_effect=0.1)
    assert not judged.word and "training noise is not in the interval" in str(judged)
    assert list(judged.halfwidths) == ["questions"]


@pytest.mark.parametrize(("seeds", "questions"), [(0.0, 0.0), (0.3, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_intervals_hold_for_new_seeds_and_new_questions(seeds: float, questions: float) -> None:
    rng, missed = np.random.default_rng(2), 0
    for _ in range(400):
        a, b = drawn(rng, 3, 150, seeds=seeds, questions=questions)
        missed += over_items(a, b).p() < 0.05  # both arms have the same chances on average
    assert missed / 400 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_seeds_alone_would_call_other_questions_a_difference() -> None:
    """Runs that hardly differ, arms that suit different questions: the runs' means agree, the questions decide."""
    rng, by_seeds, both = np.random.default_rng(3), 0, 0
    for _ in range(200):
        found = over_items(*drawn(rng, 5, 100, seeds=0.0, questions=2.0))
        assert found.seeds is not None
        by_seeds += float(found.seeds.p) < 0.05
        both += found.p() < 0.05
    assert by_seeds > 0.15 * 200 > 0.08 * 200 > both


def test_words_follow_the_family() -> None:
    rng = np.random.default_rng(4)
    a, b = drawn(rng, 5, 2000, seeds=0.02, questions=0.1, shift=0.5)
    family = [("t/acc", "a", "b", a, b), ("t/acc", "c", "b", b + 0.0, b), ("u/acc", "b", "a", b, a)]
    better, same, worse = judge_items(family, smallest_effect=0.05)
    assert (better.word, same.word, worse.word) == ("better", "no difference larger than 0.05", "worse")
    assert better.low > 0 and better.low == pytest.approx(-worse.high)
    assert str(better).startswith("t/acc, a against b: better, +0.") and "(n = 5, 5; 2,000 questions; ±" in str(better)
    assert {c.word for c in judge_items(family[1:2], smallest_effect=None)} == {"inconclusive"}
    constant = np.ones((3, 10))
    [nothing] = judge_items([("t/acc", "a", "b", constant, constant)], smallest_effect=0.05)
    assert not nothing.word and "no spread" in nothing.reason and "+0" not in str(nothing)
    assert judge_items(family, smallest_effect=0.05, reasons=["late"] * 3)[0].word == ""
