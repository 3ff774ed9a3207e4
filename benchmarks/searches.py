"""How often arms that are equal at their best learning rates are found to differ, each judged at the best rate of a
search. `python -m benchmarks.searches` prints the rates of docs/statistics.md; its tests hold them below 5 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from gpt2lab.analysis import statistics
from gpt2lab.analysis.best_rate import BestRateDifference, RateSearch, WeightedArm
from gpt2lab.analysis.selftest import ALPHA, GAUSSIAN, LONG, Draws, Measurement, level

EACH = 20
"""Studies of the self-test for each search: a search takes milliseconds."""
CURVATURES = ((0.005, 0.005), (0.01, 0.01), (0.03, 0.03), (0.005, 0.03))
"""nats per squared octave, of the arm and of the baseline"""
SEARCHED = (3, 5, 10)
BRACKET, EIGHT_RATES = (-1.0, 0.0, 1.0), tuple(np.linspace(-2.0, 3.0, 8))
Shape = Callable[[float, float], float]
SHAPES: Mapping[str, Shape] = {
    "a parabola": lambda curvature, away: curvature * away**2,
    "four times as steep above": lambda curvature, away: curvature * (0.4 if away < 0 else 1.6) * away**2,
    "gentle below, cubic above": lambda curvature, away: curvature * away**2 / 6 + 5 * curvature * max(away, 0.0) ** 3,
    "diverging 0.3 octaves above": lambda curvature, away: curvature * away**2 if away < 0.3 else math.inf,
}
"""Loss by curvature and octaves from the best rate."""


def searched(draws: Draws) -> Iterator[Measurement]:
    """Two arms that are equal at their best rates, each judged at the best rate of a bracket or of 8 rates."""
    designs = [("bracket", BRACKET, "a parabola", c, n) for c in CURVATURES for n in SEARCHED]
    designs += [("bracket", BRACKET, shape, (0.03, 0.03), n) for shape in list(SHAPES)[1:] for n in (3, 10)]
    designs += [("tuned, 8 rates", EIGHT_RATES, "a parabola", c, 5) for c in CURVATURES]
    for (name, rates, shape, curvatures, n), sd in itertools.product(designs, (0.0015, 0.015)):
        check = f"{name}, {shape}, curvature {curvatures[0]:g} and {curvatures[1]:g}, sd {sd:g}: better/worse"
        rng, wrong = draws.generator(check, n), []
        for _ in range(draws.count // EACH):
            drawn = [at_best_trial(rng, curvature, sd, n, SHAPES[shape], rates) for curvature in curvatures]
            arms = [replace(arm, weight=weight) for arm, weight in zip(drawn, (1.0, -1.0), strict=True) if arm]
            wrong.append(len(arms) == 2 and _found_to_differ(arms))  # one alone is not comparable
        yield level(check, np.array(wrong), GAUSSIAN, n)


def _found_to_differ(arms: Sequence[WeightedArm]) -> bool:
    test = statistics.linear([arm.losses for arm in arms], (1.0, -1.0), margin=0.05)
    if float(test.p) >= ALPHA:  # accounting for the search can only raise it
        return False
    return float(statistics.at_best_rates(test, BestRateDifference(arms), alpha=ALPHA, margin=0.05).p) < ALPHA


def at_best_trial(
    rng: np.random.Generator, curvature: float, sd: float, n: int, shape: Shape, rates: Sequence[float]
) -> WeightedArm | None:
    """An arm of n seeds at the best of some rates, widened three times at the edges; None where the best stays there.

    Its best rate, where the loss is 0, lies up to an octave away from 0.
    """
    best = rng.uniform(-1, 1)
    tried: dict[float, float] = {}
    next_rates = list(rates)
    for _ in range(4):
        tried |= {at: shape(curvature, at - best) + sd * rng.standard_normal() for at in next_rates if at not in tried}
        chosen = min(tried, key=lambda at: (tried[at], abs(at)))
        if min(tried) < chosen < max(tried):
            good = {at: loss for at, loss in tried.items() if math.isfinite(loss)}
            diverged = tuple(at for at in tried if at not in good)
            search = RateSearch(tried=tuple(good), losses=tuple(good.values()), chosen=chosen, diverged=diverged)
            losses = shape(curvature, chosen - best) + sd * rng.standard_normal(n)
            return WeightedArm(weight=1.0, losses=losses, search=search)
        next_rates = [chosen - 1 if chosen == min(tried) else chosen + 1]
    return None


def main(draws: int = LONG) -> None:
    """Prints the share of studies with a false difference for each design."""
    for row in searched(Draws(count=draws, seed=0)):
        print(f"{row.check}, {row.n} seeds: {row.measured:.3f} ({row.status}, at most {row.high:.3f})", flush=True)


if __name__ == "__main__":
    main()
