"""Is the code that writes verdicts calibrated? Thousands of drawn studies, judged by that very code.

Baseline and four arms, Gaussian noise of sd 1, smallest effect 3 sd. Expected rates: derived once by an independent
implementation (formulas written out, Holm by rejection steps, 40,000 draws).
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from gpt2lab.analysis.statistics import Array, welch
from gpt2lab.analysis.verdicts import findings

DRAWS, X = 2000, 3.0
Words = NDArray[np.str_]


def drawn(n: int, shifts: tuple[float, ...] = (0, 0, 0, 0), sds: tuple[float, ...] = (1, 1, 1, 1)) -> list[Array]:
    """Baseline first: each (draws, seed)."""
    rng = np.random.default_rng(100 + n)
    return [rng.normal(shift, sd, (DRAWS, n)) for shift, sd in zip((0, *shifts), (1, *sds), strict=True)]


def words(arms: list[Array]) -> Words:
    return findings(arms[0], arms[1:], smallest_effect=X)[1]


def says(found: Words, word: str) -> NDArray[np.bool_]:
    return np.char.startswith(found, word)


def differs(found: Words) -> NDArray[np.bool_]:
    return says(found, "better") | says(found, "worse")


def noise(rate: float) -> float:
    """Three standard errors of a rate over the draws."""
    return 3 * float(np.sqrt(rate * (1 - rate) / DRAWS))


def keeps_its_level(flags: NDArray[np.bool_], alpha: float = 0.05) -> bool:
    """Whether the share of studies with any false claim is within the level; flags (draws, contrast)."""
    return bool(flags.any(-1).mean() <= alpha + noise(alpha))


@pytest.mark.parametrize("n", [3, 5, 8])
def test_without_any_effect_few_studies_claim_one(n: int) -> None:
    assert keeps_its_level(differs(words(drawn(n))))


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_raw_interval_covers_the_truth(n: int) -> None:
    arms = drawn(n)
    covered = np.mean([np.mean((c.low <= 0) & (c.high >= 0)) for c in (welch(arm, arms[0]) for arm in arms[1:])])
    assert 0.94 <= covered <= 0.975


@pytest.mark.parametrize(
    ("n", "of_three_sd", "of_two_sd", "same", "contract"),
    [
        (3, 0.290, 0.129, 0.396, (0.26, 0.11)),
        (5, 0.873, 0.521, 0.960, (0.86, 0.51)),
        (8, 0.998, 0.873, 0.988, (1, 0.88)),
    ],
)
def test_true_effects_are_found_as_often_as_they_should_be(
    n: int, of_three_sd: float, of_two_sd: float, same: float, contract: tuple[float, float]
) -> None:
    better = says(words(drawn(n, shifts=(-3, -2, 0, 0))), "better").mean(0)
    no_difference = (words(drawn(n)) == "no difference").mean()
    for rate, expected in ((better[0], of_three_sd), (better[1], of_two_sd), (no_difference, same)):
        assert rate == pytest.approx(expected, abs=max(0.03, noise(expected)))
    for rate, reference in zip(better[:2], contract, strict=True):
        assert rate >= reference - max(0.03, noise(reference))


@pytest.mark.parametrize("sd", [2.0, 4.0])
def test_a_noisier_arm_keeps_its_false_positive_rate(sd: float) -> None:
    arms = drawn(5, sds=(sd, 1, 1, 1))
    assert np.mean(welch(arms[1], arms[0]).p < 0.05) <= 0.07
    assert keeps_its_level(differs(words(arms)))


def test_arms_exactly_at_the_smallest_effect_are_rarely_called_equal() -> None:
    found = words(drawn(5, shifts=(X, -X, X, -X)))
    assert keeps_its_level((found == "no difference") | np.char.endswith(found, "(smaller)"))


def test_negative_control_uncorrected_p_values_break_the_level() -> None:
    arms = drawn(5)
    assert not keeps_its_level(np.stack([welch(arm, arms[0]).p < 0.05 for arm in arms[1:]], -1))


def test_negative_control_one_variance_pooled_over_all_arms_breaks_the_level() -> None:
    arms = drawn(5, sds=(4, 1, 1, 1))
    pooled = np.mean([arm.var(-1, ddof=1) for arm in arms], axis=0)
    t = (arms[1].mean(-1) - arms[0].mean(-1)) / np.sqrt(pooled * 2 / 5)
    assert not keeps_its_level((2 * stats.t.sf(np.abs(t), 5 * 4) < 0.05)[:, None])
    assert keeps_its_level((welch(arms[1], arms[0]).p < 0.05)[:, None])


def test_negative_control_the_percentile_bootstrap_breaks_the_level() -> None:
    rng = np.random.default_rng(9)
    arms = drawn(3)[:2]
    low, high = np.percentile(
        np.subtract(*(arm[:, rng.integers(0, 3, (400, 3))].mean(-1) for arm in arms)), (2.5, 97.5), axis=-1
    )
    assert not keeps_its_level(((low > 0) | (high < 0))[:, None])


def test_negative_control_looking_until_it_is_significant_breaks_the_level() -> None:
    arms = drawn(10)[:2]
    looks = [welch(arms[1][:, :n], arms[0][:, :n]).p < 0.05 for n in range(3, 11)]
    assert not keeps_its_level(np.stack(looks, -1))
