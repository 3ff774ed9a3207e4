"""Numbers as verdicts print them."""

from __future__ import annotations

import math

import pytest

from gpt2lab.analysis.wording import effect, interval, probability


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((-0.257, -0.281, -0.233), "-0.257 nats [-0.281, -0.233]"),
        ((5.0, 4.89, 5.11), "+5.00 nats [+4.89, +5.11]"),
        ((-0.018, -0.0352, -0.0003), "-0.0180 nats [-0.0352, -0.0003]"),  # it leaves out zero, so no bound shows zero
        ((0.018, 4e-09, 0.0352), "+0.0180000 nats [+4e-09, +0.0352000]"),
        ((-0.0002, -0.0193, 0.0189), "+0.000 nats [-0.019, +0.019]"),
        ((1e300, 0.8e300, 1.2e300), "+1.00e+300 nats [+8.00e+299, +1.20e+300]"),
        ((2e-12, 1e-12, 3e-12), "+2.0e-12 nats [+1.0e-12, +3.0e-12]"),
        ((0.2, math.nan, math.nan), "+0.200 nats"),
        ((0.0, math.nan, math.nan), "0 nats"),
        ((1e-200, math.nan, math.nan), "+1.00e-200 nats"),
        ((0.0, 0.0, 0.0), "0 nats [0, 0]"),
    ],
)
def test_differences_of_every_size(numbers: tuple[float, float, float], said: str) -> None:
    assert effect(*numbers, "nats") == said


def test_an_interval_alone() -> None:
    assert interval(-0.281, -0.233) == "[-0.281, -0.233]"
    assert interval(-1e9, 1e9) == "[-1.0e+09, +1.0e+09]"


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.036, "= 0.036"), (0.0499, "= 0.0499"), (0.04999, "= 0.04999"), (0.0, "< 1e-15"), (3e-16, "< 1e-15")],
)
def test_p_values(p: float, said: str) -> None:
    assert probability(p, 0.05) == said
