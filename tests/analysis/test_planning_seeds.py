"""Planning against the table of the statistical contract, statsmodels and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower

from gpt2lab.analysis import planning
from gpt2lab.analysis.calibration import nominal_level, power


def test_the_planning_table() -> None:
    effects = (0.5, 1, 1.5, 2, 3)
    assert [planning.seeds_for_power(e) for e in effects] == [66, 18, 9, 6, 4]
    assert [planning.seeds_for_power(e, alpha=0.05 / 4) for e in effects] == [93, 25, 13, 8, 5]
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


def test_with_borrowed_noise_one_seed_has_the_power_of_the_t_test_that_it_is() -> None:
    effect, bar = planning.detectable((1, 1), df=9.0), stats.t.ppf(0.975, 9)
    assert stats.nct.sf(bar, 9, effect / math.sqrt(2)) == pytest.approx(0.8, abs=1e-4)


def test_nothing_is_detectable_without_degrees_of_freedom() -> None:
    assert planning.detectable((1, 1)) == math.inf


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
    shown = planning.exaggeration(1.0, (n, n), df=df, inflation=inflation)
    assert shown == pytest.approx(np.abs(estimates[passed]).mean(), rel=0.02)


def test_at_three_seeds_an_effect_of_one_sd_that_passes_looks_about_twice_its_size() -> None:
    assert planning.exaggeration(1.0, (3, 3), df=4) == pytest.approx(2, abs=0.15)
