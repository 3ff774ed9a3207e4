"""What loops keep: the rules on campaigns whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.keep import BASELINE, CHANGES, judged, simulated
from gpt2lab.analysis import judging, wording


def test_single_runs_keep_noise_and_verdicts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # how many seeds would decide is not asked here, and takes most of the time
    monkeypatch.setattr(judging, "_missing_seeds", lambda case: wording.MissingSeeds(1))
    once, verdict, campaign = simulated(8, 5)
    assert once.false > 4 > 1 > verdict.false >= campaign.false
    assert verdict.missed <= campaign.missed < 2 and once.kept > 2 * verdict.kept
    assert (once.runs, campaign.runs) == (21, 105)


def test_false_and_missed_are_counted_against_the_truth() -> None:
    rng = np.random.default_rng(1)
    losses = {name: rng.normal(0, 0.01, 5) for name in (BASELINE, *CHANGES)}
    losses["rotary"] -= 1.0
    once, verdict, campaign = judged(losses, {"rotary", "alibi"})
    assert (
        (verdict.kept, verdict.false, verdict.missed) == (campaign.kept, campaign.false, campaign.missed) == (1, 0, 1)
    )
    assert once.kept - once.false == pytest.approx(2 - once.missed)
    assert judged(losses, {"alibi"})[1].false == 1
