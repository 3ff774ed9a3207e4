"""Why campaigns are controlled by LORD++: the same simulated campaigns by other methods.

`python -m benchmarks.campaigns` prints the table of docs/statistics.md, of which `gpt2lab selftest campaigns` prints
the columns of LORD++ and of what controls nothing. LOND: Javanmard and Montanari, arXiv:1502.06197. SAFFRON: Ramdas,
Zrnic, Wainwright and Jordan, ICML 2018, in its form for verdicts that are known only later.
"""

from __future__ import annotations

import numpy as np

from gpt2lab.analysis.online import ALPHA, START, weight
from gpt2lab.analysis.selftest import Draws, Flags
from gpt2lab.analysis.statistics import Array
from gpt2lab.analysis.streams import STREAMS, drawn, false_share, lord, uncorrected


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


METHODS = {"LORD++": lord, "SAFFRON": saffron, "LOND": lond, "Holm in each study": holm, "uncorrected p": uncorrected}


def main(draws: int = 4_000) -> None:
    """Prints, for every campaign and method, the share of false ones among the claims and of true effects found."""
    for stream in STREAMS:
        true, p = drawn(stream, Draws(count=draws, seed=0))
        campaign = f"{stream.hypotheses}, {stream.seeds} seeds, baseline: {stream.baseline}, {stream.bank}"
        for name, method in METHODS.items():
            found = method(p, stream.together)
            shares = false_share(found, true).mean(), (found & true).sum() / true.sum()
            print(f"{campaign}, {stream.low:g} to {stream.high:g} sd, {name}: {shares[0]:.3f}, {shares[1]:.2f}")


if __name__ == "__main__":
    main()
