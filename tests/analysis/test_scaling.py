"""Compute multipliers, their trend over size, and rank agreement: known answers, words, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpt2lab.analysis.scaling import (
    agreement,
    difference_trend,
    possible,
    reach,
    tau_bounds,
    tell_multiplier,
    tell_share,
    trend,
)
from gpt2lab.analysis.statistics import Array

DOUBLINGS = (0.5, 1.0, 2.0)


def curve(slope: float = -0.2, sd: float = 0.005, n: int = 5, seed: int = 0) -> dict[float, np.ndarray]:
    """Losses that fall by `slope` with every doubling, from 2.0 at budget 1."""
    rng = np.random.default_rng(seed)
    return {b: 2.0 + slope * math.log2(b) + rng.normal(0, sd, n) for b in DOUBLINGS}


def test_a_loss_on_the_curve_is_found_where_it_was_put() -> None:
    exact = {b: np.array([2.0 - 0.2 * math.log2(b)]) for b in DOUBLINGS}
    assert reach(exact, 2.0 - 0.2 * math.log2(1.3)).value == pytest.approx(1.3, rel=1e-3)
    assert reach(exact, 2.0).value == pytest.approx(1.0, rel=1e-3)


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


EXPONENTS = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0)
BUDGETS = ((0.5, 1.0, 2.0), (0.25, 1.0, 4.0), (0.25, 0.5, 1.0, 2.0, 4.0), (0.5, 1.0))
PLACES = (0.03, 0.3, 0.5, 0.8, 0.97)
"""Of the true multiplier, between the logarithms of the smallest and the largest budget."""


def law(logs: Array, beta: float) -> Array:
    """Losses of a curve that falls as a power of the budget; with 0, as a straight line over its logarithm."""
    return np.asarray(np.exp(-beta * logs) if beta else -logs)


def covered(
    budgets: tuple[float, ...], beta: float, n: int, noise: float, place: float, *, draws: int, spread: float = 1.0
) -> float:
    """Share of drawn studies that hold the true multiplier for possible.

    The sd between seeds is `noise` of the mean loss between neighbouring budgets; the target's is `spread` times that.
    """
    rng = np.random.default_rng(int(1000 * (beta + place + noise)) + n)
    logs = np.log(budgets)
    at = logs[:1] + place * (logs[-1] - logs[0])
    sd = noise * float(-np.diff(law(logs, beta)).mean())
    losses = [loss + rng.normal(0, sd, (draws, n)) for loss in law(logs, beta)]
    target = law(at, beta) + rng.normal(0, spread * sd, (draws, n))
    return float(possible(at, logs, losses, target).mean())


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("budgets", BUDGETS)
def test_a_multiplier_is_covered_whatever_the_curve(budgets: tuple[float, ...], beta: float) -> None:
    assert min(covered(budgets, beta, 3, noise, 0.5, draws=2000) for noise in (0.01, 0.3)) > 0.94


@pytest.mark.slow
@pytest.mark.parametrize("beta", EXPONENTS)
@pytest.mark.parametrize("budgets", BUDGETS)
def test_the_coverage_of_multipliers_over_the_whole_table(budgets: tuple[float, ...], beta: float) -> None:
    table = {
        (n, noise, place): covered(budgets, beta, n, noise, place, draws=10_000)
        for n in (3, 5, 8) for noise in (0.01, 0.1, 0.3) for place in PLACES
    }  # fmt: skip
    print(budgets, beta, "lowest", min(table.values()), "median", float(np.median([*table.values()])))
    assert min(table.values()) > 0.94


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.25, 4.0])
def test_a_target_that_is_noisier_than_the_curve_or_less_so_is_covered(spread: float) -> None:
    """A little less often than at equal noise: Satterthwaite's degrees of freedom are an approximation."""
    shares = [
        covered(budgets, beta, n, 0.1, place, draws=10_000, spread=spread)
        for budgets in BUDGETS for beta in (0.0, 0.3, 2.0) for n in (3, 5) for place in PLACES
    ]  # fmt: skip
    print(spread, "lowest", min(shares))
    assert min(shares) > 0.93


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_an_interval_is_all_that_is_possible(beta: float) -> None:
    """So what is true of `possible` is true of `reach`; where that refuses to answer, it rules nothing out."""
    rng = np.random.default_rng(5)
    budgets, n = (0.25, 1.0, 4.0), 4
    logs = np.log(budgets)
    for truth in (0.3, 0.9, 2.5):
        at = np.log([truth])
        for _ in range(20):
            losses = [loss + rng.normal(0, 0.2, n) for loss in law(logs, beta)]
            target = law(at, beta) + rng.normal(0, 0.2, n)
            found = reach(dict(zip(budgets, losses, strict=True)), target)
            assert found.low <= truth <= found.high or not possible(at, logs, losses, target)[0]


def test_losses_without_noise_leave_what_a_convex_curve_may_do() -> None:
    """At 0.5, 1, 2 a curve 1 / b; its loss at sqrt 2 lies between the chord and the line through the two before."""
    jitter = 1e-7 * np.array([-1.0, 1.0])
    found = reach({b: 1 / b + jitter for b in (0.5, 1.0, 2.0)}, 2**-0.5 + jitter)
    assert found.value == pytest.approx(2**0.5, rel=1e-3)
    assert (found.low, found.high) == pytest.approx((2 ** (1 - 2**-0.5), 2 ** (2 - 2**0.5)), rel=3e-3)


def test_two_budgets_leave_the_shape_open() -> None:
    jitter = 1e-7 * np.array([-1.0, 1.0])
    found = reach({0.5: 2 + jitter, 1.0: 1 + jitter}, 1.5 + jitter)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5**0.5), rel=3e-3)


def test_a_curve_that_is_bent_the_other_way_is_read_by_its_order_alone() -> None:
    jitter = 1e-4 * np.array([-1.0, 0.0, 1.0])
    found = reach({0.25: 3 + jitter, 0.5: 2.9 + jitter, 1.0: 2 + jitter, 2.0: 1.9 + jitter}, 2.5 + jitter)
    assert (found.low, found.high) == pytest.approx((0.5, 1.0), rel=3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_trend_of_multipliers_is_covered(beta: float) -> None:
    rng = np.random.default_rng(3)
    budgets, sizes, truths = (0.5, 1.0, 2.0), (1e6, 1e7, 1e8), (0.9, 1.0, 1.2)
    logs = np.log(budgets)
    factor = math.exp(float(np.polyfit(np.log10(sizes), np.log(truths), 1)[0]))
    sd, inside = 0.05 * float(-np.diff(law(logs, beta)).mean()), []
    for _ in range(600):
        found = []
        for truth in truths:
            losses = [loss + rng.normal(0, sd, 4) for loss in law(logs, beta)]
            target = law(np.log([truth]), beta) + rng.normal(0, sd, 4)
            found.append(reach(dict(zip(budgets, losses, strict=True)), target))
        _, low, high = trend(sizes, found)
        inside.append(low <= factor <= high)
    print(beta, "trend", np.mean(inside))
    assert np.mean(inside) > 0.94


def drawn(arms: int, n: int, early: float, late: float, hang: float, draws: int) -> tuple[list[Array], list[Array]]:
    """Losses of arms whose means lie `early` and `late` sd apart at the two points; (draw, seed) of each arm."""
    rng = np.random.default_rng(arms + n)
    then = rng.normal(size=(arms, draws, n))
    now = hang * then + math.sqrt(1 - hang**2) * rng.normal(size=(arms, draws, n))
    return [early * k + then[k] for k in range(arms)], [late * k + now[k] for k in range(arms)]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("arms", [3, 4, 5, 6])
def test_the_coverage_of_rank_agreement_over_the_whole_table(arms: int, n: int) -> None:
    """The same order in truth, or the reverse; worst where arms lie close together early and far apart late."""
    spaces = [(s, s) for s in (0.01, 0.5, 1.0, 2.0, 3.0, 5.0)] + [(0.01, 50.0), (0.2, 50.0), (50.0, 0.01)]
    table = {}
    for early, late in spaces:
        for hang in (-0.9, 0.0, 0.5, 0.9):
            then, now = drawn(arms, n, early, late, hang, 10_000)
            table[early, late, hang, 1] = float((tau_bounds(then, now)[1] == 1).mean())
            table[early, late, hang, -1] = float((tau_bounds(then, now[::-1])[0] == -1).mean())
    print(arms, n, "lowest", min(table.values()), min(table, key=table.__getitem__))
    assert min(table.values()) > 0.95


def test_the_same_order_is_covered_where_arms_lie_close_together() -> None:
    for early, late in ((0.5, 0.5), (0.01, 50.0)):
        assert float((tau_bounds(*drawn(4, 3, early, late, 0.5, 2000))[1] == 1).mean()) > 0.95


def test_bounds_of_tau_count_pairs() -> None:
    """b and c change places for sure, a stands for sure, and where d belongs is open."""
    jitter = np.array([-0.01, 0.0, 0.01])
    early = [mean + jitter for mean in (1.0, 2.0, 3.0)]
    final = [mean + jitter for mean in (1.0, 3.0, 2.0)]
    low, high = tau_bounds(early, final)
    assert (float(low), float(high)) == pytest.approx((1 / 3, 1 / 3))
    wide = np.array([-5.0, 0.0, 5.0])
    low, high = tau_bounds([*early, 2.0 + wide], [*final, 2.5 + wide])
    assert (float(low), float(high)) == pytest.approx(((2 - 1 - 3) / 6, (2 - 1 + 3) / 6))


def test_one_seed_gives_no_interval() -> None:
    once = {arm: {"0": float(k)} for k, arm in enumerate("abc")}
    found = agreement(once, once, 0.5)
    assert found is not None and found.tau == 1 and math.isnan(found.low) and math.isnan(found.high)
