"""Compute multipliers, tokens to a loss, their trend over scale, and how early the order of arms shows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpt2lab.analysis.scaling import agreement, difference_trend, reach, tell_multiplier, tell_share, trend

BUDGETS = (0.5, 1.0, 2.0)


def curve(slope: float = -0.2, sd: float = 0.005, n: int = 5, seed: int = 0) -> dict[float, np.ndarray]:
    """Losses that fall by `slope` with every doubling, from 2.0 at budget 1."""
    rng = np.random.default_rng(seed)
    return {b: 2.0 + slope * math.log2(b) + rng.normal(0, sd, n) for b in BUDGETS}


def test_a_loss_on_the_curve_is_found_where_it_was_put() -> None:
    exact = {b: np.array([2.0 - 0.2 * math.log2(b)]) for b in BUDGETS}
    assert reach(exact, 2.0 - 0.2 * math.log2(1.3)).value == pytest.approx(1.3, rel=1e-3)
    assert reach(exact, 2.0).value == pytest.approx(1.0, rel=1e-3)


def test_the_interval_of_a_multiplier_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    truth, inside = 1.25, 0
    for draw in range(400):
        losses = 2.0 - 0.2 * math.log2(truth) + rng.normal(0, 0.01, 4)
        found = reach(curve(sd=0.01, n=4, seed=1000 + draw), losses)
        inside += found.low <= truth <= found.high
    assert inside / 400 == pytest.approx(0.95, abs=0.035)


def test_an_arm_like_the_baseline_is_not_told_from_one() -> None:
    found = reach(curve(), curve(seed=9)[1.0])
    assert found.spans_one and found.low > 0.8 and found.high < 1.2
    assert tell_multiplier(found).endswith("not to be told from 1")


def test_a_better_arm_is_worth_more_compute() -> None:
    found = reach(curve(), 1.95 + np.random.default_rng(1).normal(0, 0.005, 5))
    assert found.low > 1.1 and found.high < 1.3
    assert tell_multiplier(found).startswith("worth 1.1") or tell_multiplier(found).startswith("worth 1.2")


def test_beyond_the_curve_only_a_bound_is_claimed() -> None:
    better = reach(curve(), 1.5 + np.random.default_rng(1).normal(0, 0.005, 5))
    worse = reach(curve(), 2.6 + np.random.default_rng(1).normal(0, 0.005, 5))
    assert math.isnan(better.value) and tell_multiplier(better) == "worth more than 2.00x compute"
    assert math.isnan(worse.value) and tell_multiplier(worse) == "worth less than 0.50x compute"


def test_a_curve_that_does_not_fall_says_nothing() -> None:
    rising = {0.5: [1.9, 1.91], 1.0: [2.0, 2.01], 2.0: [1.8, 1.81]}
    assert "does not fall" in tell_multiplier(reach(rising, [1.95, 1.96]))
    assert "no curve" in reach({1.0: [2.0, 2.1]}, 2.0).reason


def test_share_of_the_tokens_in_words() -> None:
    arm = {b: values - 0.05 for b, values in curve(seed=3).items()}
    told = tell_share(reach(arm, curve()[1.0]), "learned")
    assert told.startswith("reaches learned's loss in 8") and told.endswith("]")


def test_a_constant_multiplier_has_no_trend_and_a_growing_one_has() -> None:
    rng = np.random.default_rng(2)
    sizes = (1e6, 1e7, 1e8)
    same = [reach(curve(seed=i), 1.95 + rng.normal(0, 0.004, 5)) for i in range(3)]
    factor, low, high = trend(sizes, same)
    assert low < 1 < high and factor == pytest.approx(1, abs=0.05)
    growing = [reach(curve(seed=i), 1.98 - 0.05 * i + rng.normal(0, 0.004, 5)) for i in range(3)]
    factor, low, high = trend(sizes, growing)
    assert low > 1 and factor == pytest.approx(2 ** (0.05 / 0.2), abs=0.06)
    assert all(math.isnan(x) for x in trend(sizes[:1], same[:1]))


def test_the_trend_of_a_difference_is_its_slope() -> None:
    rng = np.random.default_rng(3)
    pairs = [(2 - 0.03 * k + rng.normal(0, 0.001, 4), 2 + rng.normal(0, 0.001, 4)) for k in range(3)]
    found = difference_trend((1e6, 1e7, 1e8), pairs)
    assert float(found.difference) == pytest.approx(-0.03, abs=0.002)
    assert float(found.low) < -0.03 < float(found.high)


def losses(means: dict[str, float], sd: float, seed: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(seed)
    return {arm: {str(s): mean + rng.normal(0, sd) for s in range(4)} for arm, mean in means.items()}


def test_an_order_that_stands_early_is_seen_to_stand() -> None:
    means = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    found = agreement(losses(means, 0.01, 0), losses(means, 0.01, 1), 0.25)
    assert found and (found.tau, found.low, found.high) == (1.0, 1.0, 1.0)


def test_an_order_that_is_noise_has_a_wide_interval() -> None:
    means = dict.fromkeys("abcd", 2.0)
    found = agreement(losses(means, 0.1, 0), losses(means, 0.1, 1), 0.25)
    assert found and found.high - found.low > 1.0


def test_a_reversed_order_is_minus_one_and_two_arms_are_too_few() -> None:
    up, down = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 3.0, "b": 2.0, "c": 1.0}
    found = agreement(losses(up, 0.01, 0), losses(down, 0.01, 1), 0.1)
    assert found and found.tau == -1.0
    assert agreement(losses({"a": 1, "b": 2}, 0.01, 0), losses({"a": 1, "b": 2}, 0.01, 1), 0.1) is None


def test_a_loss_beyond_the_curve_still_bounds_the_share() -> None:
    curve = {0.5: [2.13, 2.14, 2.13], 1.0: [1.97, 1.96, 1.98]}
    assert tell_share(reach(curve, [2.42, 2.43, 2.41]), "learned") == (
        "reaches learned's loss in less than 50 % of the tokens"
    )
    assert tell_share(reach(curve, [1.5, 1.51, 1.49]), "learned") == (
        "needs more than 100 % of the tokens to learned's loss"
    )
