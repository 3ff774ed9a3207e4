"""What it costs to add seeds one by one: seeds spent by fixed numbers, declared looks, and an anytime-valid t test.

Verdicts use declared looks (gpt2lab/analysis/planning.py), also where seeds are added one by one (`--until decided`).
The alternative is the t test of Wang and Ramdas 2025 ("Anytime-valid t-tests and confidence sequences for Gaussian
means with unknown variance", Sequential Analysis 44(1), the right-Haar mixture): it holds at any number of seeds,
without a last one. `python -m benchmarks.sequential` prints the table of docs/statistics.md.

Shapes: D simulated studies, N seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.planning import Look, declared_looks, extendable_looks
from gpt2lab.analysis.statistics import welch

Array = NDArray[np.float64]

EXPECTED = 4.0
"""Prior variance of the true difference, in units of the variance of a difference of two seeds: cheaper than 1 for
differences of 2 sd and more."""


def evidence(differences: Array, expected: float = EXPECTED) -> Array:
    """The e-process against a mean of 0, after every seed.  (D, N) -> (D, N)

    differences: of the k-th seed of one arm and the k-th of the other: Gaussian with one unknown variance whatever the
    spreads of the arms are. The Bayes factor of a mean ~ N(0, expected x variance) against 0, with the prior 1 / sd for
    the sd: it depends on the t statistic alone, and its chance of ever reaching 1 / alpha is at most alpha.
    """
    n = np.arange(1, differences.shape[-1] + 1)
    mean = np.cumsum(differences, -1) / n
    squares = np.maximum(np.cumsum(differences**2, -1) - n * mean**2, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = n * mean**2 / squares  # t^2 / (n - 1)
        factor = (1 + n * expected) ** -0.5 * ((1 + ratio) / (1 + ratio / (1 + n * expected))) ** (n / 2)
    return np.asarray(np.where(n > 1, factor, 1.0))


def first_at_looks(looks: Sequence[Look], members: int) -> Callable[[Array, Array], Array]:
    """A design: seeds per arm at which a difference is found at declared looks in a family of `members`; else inf."""

    def stop(arm: Array, against: Array) -> Array:
        found = [welch(arm[:, : k.n], against[:, : k.n]).p < k.level / members for k in looks]
        return _first(np.stack(found, -1), [k.n for k in looks])

    return stop


def first_by_evidence(most: int, members: int, alpha: float) -> Callable[[Array, Array], Array]:
    """The same by the e-process, from 3 seeds on up to `most`."""

    def stop(arm: Array, against: Array) -> Array:
        found = evidence(arm[:, :most] - against[:, :most]) >= members / alpha
        return _first(found[:, 2:], range(3, most + 1))

    return stop


def _first(found: NDArray[np.bool_], at: Sequence[int]) -> Array:
    return np.asarray(np.where(found.any(-1), np.asarray(at)[found.argmax(-1)], np.inf))


def main(draws: int = 10_000, seed: int = 0, alpha: float = 0.05) -> None:
    """Prints, for families of 1 and 4 and every design: the largest share of false differences over spreads and noise
    (times the family), then for every true difference the power, and the mean number of seeds per arm."""
    from gpt2lab.analysis.selftest import BANKS, GAUSSIAN, noise

    one_by_one, effects, spreads, most = tuple(range(3, 13)), (1.0, 2.0, 3.0, 4.0, 6.0), (1.0, 4.0, 10.0), 48
    for members in (1, 4):
        designs = {
            "8 seeds": ([Look(8, alpha)], 8),
            "looks at 3, 5, 8": (declared_looks((3, 5, 8), alpha), 8),
            "one by one, 3 to 12": (declared_looks(one_by_one, alpha), 12),
            "one by one, 3 to 12, then 24 and 48": (extendable_looks(one_by_one, alpha), 48),
        }
        stops = {name: (first_at_looks(looks, members), last) for name, (looks, last) in designs.items()}
        stops["anytime-valid, stopped at 48"] = (first_by_evidence(most, members, alpha), most)
        for name, (stop, last) in stops.items():
            rng, wrong = np.random.default_rng(seed), []
            for bank in BANKS:
                for spread in spreads:
                    arms = spread * noise(rng, bank, (draws, most)), noise(rng, bank, (draws, most))
                    wrong.append(members * float(np.isfinite(stop(*arms)).mean()))
            cells = []
            for effect in effects:
                at = stop(noise(rng, GAUSSIAN, (draws, most)) - effect, noise(rng, GAUSSIAN, (draws, most)))
                cells.append(f"{effect:g} sd {np.isfinite(at).mean():.2f} {np.minimum(at, last).mean():.1f}")
            print(f"{name}, {members}: false {max(wrong):.3f}; {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
