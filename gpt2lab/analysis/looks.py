"""Looking before the end, as declared: judge at n = 3, then 5, then 8 seeds, and stop where the answer is in.

Whoever looks after every seed and stops at the first "significant" one is wrong in one null study out of seven. Here
the looks are declared beforehand and each is judged at a smaller alpha, so that all of them together keep the declared
one. Between looks nothing is judged.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import optimize, stats

from gpt2lab.analysis.judging import judge
from gpt2lab.analysis.statistics import Comparison
from gpt2lab.analysis.verdicts import DECISIVE, Arm, Contrast, Declared, Terms

NODES = 400
"""Points per look at which the path of a test statistic is followed."""


@functools.lru_cache(maxsize=256)
def look_alpha(looks: tuple[int, ...], alpha: float = 0.05) -> float:
    """The level of each look at which several of them together err with probability `alpha`, rounded down to 4 places.

    The same at every look (Pocock 1977), for means of 3, 5, 8, ... seeds that share their first ones, as if Gaussian:
    Welch's test at such a level errs less often than that, at few seeds.
    """
    if len(looks) == 1:
        return alpha
    bound = optimize.brentq(lambda c: _crossing(c, looks) - alpha, 0.5, 8.0, xtol=1e-9)
    return math.floor(2 * float(stats.norm.sf(bound)) * 1e4) / 1e4


def _crossing(bound: float, looks: Sequence[int]) -> float:
    """Chance that |z| passes `bound` at any look: the sum over n seeds is carried from look to look by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    at = nodes * bound * math.sqrt(looks[0])  # the sum of n standard normal seeds stays within +-bound sqrt(n)
    density = stats.norm.pdf(at, scale=math.sqrt(looks[0])) * weights * bound * math.sqrt(looks[0])
    for before, now in itertools.pairwise(looks):
        half = bound * math.sqrt(now)
        step = stats.norm.pdf(nodes[:, None] * half, loc=at[None, :], scale=math.sqrt(now - before))
        at, density = nodes * half, (step @ density) * weights * half
    return 1.0 - float(density.sum())


def judge_looks(
    arms_at: Callable[[int], Mapping[str, Arm]], declared: Sequence[Declared], terms: Terms, looks: Sequence[int]
) -> list[Contrast]:
    """Every contrast at the look that decided it, or at the last one that its runs allow.

    arms_at: the arms as they are after their first n seeds. A contrast that one look decides keeps that verdict and its
    p in the family; runs beyond the last complete look are not looked at.
    """
    level = look_alpha(tuple(looks), terms.alpha)
    latest: dict[int, Contrast] = {}
    settled: dict[int, Comparison] = {}
    for number, n in enumerate(looks, 1):
        arms = arms_at(n)
        still = [i for i in range(len(declared)) if i not in settled]
        names = {name for i in still for name in declared[i].weights}
        if not still or (latest and any(arms[name].declared < n or arms[name].missing for name in names)):
            break
        told = f"look {number} of {len(looks)} (n = {n}), each at alpha {level:g}"
        contrasts, tested = judge(arms, declared, replace(terms, alpha=level, look=told), settled)
        for i in still:
            decided = (contrasts[i].survivors or contrasts[i].word).startswith(DECISIVE)
            latest[i] = replace(contrasts[i], look=n, settled=decided or number == len(looks))
            if decided:
                settled[i] = tested[i]
    return [latest[i] for i in range(len(declared))]
