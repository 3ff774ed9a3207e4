"""The rates that the self-test expects, and the critical values of the test, against simulations without our code."""

from __future__ import annotations

import functools
from importlib.resources import files

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from gpt2lab.analysis.calibration import TABULATED, actual_levels, nominal_level, power, valid_p
from gpt2lab.analysis.selftest import BANKS, REFERENCES, table
from gpt2lab.analysis.statistics import linear, welch

Array = NDArray[np.float64]

STUDIES = 20_000


@functools.cache
def nominal(n: int, draws: int = 400_000) -> dict[float, float]:
    """Level -> the largest nominal level at which Welch's test of n against n seeds keeps it at every ratio of noise;
    by drawing studies without an effect. A tenth of the level is left for noise that is skewed."""
    rng, wanted = np.random.default_rng([3, n]), [0.05 / k for k in range(1, 5)] + [0.1 / k for k in range(1, 5)]
    found = dict.fromkeys(wanted, 1.0)
    for ratio in 2.0 ** np.arange(0, 6.1, 0.75):
        a, b = rng.normal(size=(draws, n)), ratio * rng.normal(size=(draws, n))
        p = stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue
        found = {level: min(old, float(np.quantile(p, level / 1.1))) for level, old in found.items()}
    return found


def rejected(p: Array, n: int, alpha: float) -> NDArray[np.bool_]:
    """Holm's method in steps: the smallest p against the critical value at alpha / m, the next at alpha / (m - 1), ...,
    until one is too large.  (draws, contrast)"""
    order, found, going = np.argsort(p, axis=1), np.zeros(p.shape, dtype=bool), np.ones(len(p), dtype=bool)
    for k in range(p.shape[1]):
        at = (np.arange(len(p)), order[:, k])
        going &= p[at] < nominal(n)[alpha / (p.shape[1] - k)]
        found[at] = going
    return found


def judged_by_formula(x: Array) -> tuple[Array, NDArray[np.bool_], NDArray[np.bool_]]:
    """Difference, whether it is significant, whether it lies within 3: by formulas.  (draws, arm, seed)"""
    n = x.shape[2]
    mean = x.sum(2) / n
    v = ((x - mean[:, :, None]) ** 2).sum(2) / (n - 1) / n
    d, total = mean[:, 1:] - mean[:, :1], v[:, 1:] + v[:, :1]
    with np.errstate(all="ignore"):  # equal values of the real bank
        df = total**2 * (n - 1) / (v[:, 1:] ** 2 + v[:, :1] ** 2)
        p = 2 * special.stdtr(df, -np.abs(d) / np.sqrt(total))
        q = np.maximum(special.stdtr(df, -(d + 3) / np.sqrt(total)), special.stdtr(df, (d - 3) / np.sqrt(total)))
    significant = rejected(np.nan_to_num(p, nan=1.0), n, 0.05)
    return d, significant, rejected(np.nan_to_num(2 * q, nan=2.0), n, 0.1)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (2, 12), (40, 40), pytest.param(None, marks=SLOW)])
def test_the_table_of_the_package_is_what_is_computed(sizes: tuple[int, int] | None) -> None:
    kept = np.load(files("gpt2lab.analysis") / "banks" / "calibration.npy")
    assert len(kept) == len(TABULATED)
    for pair in TABULATED if sizes is None else [sizes]:
        assert kept[TABULATED.index(pair)] == pytest.approx(actual_levels(pair), rel=1e-9)


@SLOW
@pytest.mark.parametrize(("bank", "n"), [(bank, n) for bank in BANKS for n in (3, 5, 8)])
def test_the_references_come_from_an_independent_simulation(bank: str, n: int) -> None:
    rng, size = np.random.default_rng([9, n]), (STUDIES, 5, n)
    repeats = np.array([float(row["val_loss"]) for row in table("seed_noise_124m.csv")])

    def drawn() -> Array:
        if bank == "124M seeds":
            return np.asarray((rng.choice(repeats, size) - repeats.mean()) / repeats.std())
        return rng.normal(size=size) if bank == "Gaussian" else rng.standard_t(5, size) * np.sqrt(3 / 5)

    moved = drawn()
    moved[:, 1] -= 3
    moved[:, 2] -= 2
    d, significant, _ = judged_by_formula(moved)
    _, any_, within = judged_by_formula(drawn())
    rates = (*(significant & (d < 0)).mean(0)[:2], (within & ~any_).mean())
    for rate, reference in zip(rates, REFERENCES[bank, n], strict=True):
        assert rate == pytest.approx(reference, abs=0.003 + 4 * np.sqrt(reference * (1 - reference) / STUDIES))


@pytest.mark.parametrize(("sizes", "level"), [
    pytest.param(sizes, level, marks=() if (sizes, level) == ((3, 10), 0.05) else SLOW)
    for sizes in ((3, 3), (3, 10), (5, 20), (8, 8)) for level in (0.05, 0.0125)
])  # fmt: skip
def test_no_ratio_of_noise_exceeds_the_level_and_one_reaches_it(sizes: tuple[int, int], level: float) -> None:
    """By drawing studies, where calibration.py integrates."""
    rng, rates = np.random.default_rng([5, *sizes]), []
    for ratio in 2.0 ** np.arange(-6, 6.1, 1.0):
        a, b = rng.normal(size=(100_000, sizes[0])), ratio * rng.normal(size=(100_000, sizes[1]))
        rates.append(float((welch(a, b).p < level).mean()))
    allowed = 3 * np.sqrt(level * (1 - level) / 100_000)
    assert max(rates) == pytest.approx(level / 1.1, abs=0.03 * level + allowed)  # a tenth is left for skewed noise


def test_power_is_that_of_drawn_studies() -> None:
    rng = np.random.default_rng(8)
    for sizes, weights in (((3, 3), (1, -1)), ((3, 10), (1, -1)), ((4, 4, 4, 6), (0.5, -0.5, 0.5, -0.5))):
        arms = [rng.normal(size=(40_000, n)) for n in sizes]
        arms[0] += 2 / weights[0]
        test = linear(arms, weights, alpha=0.05)
        found = float(((test.p < 0.05) & (test.difference > 0)).mean())
        assert power(2.0, sizes, weights, alpha=0.05) == pytest.approx(found, abs=0.01)


def test_levels_and_p_values_are_two_readings_of_one_curve() -> None:
    for sizes in ((3, 3), (3, 50), (3, 3, 3, 6)):
        levels = np.array([1e-8, 1e-4, 0.01, 0.05, 0.5])
        assert valid_p(nominal_level(levels, sizes), sizes) == pytest.approx(levels, rel=1e-6)
        assert np.array_equal(valid_p([0.01], sizes), valid_p([0.01], sizes[::-1]))


def test_more_seeds_of_the_baseline_do_not_cost_power() -> None:
    """Beyond twice the arms' seeds they bring little, since an arm's own noise is known from its few seeds alone."""
    found = [power(3.0, (3, base), alpha=0.04) for base in (3, 6, 10, 20, 50)]
    assert found[1] > found[0] + 0.1 and min(found[1:]) > found[1] - 0.03
