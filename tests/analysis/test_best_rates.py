"""The difference at each arm's best rate: what it must be where that is known; and what would narrow an interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from gpt2lab.analysis import compare
from gpt2lab.analysis.best_rate import BestRateDifference, RateSearch, WeightedArm
from gpt2lab.analysis.verdicts import TextNoise

SEEDS = np.array([-0.001, 0.0, 0.001])


def search(
    curvature: float, best: float, tried: tuple[float, ...] = (-1.0, 0.0, 1.0), bottom: float = 2.0
) -> RateSearch:
    """Trials without noise on a parabola."""
    losses = tuple(bottom + curvature * (t - best) ** 2 for t in tried)
    return RateSearch(tried=tried, losses=losses, chosen=tried[int(np.argmin(losses))])


def arm(found: RateSearch | None, weight: float = 1.0, bottom: float = 2.0) -> WeightedArm:
    at = bottom if found is None else min(found.losses)
    return WeightedArm(weight=weight, losses=at + SEEDS, search=found)


def test_of_several_arms_weights_and_noise_add_up() -> None:
    own = BestRateDifference(
        [arm(None, w, bottom=b) for w, b in zip((0.5, -0.5, 0.5, -0.5), (2.0, 2.1, 2.2, 2.4), strict=True)]
    )
    se = float(np.sqrt(SEEDS.var(ddof=1) / 3))
    assert own.difference == pytest.approx(-0.15)
    assert own.interval(2.0) == pytest.approx((-0.15 - 2 * se, -0.15 + 2 * se), abs=0.03 * se)
    pair = BestRateDifference([arm(None), arm(None, -1.0, bottom=2.1)])
    assert pair.distance(0.0) == pytest.approx(0.1 / float(np.sqrt(2 * SEEDS.var(ddof=1) / 3)), rel=1e-3)


@pytest.mark.parametrize("best", [0.0, 0.2, 0.45])
def test_the_true_difference_at_the_best_rates_is_inside_however_far_the_grid_missed_them(best: float) -> None:
    """Both arms reach 2.0 at their own best; the grid misses one of them by up to half an octave."""
    own = BestRateDifference([arm(search(0.03, best)), arm(search(0.03, 0.0), -1.0)])
    low, high = own.interval(3.0)
    assert own.difference == pytest.approx(0.03 * best**2)
    assert low <= 0.0 <= high


def test_a_curve_that_is_known_well_takes_the_misfit_off() -> None:
    """Nine quiet trials leave little open: the interval is around the difference at the best rates."""
    tried = tuple(np.linspace(-1, 1, 9))
    off = search(0.03, 0.125 + 1e-9, tried)
    own = BestRateDifference([arm(off), arm(search(0.03, 0.0, tried), -1.0)])
    low, high = own.interval(3.0)
    assert low <= 0.0 <= high and high - low < 0.004 + 2 * 3 * float(np.sqrt(2 * SEEDS.var(ddof=1) / 3))


def test_the_lowest_loss_of_one_arm_is_profiled_as_an_optimiser_would() -> None:
    """Against a direct minimisation over place, steepness and lopsidedness."""
    one = search(0.02, 0.3)
    mean, variance = min(one.losses), float(SEEDS.var(ddof=1))
    at, y = np.append(one.tried, one.chosen), np.append(one.losses, mean)
    weights = np.array([1, 1, 1, 3]) / variance

    def lack(theta: np.ndarray, bottom: float) -> float:
        place, steepness, skew = np.clip(theta[0], -1, 1), abs(theta[1]), np.clip(theta[2], -0.8, 0.98)
        curve = bottom + steepness * np.where(at < place, 1 - skew, 1 + skew) * (at - place) ** 2
        return float((weights * (y - curve) ** 2).sum() + (min(skew, 0.0) / 0.6) ** 2)

    def best(bottom: float) -> float:
        starts = [(p, 0.02, s) for p in (-0.5, 0.0, 0.3, 0.6) for s in (-0.5, 0.0, 0.5, 0.9)]
        return min(optimize.minimize(lack, s, args=(bottom,), method="Nelder-Mead").fun for s in starts)

    other = WeightedArm(weight=-1.0, losses=2.0 + 1e-9 * SEEDS, search=None)  # as good as known
    own = BestRateDifference([arm(one), other])
    least = min(best(b) for b in np.linspace(mean - 0.003, mean + 0.0005, 15))
    for shift in (-0.012, -0.008, -0.004, 0.001):
        expected = np.sqrt(max(best(mean + shift) - least, 0))
        assert own.distance(mean + shift - 2.0) == pytest.approx(expected, rel=0.05, abs=0.2)


def test_a_search_makes_nothing_surer() -> None:
    rows = [
        {"arm": a, "seed": i, "value": v + s} for a, v in (("base", 2.05), ("new", 2.0)) for i, s in enumerate(SEEDS)
    ]
    searches = {"base": search(0.03, 0.4, bottom=2.05), "new": search(0.03, -0.1)}
    plain = compare(rows, baseline="base", smallest_effect=0.1).contrasts[0]
    wide = compare(rows, baseline="base", smallest_effect=0.1, searches=searches).contrasts[0]
    assert wide.low < plain.low and wide.high >= plain.high and wide.p >= plain.p
    assert wide.p_equivalence_holm >= plain.p_equivalence_holm
    assert wide.difference == plain.difference
    assert wide.halfwidths["search"] > 0 and "search" not in plain.halfwidths


def test_what_the_search_leaves_open_is_said_with_what_holds_at_the_chosen_rates() -> None:
    rows = [{"arm": a, "seed": i, "value": v + s / 4} for a, v in (("base", 2.0), ("new", 2.006))
            for i, s in enumerate((*SEEDS, 0.0005, -0.0005))]  # fmt: skip
    searches = {"base": search(0.03, 0.0), "new": search(0.03, 0.45)}
    found = compare(rows, baseline="base", smallest_effect=0.02, searches=searches).contrasts[0]
    assert "no difference larger than 0.02" in found.verdict or "leaves it open" in found.word
    sharp = compare(rows, baseline="base", smallest_effect=0.001, searches=searches).contrasts[0]
    assert sharp.word == "inconclusive: the search of rates leaves it open"
    assert "at the rates that were chosen: worse, [" in sharp.verdict


def test_no_closer_search_is_asked_of_arms_that_searched_for_nothing() -> None:
    """By itself `plain` needs p < .05, and has it only after `searched`, which the coarse search leaves open."""
    noise = 0.01 * np.array([-1.0, 0.0, 1.0])
    means = {"base": 2.0, "plain": 1.968, "searched": 2.06}
    rows = [{"arm": a, "seed": s, "value": m + n} for a, m in means.items() for s, n in enumerate(noise)]
    coarse = RateSearch(tried=(-2.0, 0.0, 2.0), losses=(2.4, 2.06, 2.4), chosen=0.0)
    found = compare(rows, baseline="base", smallest_effect=0.05, searches={"searched": coarse}).contrasts
    plain, searched = found
    alone = compare(rows[:6], baseline="base", smallest_effect=0.05).contrasts[0]
    assert alone.p_holm < 0.05 < plain.p_holm  # what the test is about
    assert searched.word == "inconclusive: the search of rates leaves it open"
    assert plain.word.startswith("inconclusive: ") and "search" not in plain.verdict
    assert "search" not in plain.halfwidths and "search" in searched.halfwidths


def test_the_interval_over_few_documents_is_students() -> None:
    assert TextNoise(se=0.01, count=3, unit="documents").halfwidth == pytest.approx(0.043, abs=1e-4)
    assert TextNoise(se=0.01, count=400, unit="windows").halfwidth == pytest.approx(0.0197, abs=1e-4)
