"""Simulated campaigns: how many false discoveries the control of the ledger lets through.

Streams of hypotheses are judged by the test of verdicts and decided study by study, since the contrasts of a study are
declared together. Other methods of control are compared in benchmarks/campaigns.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt2lab.analysis.online import ALPHA, levels
from gpt2lab.analysis.selftest import BANKS, GAUSSIAN, SIGMAS, Draws, Flags, Measurement, noise
from gpt2lab.analysis.statistics import Array, welch


@dataclass(frozen=True, kw_only=True)
class HypothesisStream:
    """A campaign as it is simulated: studies of several arms, one tenth of which differ from the baseline."""

    hypotheses: int
    seeds: int
    baseline: str
    """whose noise contrasts share: that of their study, or one baseline for the whole campaign"""
    bank: str = GAUSSIAN
    together: int = 4
    """contrasts of a study, declared together"""
    true: float = 0.1
    low: float = 2.0
    high: float = 20.0
    """the least and the largest effect, in sd, of those that are true; equally likely on a logarithmic scale"""
    spread: float = 2.0
    """arms have between 1 / spread and spread times the baseline's sd"""


OWN, COMMON = "each study its own", "one for the campaign"
LENGTHS, SEEDS = (20, 100, 500), (3, 5)
STREAMS = (
    *(
        HypothesisStream(hypotheses=t, seeds=n, baseline=b)
        for n, b, t in itertools.product(SEEDS, (OWN, COMMON), LENGTHS)
    ),
    *(HypothesisStream(hypotheses=100, seeds=5, baseline=COMMON, bank=bank) for bank in BANKS[1:]),
    HypothesisStream(hypotheses=100, seeds=5, baseline=COMMON, low=1.0, high=4.0),
)


def drawn(stream: HypothesisStream, draws: Draws) -> tuple[Flags, Array]:
    """(whether each hypothesis has an effect, its p value), both (draws, hypotheses); p by the test of verdicts."""
    rng, shape, n = draws.generator("stream", stream), (draws.count, stream.hypotheses), stream.seeds
    true = rng.random(shape) < stream.true
    size = np.exp(rng.uniform(np.log(stream.low), np.log(stream.high), shape)) * rng.choice([-1.0, 1.0], shape)
    sd = np.exp(rng.uniform(-1, 1, shape) * np.log(stream.spread))
    arms = np.where(true, size, 0.0)[..., None] + sd[..., None] * noise(rng, stream.bank, (*shape, n))
    each = stream.together if stream.baseline == OWN else stream.hypotheses
    baseline = np.repeat(noise(rng, stream.bank, (draws.count, stream.hypotheses // each, n)), each, axis=1)
    return true, np.nan_to_num(welch(arms, baseline).p, nan=1.0)


def lord(p: Array, together: int) -> Flags:
    """The method of the ledger (online.py).  p: (draws, hypotheses) -> which are discoveries"""
    rejected = np.zeros(p.shape, dtype=bool)
    discoveries = np.zeros((len(p), 0))
    for start in range(0, p.shape[1], together):
        now = slice(start, start + together)
        known = together * np.arange(1, discoveries.shape[1] + 1)
        rejected[:, now] = p[:, now] <= levels(start + 1, together, known, discoveries)
        discoveries = np.column_stack([discoveries, rejected[:, now].sum(1)])
    return rejected


def uncorrected(p: Array, together: int) -> Flags:
    """p below 0.05, whatever else is tried."""
    return p <= ALPHA


def campaigns(draws: Draws) -> Iterator[Measurement]:
    """Of every stream the share of false ones among the discoveries, 0 where there are none: below ALPHA by the method
    of the ledger; above it for uncorrected p values, which the same limit must flag."""
    for stream in STREAMS:
        true, p = drawn(stream, draws)
        check = f"{stream.hypotheses} hypotheses, baseline: {stream.baseline}, {stream.low:g} to {stream.high:g} sd"
        for name, method, control in (("LORD++", lord, False), ("control: uncorrected p", uncorrected, True)):
            share = false_share(method(p, stream.together), true)
            high = ALPHA + SIGMAS * float(share.std() / np.sqrt(len(share)))
            yield Measurement(
                part="campaigns", check=f"{name}, {check}", bank=stream.bank, n=stream.seeds,
                measured=float(share.mean()), high=high, control=control,
            )  # fmt: skip


def false_share(found: Flags, true: Flags) -> Array:
    """Of the discoveries of each campaign.  (draws, hypotheses) twice -> (draws,)"""
    return np.asarray((found & ~true).sum(1) / np.maximum(found.sum(1), 1))
