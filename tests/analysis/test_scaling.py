"""Compute multipliers and rank agreement: known answers, words, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpt2lab.analysis.scaling import (
    agreement,
    multiplier_text,
    possible,
    reach,
    tau_bounds,
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


def test_multipliers_in_words() -> None:
    noise = np.random.default_rng(1).normal(0, 0.005, 5)
    alike, better = reach(curve(), curve(seed=9)[1.0]), reach(curve(), 1.95 + noise)
    assert alike.spans_one and alike.low > 0.8 and alike.high < 1.2
    assert multiplier_text(alike).endswith("not distinguishable from 1")
    assert 1.1 < better.low < better.high < 1.3 and multiplier_text(better).startswith(("worth 1.1", "worth 1.2"))
    for target, said in ((1.5, "worth more than 2.00x compute"), (2.6, "worth less than 0.50x compute")):
        beyond = reach(curve(), target + noise)
        assert math.isnan(beyond.value) and multiplier_text(beyond) == said
    rising = {0.5: [1.9, 1.91], 1.0: [2.0, 2.01], 2.0: [1.8, 1.81]}
    assert "does not fall" in multiplier_text(reach(rising, [1.95, 1.96]))
    assert "no curve" in reach({1.0: [2.0, 2.1]}, 2.0).reason


def losses(means: dict[str, float], sd: float, seed: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(seed)
    return {arm: {str(s): mean + rng.normal(0, sd) for s in range(4)} for arm, mean in means.items()}


@pytest.mark.parametrize(("early", "final", "sd", "tau"), [
    ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 4.0), 0.01, 1.0),
    ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0), 0.01, -1.0),
    ((2.0,) * 4, (2.0,) * 4, 0.1, None),  # an order that is noise
])  # fmt: skip
def test_agreement_of_orders(early: tuple[float, ...], final: tuple[float, ...], sd: float, tau: float | None) -> None:
    first, last = (losses(dict(zip("abcd", m, strict=False)), sd, seed) for seed, m in enumerate((early, final)))
    found = agreement(first, last, 0.25)
    assert found is not None
    if tau is None:
        assert found.high - found.low > 1.0
    else:
        assert (found.tau, found.low, found.high) == (tau, tau, tau)
    once = {arm: {"0": float(k)} for k, arm in enumerate("abc")}
    single = agreement(once, once, 0.5)
    assert single is not None and single.tau == 1 and math.isnan(single.low) and math.isnan(single.high)
    two = {arm: first[arm] for arm in "ab"}
    assert agreement(two, two, 0.1) is None


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
    """A target noisier than the curve, or less so, is covered a little less often: the degrees of freedom are
    approximate."""
    for spread, noises, least in ((1.0, (0.01, 0.1, 0.3), 0.94), (0.25, (0.1,), 0.93), (4.0, (0.1,), 0.93)):
        table = {
            (n, noise, place): covered(budgets, beta, n, noise, place, draws=10_000, spread=spread)
            for n in (3, 5, 8) for noise in noises for place in PLACES
        }  # fmt: skip
        print(budgets, beta, spread, "lowest", min(table.values()), "median", float(np.median([*table.values()])))
        assert min(table.values()) > least


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


@pytest.mark.parametrize(("means", "target", "ends"), [
    # at 0.5, 1, 2 a curve 1 / b: its loss at sqrt 2 lies between the chord and the line through the two before
    ({0.5: 2.0, 1.0: 1.0, 2.0: 0.5}, 2**-0.5, (2 ** (1 - 2**-0.5), 2 ** (2 - 2**0.5))),
    ({0.5: 2.0, 1.0: 1.0}, 1.5, (0.5, 0.5**0.5)),  # two budgets leave the shape open
    ({0.25: 3.0, 0.5: 2.9, 1.0: 2.0, 2.0: 1.9}, 2.5, (0.5, 1.0)),  # bent the other way: by its order alone
])  # fmt: skip
def test_losses_without_noise_leave_what_a_convex_curve_may_do(
    means: dict[float, float], target: float, ends: tuple[float, float]
) -> None:
    jitter = 1e-7 * np.array([-1.0, 1.0])
    found = reach({b: mean + jitter for b, mean in means.items()}, target + jitter)
    assert (found.low, found.high) == pytest.approx(ends, rel=3e-3)


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
