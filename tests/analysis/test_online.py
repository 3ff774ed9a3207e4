"""Control of false discoveries over campaigns: against an implementation of its own, and on simulated streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy
from online_fdr.p_values.investing.lond.lond import Lond
from online_fdr.p_values.investing.lord.plus_plus import LordPlusPlus
from online_fdr.p_values.investing.saffron.saffron import Saffron

from benchmarks.campaigns import lond, saffron
from gpt2lab.analysis import streams
from gpt2lab.analysis.online import ALL_WEIGHTS, ALPHA, DECAY, START, levels, weight
from gpt2lab.analysis.selftest import Draws
from gpt2lab.analysis.streams import STREAMS, drawn, lord


class Weights:
    """Our sequence, as that package asks for one."""

    def calc_gamma(self, j: int, alpha: float | None = 1.0) -> float:
        return float(weight(j)) * (1.0 if alpha is None else alpha)


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        (lord, lambda: LordPlusPlus(ALPHA, START)),
        (saffron, lambda: Saffron(ALPHA, START, 0.5)),
        (lond, lambda: Lond(ALPHA, original=False)),
    ],
    ids=["LORD++", "SAFFRON", "LOND"],
)
def test_one_at_a_time_it_is_what_another_implementation_does(method: Any, theirs: Callable[[], Any]) -> None:
    rng = np.random.default_rng(3)
    p = np.where(rng.random((20, 60)) < 0.3, rng.random((20, 60)) ** 8, rng.random((20, 60)))
    expected = []
    for row in p:
        test = theirs()
        test.seq = Weights()
        expected.append([test.test_one(float(value)) for value in row])
    found = method(p, 1)
    assert found.tolist() == expected and 20 < found.sum() < found.size / 2


def test_levels_are_spent_and_earned() -> None:
    assert pytest.approx(scipy.special.zeta(DECAY), rel=1e-15) == ALL_WEIGHTS
    assert weight(np.arange(1, 10**6)).sum() == pytest.approx(1, abs=1e-3) and weight(0) == weight(-3) == 0
    assert levels(1, 3) == pytest.approx(START * weight([1, 2, 3]))
    assert levels(5, 2, [3], [1]) == pytest.approx(START * weight([5, 6]) + (ALPHA - START) * weight([2, 3]))
    assert levels(5, 1, [2, 4], [1, 2])[0] == pytest.approx(
        START * weight(5) + (ALPHA - START) * weight(3) + 2 * ALPHA * weight(1)
    )


def test_discoveries_of_a_study_do_not_move_the_levels_within_it() -> None:
    p = np.array([[0.001, 0.012, 0.02, 0.02]])
    assert lord(p, 4).tolist() == [[True, False, False, False]]
    assert lord(p, 1).tolist() != lord(p, 4).tolist()


def test_the_command_says_whether_false_discoveries_are_kept_below_five_percent(
    gpt2lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = replace(STREAMS[-1], hypotheses=20, low=2.0, true=0.05)
    monkeypatch.setattr(streams, "STREAMS", (stream,))
    answer = gpt2lab("selftest", "campaigns", "--draws", "400", "--json")
    assert answer.code == 0 and [row["status"] for row in json.loads(answer.out)["rows"]] == ["accepted", "flagged"]
    monkeypatch.setattr(streams, "lord", streams.uncorrected)
    assert gpt2lab("selftest", "campaigns", "--draws", "400").code == 1


def test_a_baseline_in_common_makes_contrasts_depend_on_each_other() -> None:
    stream = replace(STREAMS[3], true=0.0, seeds=5)
    assert (stream.hypotheses, stream.baseline) == (20, streams.COMMON)
    together, apart = (
        drawn(replace(stream, baseline=baseline), Draws(count=400, seed=0))[1]
        for baseline in (streams.COMMON, streams.OWN)
    )
    small = [(p < 0.2).sum(1).var() for p in (together, apart)]
    assert small[0] > 1.5 * small[1]
