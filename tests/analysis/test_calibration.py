"""The rates that the self-test expects come from a simulation that shares no code with ours, repeated here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special
from statsmodels.stats.power import TTestIndPower

from gpt2lab.analysis.selftest import BANKS, noise
from gpt2lab.analysis.selftest.claims import REFERENCES
from gpt2lab.analysis.selftest.plans import SEEDS_NEEDED

Array = NDArray[np.float64]

STUDIES = 20_000


def rejected(p: Array) -> NDArray[np.bool_]:
    """Holm's method at .05 in steps: the smallest p against alpha / m, the next against alpha / (m - 1), ..., until one
    is too large.  (draws, contrast)"""
    order, found, going = np.argsort(p, axis=1), np.zeros(p.shape, dtype=bool), np.ones(len(p), dtype=bool)
    for k in range(p.shape[1]):
        at = (np.arange(len(p)), order[:, k])
        going &= p[at] < 0.05 / (p.shape[1] - k)
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
    return d, rejected(np.nan_to_num(p, nan=1.0)), rejected(np.nan_to_num(q, nan=1.0))


@pytest.mark.parametrize("n", [3, 5, 8])
@pytest.mark.parametrize("bank", BANKS)
def test_the_references_come_from_an_independent_simulation(bank: str, n: int) -> None:
    rng, size = np.random.default_rng([9, n]), (STUDIES, 5, n)
    repeats = np.array([float(row["val_loss"]) for row in noise.table("seed_noise_124m.csv")])

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
        assert rate == pytest.approx(reference, abs=0.0005 + 4 * np.sqrt(reference * (1 - reference) / STUDIES))


@pytest.mark.parametrize(("n", "contract"), [(3, (0.26, 0.11)), (5, (0.86, 0.51)), (8, (1.00, 0.88))])
def test_the_references_promise_no_less_power_than_the_statistical_contract(
    n: int, contract: tuple[float, float]
) -> None:
    for reference, promised in zip(REFERENCES["124M seeds", n], contract, strict=False):
        assert reference >= promised - 0.01


@pytest.mark.parametrize("contrasts", [1, 4])
def test_the_seeds_that_plans_are_held_to_are_those_of_statsmodels(contrasts: int) -> None:
    for effect, n in SEEDS_NEEDED[contrasts].items():
        assert math.ceil(TTestIndPower().solve_power(effect, alpha=0.05 / contrasts, power=0.8)) == n
