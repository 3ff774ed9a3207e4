"""Planning against statsmodels and simulation, and interim looks: the error rate is kept, decisions stand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower

from gpt2lab.analysis import Verdicts, compare, planning
from gpt2lab.analysis.calibration import nominal_level, power
from gpt2lab.analysis.planning import extendable_looks, look_alpha


@pytest.mark.parametrize(("contrasts", "sd", "seeds"), [(1, 3.0, 4), (4, 2.0, 8)])
def test_the_planning_table(contrasts: int, sd: float, seeds: int) -> None:
    """The whole table is a part of the self-test."""
    assert planning.seeds_for_power(sd, alpha=0.05 / contrasts) == seeds
    with pytest.raises(ValueError, match="cannot be resolved"):
        planning.seeds_for_power(0.0)


@pytest.mark.parametrize("n", [30, 60])
def test_with_many_seeds_power_is_statsmodels_power(n: int) -> None:
    """Where Welch's test needs no calibration but for skewed noise, it is the two-sample t-test at equal noise."""
    assert power(0.6, (n, n), alpha=0.055) == pytest.approx(TTestIndPower().power(0.6, n, 0.05), abs=0.003)


@pytest.mark.parametrize(("sizes", "alpha"), [((3, 3), 0.05), ((3, 8), 0.0125)])
def test_the_detectable_effect_has_the_power_it_promises(sizes: tuple[int, int], alpha: float) -> None:
    effect = planning.detectable(sizes, alpha=alpha)
    assert power(effect, sizes, alpha=alpha) == pytest.approx(0.8, abs=1e-4)


def test_few_seeds_and_a_large_family_detect_nothing() -> None:
    assert planning.detectable((2, 3), alpha=0.04) < math.inf
    assert planning.detectable((2, 3), alpha=0.0005) == math.inf  # and scipy is not asked, which takes minutes


def test_with_borrowed_noise_one_seed_has_the_power_of_the_t_test_that_it_is() -> None:
    assert planning.detectable((1, 1)) == math.inf
    effect, bar = planning.detectable((1, 1), df=9.0), stats.t.ppf(0.975, 9)
    assert stats.nct.sf(bar, 9, effect / math.sqrt(2)) == pytest.approx(0.8, abs=1e-4)


def test_the_upper_limit_of_an_sd_covers_the_truth_four_times_in_five() -> None:
    draws = np.random.default_rng(0).normal(0, 2, (20_000, 5)).std(-1, ddof=1)
    assert (planning.sd_upper(draws, 4) >= 2).mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("sd", [0.01, 0.3, 1.0, 4.0, 200.0])
@pytest.mark.parametrize("gain", [1.0, 1.4, 2.0])
def test_the_seeds_for_a_halfwidth_are_enough_and_one_less_is_not(sd: float, gain: float) -> None:
    def halfwidth(n: int) -> float:
        level = float(nominal_level(0.0125, (min(n, 30), min(n, 30))))
        return float(stats.t.ppf(1 - level / 2, gain * (n - 1)) * sd * math.sqrt(2 / n))

    n = planning.seeds_for_halfwidth(sd, 0.5, alpha=0.0125, df_per_seed=gain)
    assert halfwidth(n) <= 0.5
    assert n == 2 or halfwidth(n - 1) > 0.5


@pytest.mark.parametrize(("n", "inflation"), [(3, None), (5, None), (1, 1.5)])
def test_exaggeration_is_what_simulation_shows(n: int, inflation: float | None) -> None:
    rng, df = np.random.default_rng(1), 8.0
    se = math.sqrt(2 / n)
    estimates = rng.normal(1, se, 400_000)
    errors = se * np.sqrt(rng.chisquare(df, 400_000) / df) * (inflation or 1)
    level = 0.05 if inflation else float(nominal_level(0.05, (n, n)))
    passed = np.abs(estimates) > stats.t.isf(level / 2, df) * errors
    shown = planning.exaggeration((n, n), df=df, inflation=inflation)
    assert shown == pytest.approx(np.abs(estimates[passed]).mean(), rel=0.02)


LOOKS = (3, 5, 8)


def judged(frame: pd.DataFrame) -> Verdicts:
    return compare(frame, baseline="base", smallest_effect=0.05, looks=LOOKS)


def table(shifts: dict[str, float], n: dict[str, int], sd: float = 0.01) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    rows = [(arm, seed, 2 + shift + rng.normal(0, sd)) for arm, shift in shifts.items() for seed in range(n[arm])]
    return pd.DataFrame(rows, columns=["arm", "seed", "value"])


def test_the_level_of_three_looks_is_that_of_a_simulation() -> None:
    """Nine tenths of alpha for Gaussian means; the whole of it at most for the test that decides."""
    rng = np.random.default_rng(3)
    sums = rng.normal(size=(400_000, 8)).cumsum(-1)
    bound = stats.norm.isf(look_alpha(LOOKS) / 2)
    crossed = np.any([np.abs(sums[:, n - 1]) / np.sqrt(n) > bound for n in LOOKS], axis=0)
    assert crossed.mean() == pytest.approx(0.045, abs=0.0015)


def test_a_clear_effect_is_decided_at_the_first_look_and_stays_so() -> None:
    frame = table({"base": 0, "good": -0.6, "near": -0.04}, {"base": 8, "good": 3, "near": 8}, sd=0.06)
    found = {c.arm: c for c in judged(frame).contrasts}
    assert found["good"].word == "better" and found["good"].look == 3 and found["good"].n_against == 3
    assert found["near"].look == 8 and found["near"].settled


def test_seeds_beyond_the_last_complete_look_are_not_looked_at() -> None:
    frame = table({"base": 0, "near": -0.04}, {"base": 4, "near": 4}, sd=0.06)
    found = judged(frame).contrasts[0]
    first = compare(frame[frame.seed < 3], baseline="base", smallest_effect=0.05, alpha=look_alpha(LOOKS)).contrasts[0]
    assert (found.look, found.settled, found.p) == (3, False, first.p)
    assert "look 1 of 3 (n = 3)" in found.verdict


def test_before_the_first_look_is_complete_nothing_is_claimed() -> None:
    frame = table({"base": 0, "good": -0.3}, {"base": 3, "good": 3})
    frame.loc[5, "value"] = None
    assert judged(frame.astype(object).where(frame.notna(), None)).contrasts[0].word == "exploratory"


def test_the_order_of_deciding_keeps_the_family_together() -> None:
    """What an earlier look decided still counts in the family of the later ones."""
    frame = table({"base": 0, "good": -0.6, "near": -0.04}, {"base": 8, "good": 3, "near": 8}, sd=0.06)
    near = next(c for c in judged(frame).contrasts if c.arm == "near")
    alone = judged(frame[frame.arm != "good"]).contrasts[0]
    assert near.p == alone.p and near.low <= alone.low and near.high >= alone.high


def test_a_study_keeps_a_fifth_back_and_spends_it_at_twice_and_four_times_the_seeds() -> None:
    looks = extendable_looks((3,), 0.05)
    assert [(look.n, look.declared) for look in looks] == [(3, True), (6, False), (12, False)]
    assert looks[0].level == pytest.approx(0.04)
    sums = np.random.default_rng(3).normal(size=(400_000, 12)).cumsum(-1)
    z = {n: np.abs(sums[:, n - 1]) / np.sqrt(n) for n in (3, 6, 12)}
    spent = np.cumsum([0.04, 0.0035, 0.0035])
    for k in range(1, 4):
        crossed = np.any([z[look.n] > stats.norm.isf(look.level / 2) for look in looks[:k]], axis=0)
        assert crossed.mean() == pytest.approx(spent[k - 1], abs=0.001)
    several = extendable_looks(LOOKS, 0.05)  # declared looks share what is not kept back
    assert [look.n for look in several] == [3, 5, 8, 16, 32]
    assert {look.level for look in several[:3]} == {look_alpha(LOOKS, 0.04)}
    assert several[4].level < several[3].level < several[0].level


def extended(n: int) -> Verdicts:
    """The first n seeds of one and the same study."""
    frame = table({"base": 0, "near": -0.03}, {"base": 12, "near": 12}, sd=0.03)
    return compare(frame[frame.seed < n], baseline="base", smallest_effect=0.05, looks=(3,), extendable=True)


def test_seeds_that_are_added_count_from_the_next_look_on() -> None:
    first, between, second = (extended(n).contrasts[0] for n in (3, 5, 6))
    assert first.word == "inconclusive: need about 9 more seeds per arm" and first.next_look == 6  # 12 are a look
    assert (between.p, between.look, between.n_arm) == (first.p, 3, 3)
    assert (second.look, second.n_arm) == (6, 6) and second.alpha < first.alpha
    assert "judged again at 6 seeds, at alpha 0.0074" in second.verdict
    frame = table({"base": 0, "near": -0.02}, {"base": 12, "near": 12}, sd=0.06)  # after the last look
    last = compare(frame, baseline="base", smallest_effect=0.05, looks=(3,), extendable=True).contrasts[0]
    assert last.look == 12 and last.next_look is None
    assert last.word.startswith("inconclusive: confirm on about")


def test_the_baseline_may_have_more_seeds_at_the_first_look_but_no_more_than_it_had_then() -> None:
    frame = table({"base": 0, "near": -0.05}, {"base": 10, "near": 3}, sd=0.03)
    terms = {"baseline": "base", "smallest_effect": 0.05, "looks": (3,), "extendable": True}
    ten, six = (compare(frame, **terms, baseline_seeds=n).contrasts[0] for n in (10, 6))  # type: ignore[arg-type]
    assert (ten.n_arm, ten.n_against) == (3, 10) and (six.n_arm, six.n_against) == (3, 6)


def test_what_few_seeds_decided_keeps_its_p_whatever_further_seeds_say() -> None:
    """Of `good`, three seeds say p = .01, which is enough for their look and not for the next one; all six say 1e-6."""
    first, later = np.array([0.0, 0.4, -0.3]), np.array([0.1, -0.2, 0.2])
    arms = {"base": (first, later), "near": (first + 0.1, later), "good": (1.2 * first - 2.0, later - 2.0)}
    rows = [
        {"arm": arm, "seed": seed, "value": 5 + value}
        for arm, parts in arms.items()
        for seed, value in enumerate(np.concatenate(parts))
    ]
    terms = {"baseline": "base", "smallest_effect": 0.05, "looks": (3,), "extendable": True}
    near, good = compare(rows, **terms).contrasts  # type: ignore[arg-type]
    before = compare([row for row in rows if row["seed"] < 3], **terms).contrasts[1]  # type: ignore[arg-type, operator]
    assert (good.word, good.look, good.p_holm) == ("better", 3, before.p_holm) and good.p_holm > near.alpha
    assert near.look == 6 and near.word.startswith("inconclusive: ") and "search" not in near.verdict
