"""Looking before the end: judge at n = 3, then 5, then 8 seeds, and stop where the answer is in.

Whoever looks after every seed and stops at the first "significant" one is wrong in one null study out of seven. Here
each look has a level of its own, so that all of them together keep alpha. Between looks nothing is judged.

Looks are declared beforehand, or they are the ones that every study has: after a verdict seeds may be added, and
contrasts that are still open are judged again at twice and at four times the seeds. A fifth of alpha is kept back for
that.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from gpt2lab.analysis.judging import judge
from gpt2lab.analysis.statistics import Comparison
from gpt2lab.analysis.verdicts import DECISIVE, Arm, Contrast, Declared, Terms

NODES = 400
"""Points per look at which the path of a test statistic is followed."""

FIRST = 0.8
"""Share of alpha for the seeds, or looks, that were declared."""
LATER = 0.08
"""Share of alpha for each look after seeds were added. The rest stays unspent: t statistics of few seeds move more from
look to look than the Gaussian ones that levels are computed with."""
MULTIPLES = (2, 4)
"""Of the declared seeds, at which added ones are judged."""


@dataclass(frozen=True)
class Look:
    """Seeds per arm, and the level at which contrasts are judged there."""

    n: int
    level: float
    told: str = ""
    """which of how many it is, in words; nothing for the only one"""
    declared: bool = True
    """whether it was declared; else it is reached by adding seeds"""


def declared_looks(looks: Sequence[int], alpha: float) -> tuple[Look, ...]:
    """Looks at so many seeds, each at the same level (Pocock 1977)."""
    level = look_alpha(tuple(looks), alpha)
    return tuple(_told(n, level, i, len(looks)) for i, n in enumerate(looks, 1))


def extendable_looks(looks: Sequence[int], alpha: float) -> tuple[Look, ...]:
    """The declared looks (one, where seeds alone were declared), and those at which added seeds are judged."""
    level = look_alpha(tuple(looks), FIRST * alpha)
    first = [_told(n, level, i, len(looks)) if len(looks) > 1 else Look(n, level) for i, n in enumerate(looks, 1)]
    levels = _later_levels(tuple(looks), alpha)
    more = [
        Look(multiple * looks[-1], later, f"judged again at {multiple * looks[-1]} seeds, at alpha {later:g}", False)
        for multiple, later in zip(MULTIPLES, levels, strict=True)
    ]
    return (*first, *more)


def _told(n: int, level: float, number: int, count: int) -> Look:
    return Look(n, level, f"look {number} of {count} (n = {n}), each at alpha {level:g}")


@functools.lru_cache(maxsize=256)
def look_alpha(looks: tuple[int, ...], alpha: float = 0.05) -> float:
    """The level of each look at which several of them together err with probability `alpha`, rounded down to 4 places.

    The same at every look (Pocock 1977), for means of 3, 5, 8, ... seeds that share their first ones, as if Gaussian.
    """
    if len(looks) == 1:
        return alpha
    bound = optimize.brentq(lambda c: _crossing([c] * len(looks), looks) - alpha, 0.5, 8.0, xtol=1e-9)
    return _level(bound)


@functools.lru_cache(maxsize=256)
def _later_levels(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """The levels of the looks after the declared ones: each adds LATER x alpha to the chance of any false claim."""
    level = look_alpha(looks, FIRST * alpha)
    seeds, bounds, found = list(looks), [float(stats.norm.isf(level / 2))] * len(looks), []
    for i, multiple in enumerate(MULTIPLES, 1):
        seeds.append(multiple * looks[-1])
        spent = (FIRST + i * LATER) * alpha
        bounds.append(optimize.brentq(lambda c, s=spent: _crossing([*bounds, c], seeds) - s, 0.5, 8.0, xtol=1e-9))
        found.append(_level(bounds[-1]))
    return tuple(found)


def _level(bound: float) -> float:
    return math.floor(2 * float(stats.norm.sf(bound)) * 1e4) / 1e4


def _crossing(bounds: Sequence[float], looks: Sequence[int]) -> float:
    """Chance that |z| passes its bound at any look: the sum over n seeds is carried from look to look by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half = bounds[0] * math.sqrt(looks[0])  # the sum of n standard normal seeds stays within +-bound sqrt(n)
    at = nodes * half
    density = stats.norm.pdf(at, scale=math.sqrt(looks[0])) * weights * half
    for (before, now), bound in zip(itertools.pairwise(looks), bounds[1:], strict=True):
        half = bound * math.sqrt(now)
        step = stats.norm.pdf(nodes[:, None] * half, loc=at[None, :], scale=math.sqrt(now - before))
        at, density = nodes * half, (step @ density) * weights * half
    return 1.0 - float(density.sum())


def judge_looks(
    arms_at: Callable[[int], Mapping[str, Arm]], declared: Sequence[Declared], terms: Terms, looks: Sequence[Look]
) -> list[Contrast]:
    """Every contrast at the look that decided it, or at the last one that its runs allow.

    arms_at: the arms as they are after their first n seeds. A contrast that one look decides keeps that verdict and its
    p in the family; runs beyond the last complete look are not looked at.
    """
    latest: dict[int, Contrast] = {}
    settled: dict[int, Comparison] = {}
    ends = [look.n for look in looks if look.declared]
    for number, look in enumerate(looks):
        arms = arms_at(look.n)
        still = [i for i in range(len(declared)) if i not in settled]
        names = {name for i in still for name in declared[i].weights}
        if not still or (latest and any(arms[name].declared < look.n or arms[name].missing for name in names)):
            break
        coming = tuple(later.n for later in looks[number + 1 :])
        now = replace(terms, alpha=look.level, look=look.told, coming=coming)
        contrasts, tested = judge(arms, declared, now, settled)
        for i in still:
            decided = (contrasts[i].survivors or contrasts[i].word).startswith(DECISIVE)
            latest[i] = replace(
                contrasts[i], look=look.n, settled=decided or look.n >= ends[-1],
                next_look=None if decided or not coming else coming[0],
                next_alpha=None if decided or not coming else looks[number + 1].level,
            )  # fmt: skip
            if decided:
                settled[i] = tested[i]
    return [latest[i] for i in range(len(declared))]
