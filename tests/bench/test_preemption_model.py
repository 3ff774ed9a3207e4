"""The simulation of preemptible GPUs against what is known in closed form."""

from __future__ import annotations

import math

import pytest

from benchmarks.preemption import INTERVALS, Times, best, lost

TIMES = Times(start=0.0, save=20.0, requeue=0.0)


@pytest.mark.parametrize("mean", [3600.0, 14_400.0])
def test_losses_agree_with_the_exact_expectation_for_exponential_failures(mean: float) -> None:
    for interval in INTERVALS[2:14:3]:
        cycle = interval + TIMES.save  # of which a life has n whole ones with probability exp(-n cycle / mean)
        exact = 1 - interval / mean / math.expm1(cycle / mean)
        assert lost(interval, mean, TIMES) == pytest.approx(exact, abs=0.02)
    near = lost(best(mean, TIMES), mean, TIMES)
    assert near < lost(best(mean, TIMES) / 6, mean, TIMES) and near < lost(6 * best(mean, TIMES), mean, TIMES)
    assert lost(900.0, mean, TIMES, notice=True) < lost(900.0, mean, TIMES)
