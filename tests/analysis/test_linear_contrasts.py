"""Weighted sums of arms: main effects and interactions, held against Welch's test, statsmodels and simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.oneway import anova_oneway

from gpt2lab.analysis import compare
from gpt2lab.analysis.calibration import valid_p
from gpt2lab.analysis.statistics import linear, welch
from gpt2lab.errors import ConfigError

FOUR = ("base", "norm", "mlp", "both")
MAIN = {"arm": "mlp=swiglu", "against": "mlp=gelu", "weights": {"mlp": 0.5, "both": 0.5, "base": -0.5, "norm": -0.5}}
TOGETHER = {
    "arm": "norm with mlp",
    "against": "their effects added",
    "weights": {"both": 1, "base": 1, "norm": -1, "mlp": -1},
}


def table(effect: float = 0.0, extra: float = 0.0, n: int = 5) -> pd.DataFrame:
    """A 2 x 2 study: `effect` of the mlp, `extra` where both changes meet."""
    rng = np.random.default_rng(4)
    shift = {"base": 0.0, "norm": -0.1, "mlp": effect, "both": effect - 0.1 + extra}
    rows = [(arm, seed, 2 + shift[arm] + rng.normal(0, 0.01)) for arm in FOUR for seed in range(n)]
    return pd.DataFrame(rows, columns=["arm", "seed", "value"])


def test_two_arms_are_welchs_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (50, 4)), rng.normal(0, 3, (50, 6))
    ours, theirs = linear([a, b], [1, -1], margin=2.0), welch(a, b, margin=2.0)
    for name in ("difference", "se", "df", "p", "low", "high", "p_equivalence"):
        assert np.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-14), name


def test_the_statistic_is_that_of_welchs_anova_where_the_two_agree() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 5), rng.normal(0.5, 2, 7)
    test = linear([a, b], [1, -1])
    expected = anova_oneway([a, b], use_var="unequal")
    assert float(test.difference / test.se) ** 2 == pytest.approx(expected.statistic)
    assert float(test.p) == pytest.approx(float(valid_p(expected.pvalue, (5, 7))))


def test_intervals_of_an_interaction_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    arms = [rng.normal(mean, sd, (20_000, 4)) for mean, sd in zip((0, 1, 2, 4), (1, 2, 1, 3), strict=True)]
    test = linear(arms, [1, -1, -1, 1])
    assert 0.95 <= np.mean((test.low <= 1) & (test.high >= 1)) <= 0.975


def test_main_effect_and_interaction_get_their_words() -> None:
    found = compare(table(-0.2, 0.0), baseline="base", smallest_effect=0.05, contrasts=[MAIN, TOGETHER])
    words = {c.arm: c.word for c in found.contrasts}
    assert words == {"mlp=swiglu": "better", "norm with mlp": "no difference larger than 0.05"}
    assert found.contrasts[0].difference == pytest.approx(-0.2, abs=0.01)


def test_an_interaction_is_found_where_there_is_one() -> None:
    found = compare(table(-0.2, 0.15), baseline="base", smallest_effect=0.05, contrasts=[MAIN, TOGETHER])
    assert {c.arm: c.word for c in found.contrasts}["norm with mlp"] == "worse"


def test_a_failed_run_in_any_arm_of_an_effect_makes_it_unstable() -> None:
    frame = table(-0.2)
    frame.loc[0, "value"] = np.nan
    found = compare(frame, baseline="base", smallest_effect=0.05, contrasts=[MAIN])
    assert found.contrasts[0].word == "unstable (1 of 5 failed)"


@pytest.mark.parametrize("weights", [{"base": 1}, {"base": 1, "mlp": -0.5}, {"base": 0, "mlp": 0}])
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="weights that add up to 0"):
        compare(table(), baseline="base", smallest_effect=0.05, contrasts=[{**MAIN, "weights": weights}])
