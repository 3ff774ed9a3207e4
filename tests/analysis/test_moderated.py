"""The moderated t test that verdicts do not use, and the most power that any valid test could have."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.moderated import CANDIDATES, FALLS_BACK, LIMMA, ONE_SIDED, best_power, moderated
from gpt2lab.analysis.calibration import power


@pytest.mark.parametrize("kind", CANDIDATES)
def test_no_moderated_test_keeps_its_level(kind: str) -> None:
    rng = np.random.default_rng(0)
    arm, against = 4 * rng.standard_normal((40_000, 3)), rng.standard_normal((40_000, 3))
    assert (moderated(arm, against, kind) < 0.05).mean() > 0.06


def test_a_noisy_arm_is_judged_as_by_welch_once_the_prior_is_withdrawn() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(1)
    arms = 30 * rng.standard_normal((2, 5, 6))
    for kind in (FALLS_BACK, ONE_SIDED):
        assert moderated(*arms, kind) == pytest.approx(ttest_ind(*arms, axis=-1, equal_var=False).pvalue, rel=1e-3)
    assert (moderated(*arms, LIMMA) < moderated(*arms, FALLS_BACK)).all()


def test_the_most_power_lies_above_that_of_the_calibrated_test_by_little() -> None:
    most = best_power(3, 3.0, cells=16, differences=24)
    assert power(3.0, (3, 3)) < most < power(3.0, (3, 3)) + 0.15
