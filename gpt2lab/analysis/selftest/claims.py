"""How often `findings` claims what is not so, and how often it finds what is: the rates that a verdict stands on.

Every study has a baseline and four arms, unless one contrast alone is what is asked about.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.selftest.noise import BANKS, GAUSSIAN, REAL, SEEDS, T5, Draws, X
from gpt2lab.analysis.selftest.rows import ALPHA, Row, chance, level, near
from gpt2lab.analysis.statistics import Array
from gpt2lab.analysis.verdicts import findings

Words = NDArray[np.str_]
Flags = NDArray[np.bool_]

TIMES = 20
"""Draws of a single contrast per study of the rest, which cost little."""

# (true -3 sd -> better, true -2 sd -> better, no effect -> no difference larger than X), by noise and seeds per arm.
# From a simulation that shares no code with ours: means, variances and Welch's t written out in numpy, critical values
# from 3,000,000 studies without an effect at each of nine ratios of noise, Holm's method as step-wise rejection for the
# differences and for equivalence; 1,000,000 studies of five arms per cell. A test repeats it with fewer.
REFERENCES = {
    (GAUSSIAN, 3): (0.153, 0.063, 0.254),
    (GAUSSIAN, 5): (0.813, 0.449, 0.945),
    (GAUSSIAN, 8): (0.996, 0.853, 0.990),
    (T5, 3): (0.199, 0.085, 0.362),
    (T5, 5): (0.811, 0.508, 0.906),
    (T5, 8): (0.980, 0.848, 0.984),
    (REAL, 3): (0.154, 0.063, 0.260),
    (REAL, 5): (0.814, 0.451, 0.941),
    (REAL, 8): (0.996, 0.852, 0.990),
}


def words(arms: list[Array]) -> Words:
    """What is made of studies whose first arm is the baseline.  -> (draws, contrast)"""
    return findings(arms[0], arms[1:], smallest_effect=X, alpha=ALPHA)[1]


def says(found: Words, word: str) -> Flags:
    return np.asarray(np.char.startswith(found, word))


def differs(found: Words) -> Flags:
    """Whether a difference is claimed, large or small."""
    return np.asarray(says(found, "better") | says(found, "worse"))


def too_small(found: Words) -> Flags:
    """Whether a difference is claimed to be smaller than X, be there one or not."""
    return np.asarray((found == "no difference") | np.char.endswith(found, "(smaller)"))


def rates(draws: Draws) -> Iterator[Row]:
    """The table of the statistical contract, and the false claims that it limits."""
    for bank in BANKS:
        for n in SEEDS:
            yield from null(draws, bank, n)
            yield coverage(draws, bank, n)
            yield from power(draws, bank, n)
            yield from noisier(draws, bank, n)
            at_x = draws.studies("exactly X", bank, n, shifts=(X, -X, X, -X))
            yield level("true difference X: called smaller", too_small(words(at_x)), bank, n)


def null(draws: Draws, bank: str, n: int) -> Iterator[Row]:
    """No arm differs from the baseline."""
    found = words(draws.studies("null", bank, n))
    yield level("all null: any better/worse", differs(found), bank, n)
    yield near("all null: no difference larger than X", found == "no difference", REFERENCES[bank, n][2], bank, n)


def coverage(draws: Draws, bank: str, n: int) -> Row:
    """How often the 95 % interval of one contrast holds the true difference."""
    baseline, arm = draws.studies("coverage", bank, n, shifts=(0.0,), times=TIMES)
    family, _ = findings(baseline, [arm], smallest_effect=X, alpha=ALPHA)
    held = float(np.mean((family.raw_low <= 0) & (family.raw_high >= 0)))
    low = 1 - ALPHA - chance(ALPHA, draws.count * TIMES)
    return Row(check="95 % interval: holds the truth", bank=bank, n=n, measured=held, low=low, high=1.0)


def power(draws: Draws, bank: str, n: int) -> Iterator[Row]:
    """Two arms are better, by 3 and by 2 sd, two are not."""
    found = words(draws.studies("power", bank, n, shifts=(-3.0, -2.0, 0.0, 0.0)))
    for i, sd in enumerate((3, 2)):
        yield near(f"true -{sd} sd: better", says(found[:, i], "better"), REFERENCES[bank, n][i], bank, n)


def noisier(draws: Draws, bank: str, n: int) -> Iterator[Row]:
    """One arm is noisier than the others, and no arm differs."""
    for sd in (2, 4):
        arms = draws.studies(f"noisier {sd}", bank, n, shifts=(0.0,), sds=(sd,), times=TIMES)
        yield level(f"one arm at {sd} sd: better/worse", differs(words(arms)), bank, n)
        family = words(draws.studies(f"noisier {sd} of four", bank, n, sds=(sd, 1, 1, 1)))
        yield level(f"one of 4 arms at {sd} sd: any better/worse", differs(family), bank, n)
