"""Simulated campaigns: how many false discoveries methods of online control let through, and what they find.

Streams of hypotheses are judged by the test of verdicts and decided study by study, since the contrasts of a study are
declared together. LOND: Javanmard and Montanari, arXiv:1502.06197. SAFFRON: Ramdas, Zrnic, Wainwright and Jordan, ICML
2018, in its form for verdicts that are known only later.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gpt2lab.analysis.online import ALPHA, START, levels, weight
from gpt2lab.analysis.selftest import BANKS, GAUSSIAN, Draws, Flags, noise
from gpt2lab.analysis.statistics import Array, welch


@dataclass(frozen=True, kw_only=True)
class Stream:
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
    *(Stream(hypotheses=t, seeds=n, baseline=b) for n, b, t in itertools.product(SEEDS, (OWN, COMMON), LENGTHS)),
    *(Stream(hypotheses=100, seeds=5, baseline=COMMON, bank=bank) for bank in BANKS[1:]),
    Stream(hypotheses=100, seeds=5, baseline=COMMON, low=1.0, high=4.0),
)


def drawn(stream: Stream, draws: Draws) -> tuple[Flags, Array]:
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
    found = np.zeros((len(p), 0))
    for start in range(0, p.shape[1], together):
        now = slice(start, start + together)
        known = together * np.arange(1, found.shape[1] + 1)
        rejected[:, now] = p[:, now] <= levels(start + 1, together, known, found)
        found = np.column_stack([found, rejected[:, now].sum(1)])
    return rejected


def lond(p: Array, together: int) -> Flags:
    """LOND: a weight of alpha for each hypothesis, times the discoveries so far."""
    rejected = np.zeros(p.shape, dtype=bool)
    for start in range(0, p.shape[1], together):
        now = slice(start, start + together)
        so_far = np.maximum(rejected.sum(1), 1)[:, None]
        rejected[:, now] = p[:, now] <= ALPHA * weight(start + 1 + np.arange(together)) * so_far
    return rejected


def saffron(p: Array, together: int, candidate: float = 0.5) -> Flags:
    """SAFFRON: as LORD++, but hypotheses with p up to `candidate` do not move a level further down the sequence."""
    rejected = np.zeros(p.shape, dtype=bool)
    seen = np.zeros((len(p), 1))  # candidates after each study, the beginning first
    found = np.zeros((len(p), 0))
    for start in range(0, p.shape[1], together):
        now, numbers = slice(start, start + together), start + 1 + np.arange(together)
        wealth = START * weight(numbers - seen[:, -1:])
        known = together * np.arange(1, found.shape[1] + 1)
        lag = numbers - known[:, None] - (seen[:, -1:] - seen[:, 1:])[..., None]  # (draws, studies, together)
        first_found = (found > 0) & (np.cumsum(found > 0, axis=-1) == 1)
        wealth += ((ALPHA * found - START * first_found)[..., None] * weight(lag)).sum(1)
        rejected[:, now] = p[:, now] <= np.minimum(candidate, (1 - candidate) * wealth)
        seen = np.column_stack([seen, seen[:, -1] + (p[:, now] <= candidate).sum(1)])
        found = np.column_stack([found, rejected[:, now].sum(1)])
    return rejected


def holm(p: Array, together: int) -> Flags:
    """No control over the campaign: Holm's method within each study."""
    studies = p.reshape(len(p), -1, together)
    order = np.argsort(studies, axis=-1)
    steps = np.take_along_axis(studies, order, -1) <= ALPHA / (together - np.arange(together))
    rejected = np.zeros(studies.shape, dtype=bool)
    np.put_along_axis(rejected, order, np.logical_and.accumulate(steps, axis=-1), -1)
    return rejected.reshape(p.shape)


def uncorrected(p: Array, together: int) -> Flags:
    """p below 0.05, whatever else is tried."""
    return p <= ALPHA


METHODS: Mapping[str, Callable[[Array, int], Flags]] = {
    "LORD++": lord, "LOND": lond, "SAFFRON": saffron, "Holm in each study": holm, "uncorrected p": uncorrected,
}  # fmt: skip
"""The first is what ledgers use."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a method does on a stream. `fdr`: mean share of false ones among its discoveries, 0 where it makes none;
    `se` its standard error. `power`: share of the true effects that it discovers."""

    stream: Stream
    method: str
    fdr: float
    se: float
    power: float

    @property
    def ok(self) -> bool:
        """Whether the share of false discoveries is below ALPHA, up to sampling error."""
        return self.fdr <= ALPHA + 3 * self.se


def simulate(draws: int, seed: int = 0) -> Iterator[Simulated]:
    """Every method on every stream; the same draws and seed give the same numbers."""
    for stream in STREAMS:
        true, p = drawn(stream, Draws(count=draws, seed=seed))
        for name, method in METHODS.items():
            found = method(p, stream.together)
            share = (found & ~true).sum(1) / np.maximum(found.sum(1), 1)
            yield Simulated(
                stream=stream, method=name, fdr=float(share.mean()), se=float(share.std() / np.sqrt(len(share))),
                power=float((found & true).sum() / true.sum()),
            )  # fmt: skip
