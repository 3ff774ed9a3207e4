"""The anytime-valid t test that designs are compared with, against its definition as an integral and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from benchmarks.sequential import evidence, first_at_looks, first_by_evidence
from gpt2lab.analysis.planning import declared_looks


def test_the_evidence_is_the_bayes_factor_of_its_priors() -> None:
    values, prior = np.array([0.4, 1.1, 0.7, 1.6]), 2.0

    def marginal(alternative: bool) -> float:
        """Density of the values, integrated over the sd with the prior 1 / sd, and over the mean."""

        def at(log_sd: float) -> float:
            sd, n = math.exp(log_sd), len(values)
            covariance = sd**2 * (np.eye(n) + prior * np.ones((n, n)) * alternative)
            exponent = -0.5 * values @ np.linalg.solve(covariance, values)
            return math.exp(exponent) / math.sqrt(np.linalg.det(2 * math.pi * covariance))

        return float(integrate.quad(at, -8, 8, limit=400)[0])

    factor = evidence(values[None], prior)[0]
    assert factor[0] == 1 and factor[-1] == pytest.approx(marginal(True) / marginal(False), rel=1e-6)


def test_its_chance_of_ever_finding_a_difference_is_bounded_at_any_spread() -> None:
    rng = np.random.default_rng(0)
    for spread in (1.0, 10.0):
        arm, against = spread * rng.standard_normal((4000, 60)), rng.standard_normal((4000, 60))
        found = first_by_evidence(60, 1, 0.05)(arm, against)
        assert 0.005 < np.isfinite(found).mean() < 0.05
        at_any = np.isfinite(first_by_evidence(60, 1, 0.2)(arm, against)).mean()
        assert 0.05 < at_any < 0.2


def test_declared_looks_at_every_number_of_seeds_spend_fewer() -> None:
    rng = np.random.default_rng(1)
    arm, against = rng.standard_normal((2000, 12)) - 3, rng.standard_normal((2000, 12))
    looks = first_at_looks(declared_looks(tuple(range(3, 13)), 0.05), 1)(arm, against)
    anytime = first_by_evidence(12, 1, 0.05)(arm, against)
    assert np.minimum(looks, 12).mean() < np.minimum(anytime, 12).mean() < 8
