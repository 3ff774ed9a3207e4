"""Planning and looking: do the seeds that the planner recommends suffice, and do declared looks keep their level."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.calibration import power
from gpt2lab.analysis.looks import Look, declared_looks
from gpt2lab.analysis.planning import POWER, seeds_for_power
from gpt2lab.analysis.selftest.claims import differs, says, too_small, words
from gpt2lab.analysis.selftest.noise import BANKS, GAUSSIAN, SEEDS, Draws, X
from gpt2lab.analysis.selftest.rows import ALPHA, NARROWEST, Row, chance, level, near, none_of
from gpt2lab.analysis.statistics import Array, Comparison, adjust, welch
from gpt2lab.analysis.verdicts import DECISIVE, decide, findings

FORMULA = "computed"
"""Stands where a noise bank would: nothing was drawn."""

LITTLE = 0.1
"""A smallest effect, in sd, that so few seeds never rule out: every null study goes on to the last look."""

# Seeds per arm for 80 % power at a difference of so many sd, by number of contrasts, at alpha / contrasts. A test finds
# the same by simulation with critical values of its own.
SEEDS_NEEDED = {
    1: {0.5: 66, 1.0: 18, 1.5: 9, 2.0: 6, 3.0: 4},
    4: {0.5: 93, 1.0: 25, 1.5: 13, 2.0: 8, 3.0: 5},
}


def planner(draws: Draws) -> Iterator[Row]:
    """At the recommended n the power is reached, with one seed less it is not: as computed, and as simulated."""
    wrong = 0
    for contrasts, needed in SEEDS_NEEDED.items():
        for effect, expected in needed.items():
            recommended = seeds_for_power(effect, alpha=ALPHA / contrasts)
            wrong += recommended != expected
            about = f"power for {effect:g} sd, {contrasts} contrast{'s' * (contrasts > 1)}"
            for n, reached in ((recommended - 1, False), (recommended, True)):
                yield reaches(about, FORMULA, n, power(effect, (n, n), alpha=ALPHA / contrasts), reached)
                allowed = max(NARROWEST, chance(POWER, draws.count))
                yield reaches(about, GAUSSIAN, n, simulated(draws, effect, n, contrasts), reached, allowed)
    yield none_of("recommended seeds unlike those simulated", wrong, sum(map(len, SEEDS_NEEDED.values())), FORMULA)


FORECASTS = ((3, 3), (3, 6), (3, 10), (5, 5), (5, 10), (8, 8))
"""Seeds of an arm and of the baseline for which forecast and simulated power are compared."""


def forecasts(draws: Draws) -> Iterator[Row]:
    """The power that plans promise is the one that studies have."""
    for (n, base), sd, contrasts in itertools.product(FORECASTS, (2.0, 3.0), (1, 4)):
        rng = draws.generator("forecast", n, base, sd, contrasts)
        shifts = (0.0, -sd) + (0.0,) * (contrasts - 1)
        sizes = (base,) + (n,) * contrasts
        arms = [shift + rng.standard_normal((draws.count, size)) for shift, size in zip(shifts, sizes, strict=True)]
        family, _ = findings(arms[0], arms[1:], smallest_effect=X, alpha=ALPHA)
        found = (family.p[:, 0] < ALPHA / contrasts) & (family.difference[:, 0] < 0)
        promised = power(sd, (n, base), alpha=ALPHA / contrasts)
        check = f"power for {sd:g} sd, {n} seeds against {base}, {contrasts} contrast{'s' * (contrasts > 1)}"
        yield near(check, found, promised, GAUSSIAN, n)


def reaches(check: str, source: str, n: int, measured: float, reached: bool, allowed: float = 0.0) -> Row:
    """Whether the wanted power is reached, or missed where it should not be reached yet."""
    low, high = (POWER - allowed, 1.0) if reached else (0.0, float(np.nextafter(POWER, 0.0)) + allowed)
    return Row(check=check, bank=source, n=n, measured=measured, low=low, high=high)


def simulated(draws: Draws, effect: float, n: int, contrasts: int) -> float:
    """How often the first of so many arms, the only one with an effect, is found better."""
    shifts = (-effect,) + (0.0,) * (contrasts - 1)
    found = words(draws.studies(f"planner {effect} {contrasts}", GAUSSIAN, n, shifts=shifts))
    return float(says(found[:, 0], "better").mean())


def looks(draws: Draws) -> Iterator[Row]:
    """False claims at any of the declared looks, with one arm and with four."""
    told = f"n = {', '.join(map(str, SEEDS))}"
    stages = declared_looks(SEEDS, ALPHA)
    for bank in BANKS:
        for arms in (1, 4):
            among = f", {arms} arm{'s' * (arms > 1)}"
            drawn = draws.studies(f"looks {arms}", bank, SEEDS[-1], shifts=(0.0,) * arms)
            claimed = differs(words_at_looks(drawn, stages, smallest_effect=LITTLE))
            yield level(f"{told}{among}, all null: any better/worse", claimed, bank)
            drawn = draws.studies(f"looks at X {arms}", bank, SEEDS[-1], shifts=(X, -X, X, -X)[:arms])
            claimed = too_small(words_at_looks(drawn, stages))
            yield level(f"{told}{among}, true difference X: called smaller", claimed, bank)


def words_at_looks(arms: Sequence[Array], at: Sequence[Look], *, smallest_effect: float = X) -> NDArray[np.str_]:
    """What `judge_looks` says of any number of studies at those looks, the baseline first.  (draws, seed) each

    -> (draws, contrast): the word of the look that decided a contrast, or else of the last look. A contrast that was
    decided stays in the family with what it was tested with then.
    """
    settled = np.zeros((len(arms[0]), len(arms) - 1), dtype=bool)
    tested: list[Comparison] = []
    said = np.full(settled.shape, "")
    for look in at:
        n, alpha = look.n, look.level
        now = [welch(arm[:, :n], arms[0][:, :n], alpha=alpha, margin=smallest_effect) for arm in arms[1:]]
        tested = [keep(settled[:, i], tested[i], one) if tested else one for i, one in enumerate(now)]
        family = adjust(tested, alpha=alpha)
        fresh = decide(family.difference, family.p_holm, family.p_equivalence_holm, alpha=alpha)
        said = np.where(settled, said, fresh)
        settled |= np.logical_or.reduce([says(fresh, word) for word in DECISIVE])
    return said


def keep(settled: NDArray[np.bool_], old: Comparison, new: Comparison) -> Comparison:
    """The old comparison where that is settled, the new one elsewhere."""
    numbers = [f.name for f in fields(Comparison) if f.name not in ("sizes", "own_best")]
    return replace(new, **{name: np.where(settled, getattr(old, name), getattr(new, name)) for name in numbers})
