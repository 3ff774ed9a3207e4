"""Designs in which a test is easily wrong: unequal seeds and noise, searched rates, seeds added after a look, dropped
contrasts, borrowed noise, intervals that are to hold together, few validation documents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.best_rate import OwnBest, Search, WeightedArm
from gpt2lab.analysis.documents import document_error, effective_documents
from gpt2lab.analysis.horizon import tau_bounds
from gpt2lab.analysis.looks import extendable_looks
from gpt2lab.analysis.parabola import fit
from gpt2lab.analysis.scaling import possible
from gpt2lab.analysis.selftest.claims import differs, too_small, words
from gpt2lab.analysis.selftest.noise import BANKS, GAUSSIAN, Draws, X, noise
from gpt2lab.analysis.selftest.plans import LITTLE, words_at_looks
from gpt2lab.analysis.selftest.rows import ALPHA, Row, chance, level
from gpt2lab.analysis.statistics import Array, adjust, at_own_best, borrowed, linear, welch
from gpt2lab.analysis.verdicts import TextNoise, findings

UNEQUAL = ((1, 3, 10), (10, 3, 3), (10, 3, 6), (10, 3, 10), (10, 3, 50), (4, 5, 10), (4, 5, 20), (4, 8, 16))
"""(arms, seeds of each, seeds of the baseline)"""
SPREADS = {"equal noise": (1.0, 1.0), "arms at 3 sd": (1.0, 3.0), "baseline at 3 sd": (3.0, 1.0),
           "arms at 10 sd": (1.0, 10.0), "baseline at 10 sd": (10.0, 1.0)}  # fmt: skip
"""(sd of the baseline, of every arm)"""

CELLS = ((3, 1.0), (3, 4.0), (3, 1.0), (6, 2.0))
"""(seeds, sd) of the four cells of a factorial design"""
HALVES = (0.5, -0.5, 0.5, -0.5)

CURVATURES = ((0.005, 0.005), (0.01, 0.01), (0.03, 0.03), (0.005, 0.03))
"""nats per squared octave, of the arm and of the baseline"""
NOISES = (0.0015, 0.015)
SEARCHED = (3, 5, 10)
Shape = Callable[[float, float], float]
"""Loss by curvature and octaves from the best rate."""
PARABOLA: Shape = lambda curvature, away: curvature * away**2  # noqa: E731
STEEP: Mapping[str, Shape] = {
    "four times as steep above": lambda curvature, away: curvature * (0.4 if away < 0 else 1.6) * away**2,
    "gentle below, cubic above": lambda curvature, away: curvature * away**2 / 6 + 5 * curvature * max(away, 0.0) ** 3,
    "diverging 0.3 octaves above": lambda curvature, away: curvature * away**2 if away < 0.3 else math.inf,
}
OCTAVES = (-1.0, 0.0, 1.0)
TUNED = tuple(np.linspace(-2.0, 3.0, 8))
"""Rates of a bracket, and of a search from a quarter to eight times an arm's own, in octaves"""
EACH = 20
"""Searches take long: one is drawn for so many studies of the other parts."""


def covers(check: str, held: NDArray[np.bool_], bank: str = "", n: int | None = None) -> Row:
    """How often intervals hold the truth: as often as they say, but for chance.  held: (draws,)"""
    low = 1 - ALPHA - chance(ALPHA, len(held))
    return Row(check=check, bank=bank, n=n, measured=float(np.mean(held)), low=low, high=1.0)


def unequal(draws: Draws) -> Iterator[Row]:
    """Unequal numbers of seeds, unequal noise, and both."""
    for bank in BANKS:
        for (arms, n, base), (spread, sds) in itertools.product(UNEQUAL, SPREADS.items()):
            drawn = _drawn(draws, bank, arms, n, base, sds)
            check = f"{arms} arm{'s' * (arms > 1)} of {n} seeds, {base} of the baseline, {spread}"
            yield level(f"{check}: any better/worse", differs(words(drawn)), bank, n)
            test = welch(drawn[1], drawn[0])
            yield covers(f"{check}: 95 % interval", (test.low <= 0) & (test.high >= 0), bank, n)
        at_x = _drawn(draws, bank, 2, 3, 10, (1.0, 1.0))
        at_x = [arm + shift for arm, shift in zip(at_x, (0.0, X, -X), strict=True)]
        yield level("3 seeds against 10, true difference X: called smaller", too_small(words(at_x)), bank, 3)
        rng = draws.generator("cells", bank)
        cells = [sd * noise(rng, bank, (draws.count, n)) for n, sd in CELLS]
        yield level("main effect of unequal cells: better/worse", linear(cells, HALVES).p < ALPHA, bank, 3)


def _drawn(draws: Draws, bank: str, arms: int, n: int, base: int, sds: Sequence[float]) -> list[Array]:
    """Baseline, then arms; nothing differs."""
    rng = draws.generator("unequal", bank, arms, n, base, *sds)
    return [sds[0] * noise(rng, bank, (draws.count, base)),
            *(sds[1] * noise(rng, bank, (draws.count, n)) for _ in range(arms))]  # fmt: skip


def intervals(draws: Draws) -> Iterator[Row]:
    """With large true effects, so that Holm's later steps are taken: joint intervals, and each one by itself."""
    for bank, n in itertools.product(BANKS, (3, 5, 8)):
        shifts = np.array([-30.0, -6.0, 0.0, 0.0])
        drawn = draws.studies("intervals", bank, n, shifts=tuple(shifts))
        family, _ = findings(drawn[0], drawn[1:], smallest_effect=X, alpha=ALPHA)
        joint = (family.joint_low <= shifts) & (family.joint_high >= shifts)
        yield covers("joint intervals of 4 contrasts: all hold", np.asarray(joint.all(-1)), bank, n)
        decided = (family.low <= shifts) & (family.high >= shifts)
        yield covers("each interval beside its word", decided.reshape(-1), bank, n)


def added(draws: Draws) -> Iterator[Row]:
    """Seeds added after every verdict that left something open, up to four times as many."""
    for bank, (first, sds) in itertools.product(BANKS, ((3, (1, 1)), (3, (1, 6)), (5, (1, 1)), (5, (1, 6)))):
        stages = extendable_looks((first,), ALPHA)
        last = stages[-1].n
        for arms in (1, 4):
            rng = draws.generator("added", bank, first, *sds, arms)
            drawn = [sds[i > 0] * noise(rng, bank, (draws.count, last)) for i in range(arms + 1)]
            check = f"{arms} arm{'s' * (arms > 1)}, noise {sds[0]}:{sds[1]}, seeds added up to {last}"
            claimed = differs(words_at_looks(drawn, stages, smallest_effect=LITTLE))
            yield level(f"{check}: any better/worse", claimed, bank, first)
        moved = [arm + shift for arm, shift in zip(drawn, (0, X, -X, X, -X), strict=True)]
        claimed = too_small(words_at_looks(moved, stages))
        yield level(f"{check}, true difference X: called smaller", claimed, bank, first)


def searched(draws: Draws) -> Iterator[Row]:
    """Two arms that are equal at their own best rates, each judged at the best of a bracket."""
    count = max(draws.count // EACH, 100)
    for (arm, against), sd, n in itertools.product(CURVATURES, NOISES, SEARCHED):
        rng = draws.generator("searched", arm, against, sd, n)
        shapes = {"a parabola": PARABOLA, **(STEEP if arm == 0.03 and n != 5 else {})}
        for name, shape in shapes.items():
            wrong = [_equal_arms_differ(rng, (arm, against), sd, n, shape) for _ in range(count)]
            check = f"bracket, {name}, curvature {arm:g} and {against:g}, sd {sd:g}: better/worse"
            yield level(check, np.array(wrong), GAUSSIAN, n)
    for (arm, against), sd in itertools.product(CURVATURES, NOISES):
        rng = draws.generator("tuned", arm, against, sd)
        wrong = [_equal_arms_differ(rng, (arm, against), sd, 5, PARABOLA, TUNED) for _ in range(count)]
        check = f"tuned, 8 rates, curvature {arm:g} and {against:g}, sd {sd:g}: better/worse"
        yield level(check, np.array(wrong), GAUSSIAN, 5)


def _equal_arms_differ(
    rng: np.random.Generator, curvatures: tuple[float, float], sd: float, n: int, shape: Shape,
    rates: Sequence[float] = OCTAVES,
) -> bool:  # fmt: skip
    arms = [bracketed(rng, curvature, sd, n, shape, rates) for curvature in curvatures]
    if None in arms:
        return False  # not comparable
    weighted = [WeightedArm(weight=w, losses=arm[0], search=arm[1]) for w, arm in zip((1.0, -1.0), arms, strict=True)
                if arm is not None]  # fmt: skip
    test = linear([arm.losses for arm in weighted], (1.0, -1.0), margin=0.05)
    if float(test.p) >= ALPHA:
        return False  # a search makes nothing surer
    return float(at_own_best(test, OwnBest(weighted), alpha=ALPHA, margin=0.05).p) < ALPHA


def bracketed(
    rng: np.random.Generator, curvature: float, sd: float, n: int, shape: Shape = PARABOLA,
    rates: Sequence[float] = OCTAVES,
) -> tuple[Array, Search] | None:  # fmt: skip
    """n final losses at the best rate of a bracket of octaves, and the bracket; None where the best stays at an edge.

    The best rate lies up to an octave away from the arm's own, where the loss is 0.
    """
    best = rng.uniform(-1, 1)
    tried: dict[float, float] = {}
    wanted = list(rates)
    for _ in range(4):
        tried |= {at: shape(curvature, at - best) + sd * rng.standard_normal() for at in wanted if at not in tried}
        chosen = min(tried, key=lambda at: (tried[at], abs(at)))
        if min(tried) < chosen < max(tried):
            good = {at: loss for at, loss in tried.items() if math.isfinite(loss)}
            diverged = tuple(at for at in tried if at not in good)
            search = Search(tried=tuple(good), losses=tuple(good.values()), chosen=chosen, diverged=diverged)
            return shape(curvature, chosen - best) + sd * rng.standard_normal(n), search
        wanted = [chosen - 1 if chosen == min(tried) else chosen + 1]
    return None


def lent(draws: Draws) -> Iterator[Row]:
    """One or two seeds, judged by the noise of 10 repeats of the baseline, up to the noise that the loan allows for."""
    for bank, n, sd in itertools.product(BANKS, (1, 2), (1.0, 1.5)):
        rng = draws.generator("lent", bank, n, sd)
        repeats = noise(rng, bank, (draws.count, 10)).std(-1, ddof=1)
        arm, against = sd * noise(rng, bank, (draws.count, n)), noise(rng, bank, (draws.count, n))
        p = borrowed(arm, against, sd=repeats, df=9, margin=X).p
        yield level(f"borrowed noise, arm at {sd:g} sd: likely better/worse", p < ALPHA, bank, n)


def measures(draws: Draws) -> Iterator[Row]:
    """What is printed beside verdicts: the compute multiplier, how early the order shows, the best learning rate."""
    for beta, budgets in itertools.product((0.1, 0.5, 2.0), ((0.5, 1.0, 2.0), (0.25, 1.0, 4.0))):
        rng = draws.generator("multiplier", beta, *budgets)
        step = (budgets[0] ** -beta - budgets[-1] ** -beta) / 2
        losses = [b**-beta + 0.1 * step * rng.standard_normal((draws.count, 3)) for b in budgets]
        target = 1.3**-beta + 0.1 * step * rng.standard_normal((draws.count, 3))
        held = possible(np.log([1.3]), np.log(budgets), losses, target)[..., 0]
        told = ", ".join(f"{b:g}" for b in budgets)
        yield covers(f"compute multiplier, L = b^-{beta:g} at budgets {told}", held, GAUSSIAN, 3)
    for apart in (0.1, 1.0, 3.0):
        rng = draws.generator("tau", apart)
        early, final = ([i * apart + rng.standard_normal((draws.count, 3)) for i in range(5)] for _ in range(2))
        low, high = tau_bounds(early, final)
        yield covers(
            f"Kendall's tau of 5 arms {apart:g} sd apart, true order equal", (low <= 1) & (high >= 1), GAUSSIAN, 3
        )
    for steeper, known in itertools.product((1.0, 8.0), (True, False)):
        rng = draws.generator("optimum", steeper, known)
        found = [_optimum_held(rng, steeper, known) for _ in range(max(draws.count // 4, 500))]
        held = np.array([one for one in found if one is not None])
        what = f"best rate, {steeper:g} times as steep above, noise {'known' if known else 'unknown'}"
        yield covers(f"{what}: 95 % interval", held, GAUSSIAN, 12)


def _optimum_held(rng: np.random.Generator, steeper: float, known: bool) -> bool | None:
    """Whether the interval of the best rate after 12 trials over seven octaves holds it; None without an interval."""
    best, sd = rng.uniform(-0.7, 0.7), 0.01
    at = np.linspace(-4.0, 3.0, 12)
    away = at - best
    losses = 0.02 * np.where(away < 0, 1.0, steeper) * away**2 / np.sqrt(steeper) + sd * rng.standard_normal(12)
    interval = fit(2.0**at, losses, log=True, effect=0.05, noise_sd=sd if known else None).interval
    return None if interval is None else bool(interval[0] <= 2.0**best <= interval[1])


def text(draws: Draws) -> Iterator[Row]:
    """The interval over validation documents, of which there may be few."""
    for sizes in ((4, 4, 4), (54, 5, 40), (4,) * 5, (2, 4, 8, 16, 32), (4,) * 20):
        rng = draws.generator("text", sizes)
        labels, held = np.repeat(np.arange(len(sizes)), sizes), []
        for _ in range(draws.count):
            loss = rng.standard_normal(len(sizes))[labels]
            se, count = document_error([loss], [np.zeros_like(loss)], labels)
            noise = TextNoise(se=se, count=count, unit="documents", effective=effective_documents(labels))
            held.append(abs(loss.mean()) <= noise.halfwidth)
        what = f"{len(sizes)} documents" + ("" if len(set(sizes)) == 1 else f" of unequal size, {sizes}")
        yield covers(f"95 % interval over {what}", np.array(held), GAUSSIAN)


def dropped(draws: Draws) -> Iterator[Row]:
    """A contrast that was dropped still counts: the rest keep the level of the whole family."""
    drawn = draws.studies("dropped", GAUSSIAN, 5)
    tested = [welch(arm, drawn[0]) for arm in drawn[1:]]
    best = np.argsort([t.p for t in tested], axis=0)[0]
    chosen = np.choose(best, [adjust([t], dropped=3).p_holm[..., 0] for t in tested])
    yield level("the best of 4 arms kept, 3 dropped: better/worse", chosen < ALPHA, GAUSSIAN, 5)
