"""An optimum over model sizes: against statsmodels' weighted least squares, its coverage, what it does not claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from gpt2lab.analysis.tuning import transfer

SIZES = (1e6, 4e6, 1.6e7, 6.4e7, 2.56e8)


def around(optimum: float, se: float) -> tuple[float, float]:
    """The 95 % interval of an optimum whose logarithm has this standard error."""
    return optimum * math.exp(-1.959964 * se), optimum * math.exp(1.959964 * se)


def test_it_is_weighted_least_squares_of_logarithms() -> None:
    optima, se = np.array([0.004, 0.0025, 0.0019, 0.0012, 0.0009]), np.array([0.1, 0.3, 0.1, 0.2, 0.05])
    ours = transfer(SIZES, [*optima], [around(o, s) for o, s in zip(optima, se, strict=True)], target=1e9)
    wls = sm.WLS(np.log(optima), sm.add_constant(np.log(SIZES)), weights=se**-2.0)
    fitted = wls.fit(cov_type="fixed scale")
    assert ours.exponent == pytest.approx(fitted.params[1]) and ours.at_target is not None
    assert math.log(ours.at_target) == pytest.approx(fitted.predict([[1, math.log(1e9)]])[0])
    assert ours.scatter == pytest.approx(wls.fit().scale)
    half = stats.t.ppf(0.975, 3) * fitted.bse[1] * max(1, wls.fit().scale) ** 0.5
    assert ours.exponent_interval == pytest.approx((fitted.params[1] - half, fitted.params[1] + half), rel=1e-5)


@pytest.mark.parametrize(("count", "departure", "least", "most"), [
    (2, 0.0, 0.93, 0.97), (3, 0.0, 0.94, 0.985), (4, 0.0, 0.99, 1.0), (4, 0.2, 0.95, 1.0), (5, 0.2, 0.93, 1.0),
])  # fmt: skip
def test_the_prediction_covers(count: int, departure: float, least: float, most: float) -> None:
    """`departure`: how far the logarithm of each optimum truly lies off the power law."""
    rng, inside = np.random.default_rng(count), 0
    for _ in range(600):
        se = rng.uniform(0.1, 0.25, count)
        truth = math.log(0.004) - 0.3 * np.log(np.array(SIZES[:count]) / 1e6) + rng.normal(0, departure, count)
        optima = np.exp(truth + rng.normal(0, 1, count) * se)
        intervals = [around(o, s) for o, s in zip(optima, se, strict=True)]
        found = transfer(SIZES[:count], [*optima], intervals)
        goal = 0.004 * (4.0**count) ** -0.3 * math.exp(rng.normal(0, departure))
        assert found.target == pytest.approx(1e6 * 4.0**count) and found.target_interval is not None
        inside += found.target_interval[0] <= goal <= found.target_interval[1]
    assert least <= inside / 600 <= most


def test_the_sentences() -> None:
    three = transfer(SIZES[:3], [0.004, 0.0026, 0.0018], [around(o, 0.1) for o in (0.004, 0.0026, 0.0018)])
    assert str(three).startswith("Over three sizes the best learning rate falls as N^-0.29 (-0.")
    assert "for 64.0 M parameters it predicts 0.0012 (0.0" in str(three)
    assert "hardly test" in str(three)
    two = transfer(SIZES[:2], [0.002, 0.0022], [around(o, 0.2) for o in (0.002, 0.0022)])
    assert "rises as N^0.07" in str(two) and "It may as well not move." in str(two) and "cannot test" in str(two)


def test_sizes_without_an_interval_are_left_out_or_all_count_the_same() -> None:
    intervals = [around(0.004, 0.1), None, around(0.002, 0.1)]
    assert transfer(SIZES[:3], [0.004, 0.1, 0.002], intervals).sizes == (1e6, 1.6e7)
    bare = transfer(SIZES[:3], [0.004, 0.0028, 0.002], [None, None, None])
    assert bare.exponent == pytest.approx(-0.25) and bare.exponent_interval is None
    assert "No interval: fewer than two sizes have an interval" in str(bare)


@pytest.mark.parametrize(
    ("sizes", "optima"), [((), ()), ((1e6,), (0.01,)), ((1e6, 1e6), (0.1, 0.2)), ((1, 2), (None, 1))]
)
def test_fewer_than_two_sizes_say_nothing(sizes: tuple[float, ...], optima: tuple[float | None, ...]) -> None:
    found = transfer(sizes, optima, [None] * len(sizes))
    assert found.exponent is None and "cannot be told: fewer than two sizes" in str(found)


def test_sizes_may_come_in_any_order() -> None:
    optima = [0.004, 0.0026, 0.0018]
    there = transfer(SIZES[:3], optima, [around(o, 0.1) for o in optima])
    back = transfer(SIZES[2::-1], optima[::-1], [around(o, 0.1) for o in optima[::-1]])
    assert (back.exponent, back.target_interval) == (there.exponent, there.target_interval)
