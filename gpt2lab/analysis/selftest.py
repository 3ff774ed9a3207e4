"""Tests whether verdicts are calibrated: the code judges thousands of simulated studies with known answers.

Nothing is trained: studies are drawn from three noise banks (Gaussian, Student's t with 5 degrees of freedom, and the
final losses of 1,261 seeds of one 124M recipe). Every guarantee of a report is a row: a measurement and its limit. The
same limits must reject methods that are known to be wrong.

Arms are (draws, seed) arrays at sd 1; the smallest effect that matters is X sd.
"""

from __future__ import annotations

import csv
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from gpt2lab.analysis import judging, parabola, planning, scaling, statistics
from gpt2lab.analysis.best_rate import BestRateDifference, RateSearch, WeightedArm
from gpt2lab.analysis.calibration import power
from gpt2lab.analysis.compare import compare
from gpt2lab.analysis.statistics import Array, welch
from gpt2lab.analysis.verdicts import Contrast, TextNoise, as_json
from gpt2lab.basics.text import plural
from gpt2lab.errors import ConfigError, unknown

Flags = NDArray[np.bool_]
Words = NDArray[np.str_]

LONG, QUICK = 10_000, 2_000
FEWEST, MOST = 1_000, 100_000
"""Limits of draws: fewer may not reveal a wrong method; more do not fit into memory."""
BANKS = GAUSSIAN, T5, REAL = "Gaussian", "t5", "124M seeds"
SEEDS = (3, 5, 8)
ONE_BY_ONE = tuple(range(3, 13))
ALPHA, X = 0.05, 3.0
AT_X, EFFECTS, LARGE, MIXED = (X, -X, X, -X), (-3.0, -2.0, 0.0, 0.0), (-30.0, -6.0, 0.0, 0.0), (-4.0, -1.5, 0.0, 1.0)
TINY_EFFECT = 0.1
"""A smallest effect, in sd, that few seeds cannot rule out, so that every null study continues to the last look."""
SIGMAS, NARROWEST = 3.0, 0.03
"""Tolerance of a rate, in standard errors; and the least tolerance around a reference."""
TIMES, EACH = 20, 20
"""Draws of a single contrast per study of other parts, since they cost little; studies of other parts per search."""

# (true -3 sd -> better, true -2 sd -> better, no effect -> no difference larger than X), by noise and seeds per arm.
# From a simulation that shares no code with ours: means, variances and Welch's t written out in numpy, critical values
# from 3,000,000 studies without an effect at each of nine ratios of noise, Holm's method as step-wise rejection for the
# differences and for equivalence; 1,000,000 studies of five arms per cell. A test repeats it with fewer.
REFERENCES = {
    (GAUSSIAN, 3): (0.153, 0.063, 0.254), (GAUSSIAN, 5): (0.813, 0.449, 0.945), (GAUSSIAN, 8): (0.996, 0.853, 0.990),
    (T5, 3): (0.199, 0.085, 0.362), (T5, 5): (0.811, 0.508, 0.906), (T5, 8): (0.980, 0.848, 0.984),
    (REAL, 3): (0.154, 0.063, 0.260), (REAL, 5): (0.814, 0.451, 0.941), (REAL, 8): (0.996, 0.852, 0.990),
}  # fmt: skip
# (contrasts, difference in sd, seeds per arm for 80 % power at alpha / contrasts), by simulation in a test.
SEEDS_NEEDED = (
    (1, 0.5, 66), (1, 1.0, 18), (1, 1.5, 9), (1, 2.0, 6), (1, 3.0, 4),
    (4, 0.5, 93), (4, 1.0, 25), (4, 1.5, 13), (4, 2.0, 8), (4, 3.0, 5),
)  # fmt: skip
FORECASTS = ((3, 3), (3, 6), (3, 10), (5, 5), (5, 10), (8, 8))
"""Seeds of an arm and of the baseline for which planned and simulated power are compared."""
UNEQUAL = ((1, 3, 10), (10, 3, 3), (10, 3, 6), (10, 3, 10), (10, 3, 50), (4, 5, 10), (4, 5, 20), (4, 8, 16))
"""(arms, seeds of each, seeds of the baseline)"""
SPREADS = ((1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (1.0, 10.0), (10.0, 1.0))
"""(sd of the baseline, of every arm)"""
APART = (4.0, 10.0)
"""sd of every arm in studies with looks: the ratios of noise at which most is claimed."""
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
SINGLE = 300
"""Studies that `compare` judges one at a time, at most; with looks, a tenth of that."""
GOLDEN = {"mudd_skips": ("better", -0.0084), "fp8_mlp_down": ("no difference larger than 0.005", 0.0001)}
"""contrast -> the word, and the difference in nats to four places"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measurement and its accepted range.

    bank: noise of the studies; n: seeds per arm; reference: the expected value; control: a method known to be wrong,
    which must lie outside the range.
    """

    check: str
    part: str = ""
    bank: str = ""
    n: int | None = None
    measured: float
    reference: float | None = None
    low: float = 0.0
    high: float = 1.0
    control: bool = False
    note: str = ""

    @property
    def ok(self) -> bool:
        return (self.low <= self.measured <= self.high) is not self.control  # NaN lies outside

    @property
    def status(self) -> str:
        return (("missed", "flagged") if self.control else ("rejected", "accepted"))[self.ok]


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """All rows of a self-test. The same draws and seed give the same rows."""

    rows: tuple[Measurement, ...]
    draws: int
    seed: int

    @property
    def wrong(self) -> tuple[Measurement, ...]:
        return tuple(row for row in self.rows if not row.ok)

    @property
    def ok(self) -> bool:
        return not self.wrong

    def to_json(self) -> dict[str, object]:
        """Plain data for `json.dumps(..., allow_nan=False)`."""
        names = ("part", "check", "bank", "n", "measured", "reference", "low", "high", "status", "ok", "note")
        rows = [as_json({name: getattr(row, name) for name in names}) for row in self.rows]
        return {"ok": self.ok, "draws": self.draws, "seed": self.seed, "rows": rows}


def chance(rate: float, draws: int) -> float:
    """The sampling tolerance of a rate."""
    return SIGMAS * math.sqrt(rate * (1 - rate) / draws)


def level(check: str, wrong: Flags, bank: str = "", n: int | None = None, **more: Any) -> Measurement:
    """Studies with a false claim: at most ALPHA, up to sampling error.  wrong: (draws,) or, any of them, (draws,
    contrast)"""
    draws = wrong.shape[0]
    rate, high = float(wrong.reshape(draws, -1).any(-1).mean()), ALPHA + chance(ALPHA, draws)
    return Measurement(check=check, bank=bank, n=n, measured=rate, high=high, **more)


def covers(check: str, held: ArrayLike, bank: str = "", n: int | None = None) -> Measurement:
    """Intervals that contain the true value: at least 1 - ALPHA, up to sampling error.  held: (draws,)"""
    low = 1 - ALPHA - chance(ALPHA, np.size(held))
    return Measurement(check=check, bank=bank, n=n, measured=float(np.asarray(held, dtype=bool).mean()), low=low)


def near(check: str, hits: Flags, reference: float, bank: str = "", n: int | None = None) -> Measurement:
    """A rate that must equal the reference, within the tolerance."""
    allowed = max(NARROWEST, chance(reference, hits.shape[0]))
    low, high = max(0.0, reference - allowed), min(1.0, reference + allowed)
    return Measurement(
        check=check, bank=bank, n=n, measured=float(hits.mean()), reference=reference, low=low, high=high
    )


def none_of(check: str, count: int, of: int) -> Measurement:
    """Something that must never happen, in `of` cases."""
    return Measurement(check=check, measured=float(count), high=0.0, note=f"of {of:,}")


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The number of simulated studies, and their seed. What one check draws does not depend on the others."""

    count: int
    seed: int

    def generator(self, *labels: object) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(repr(labels).encode())])

    def studies(
        self, label: str, bank: str, n: int, shifts: Sequence[float] = (0.0,) * 4, sds: Sequence[float] = (), *,
        base: int | None = None, base_sd: float = 1.0, times: int = 1,
    ) -> list[Array]:  # fmt: skip
        """The baseline (`base` seeds, n unless given), then an arm per shift (of sd 1 unless given), each (draws x
        times, seed)."""
        rng, count = self.generator(label, bank, n), self.count * times
        sizes, spread = (base or n, *(n for _ in shifts)), (base_sd, *(sds or (1.0,) * len(shifts)))
        arms = zip((0.0, *shifts), spread, sizes, strict=True)
        return [shift + sd * noise(rng, bank, (count, size)) for shift, sd, size in arms]


def noise(rng: np.random.Generator, bank: str, size: tuple[int, ...]) -> Array:
    """Independent values of mean 0 and sd 1; of the real bank, repeats drawn with replacement.  -> size"""
    if bank == GAUSSIAN:
        return rng.standard_normal(size)
    if bank == T5:
        return np.asarray(rng.standard_t(5, size) / math.sqrt(5 / 3))
    return real()[rng.integers(0, len(real()), size)]


@functools.cache
def real() -> Array:
    """Final validation losses of the repeats of one 124M recipe, centred and scaled to sd 1.  -> (repeat,)"""
    values = np.array([float(row["val_loss"]) for row in table("seed_noise_124m.csv")])
    return np.asarray((values - values.mean()) / values.std())


def table(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file of the banks; see their README for the source."""
    return list(csv.DictReader((files("gpt2lab.analysis") / "banks" / name).read_text(encoding="utf-8").splitlines()))


def judged(arms: Sequence[Array]) -> tuple[statistics.Family, Words]:
    """The family and decisions of studies whose first arm is the baseline, as of `compare` where no run failed.

    (draws, seed) each -> (draws, contrast) each
    """
    family = statistics.adjust([welch(arm, arms[0], alpha=ALPHA, margin=X) for arm in arms[1:]], alpha=ALPHA)
    return family, judging.decide(family.difference, family.p_holm, family.p_equivalence_holm, alpha=ALPHA)


def differs(decisions: Words) -> Flags:
    """Whether a difference is claimed, large or small."""
    return np.asarray(np.char.startswith(decisions, "better") | np.char.startswith(decisions, "worse"))


def too_small(decisions: Words) -> Flags:
    """Whether a difference is claimed to be smaller than X."""
    return np.asarray((decisions == "no difference") | np.char.endswith(decisions, "(smaller)"))


def rates(draws: Draws) -> Iterator[Measurement]:
    """False claims, power and intervals of a baseline and four arms, or of a single contrast."""
    for bank, n in itertools.product(BANKS, SEEDS):
        null = judged(draws.studies("null", bank, n))[1]
        yield level("all null: any better/worse", differs(null), bank, n)
        yield near("all null: no difference larger than X", null == "no difference", REFERENCES[bank, n][2], bank, n)
        single = judged(draws.studies("coverage", bank, n, (0.0,), times=TIMES))[0]
        held = (single.raw_low[:, 0] <= 0) & (single.raw_high[:, 0] >= 0)
        yield covers("95 % interval: holds the truth", held, bank, n)
        better = np.char.startswith(judged(draws.studies("power", bank, n, EFFECTS))[1], "better")
        for i, sd in enumerate((3, 2)):
            yield near(f"true -{sd} sd: better", better[:, i], REFERENCES[bank, n][i], bank, n)
        for sd in (2, 4):
            claims = differs(judged(draws.studies(f"noisier {sd}", bank, n, (0.0,), (sd,), times=TIMES))[1])
            yield level(f"one arm at {sd} sd: better/worse", claims, bank, n)
            claims = differs(judged(draws.studies(f"noisier {sd} of four", bank, n, sds=(sd, 1, 1, 1)))[1])
            yield level(f"one of 4 arms at {sd} sd: any better/worse", claims, bank, n)
        claims = too_small(judged(draws.studies("exactly X", bank, n, AT_X))[1])
        yield level("true difference X: called smaller", claims, bank, n)
        family = judged(draws.studies("intervals", bank, n, LARGE))[0]  # so large that Holm's later steps are taken
        joint = ((family.joint_low <= LARGE) & (family.joint_high >= LARGE)).all(-1)
        yield covers("joint intervals of 4 contrasts: all hold", joint, bank, n)
        covered = ((family.low <= LARGE) & (family.high >= LARGE)).reshape(-1)
        yield covers("each interval beside its word", covered, bank, n)


def unequal(draws: Draws) -> Iterator[Measurement]:
    """Unequal numbers of seeds, unequal noise, and both; few seeds judged by the noise of baseline repeats."""
    for bank in BANKS:
        for arms, n, base in UNEQUAL:
            check = f"{plural(arms, 'arm')} of {n} seeds, {base} of the baseline, worst of 5 ratios of noise"
            claims, intervals = [], []
            for base_sd, sd in SPREADS:
                label, shifts, sds = f"unequal {arms} {base} {base_sd} {sd}", (0.0,) * arms, (sd,) * arms
                drawn = draws.studies(label, bank, n, shifts, sds, base=base, base_sd=base_sd)
                claims.append(level(f"{check}: any better/worse", differs(judged(drawn)[1]), bank, n))
                test = welch(drawn[1], drawn[0])
                intervals.append(covers(f"{check}: 95 % interval", (test.low <= 0) & (test.high >= 0), bank, n))
            yield max(claims, key=lambda row: row.measured)
            yield min(intervals, key=lambda row: row.measured)
        claimed = too_small(judged(draws.studies("unequal at X", bank, 3, (X, -X), base=10))[1])
        yield level("3 seeds against 10, true difference X: called smaller", claimed, bank, 3)
        rng = draws.generator("cells", bank)
        cells = [sd * noise(rng, bank, (draws.count, n)) for n, sd in ((3, 1.0), (3, 4.0), (3, 1.0), (6, 2.0))]
        effect = statistics.linear(cells, (0.5, -0.5, 0.5, -0.5))
        yield level("main effect of unequal cells: better/worse", effect.p < ALPHA, bank, 3)
        for n, sd in itertools.product((1, 2), (1.0, 1.5)):
            repeats, against, arm = draws.studies(f"lent {sd}", bank, n, (0.0, 0.0), (1.0, sd), base=10)
            p = statistics.borrowed(arm, against, sd=repeats.std(-1, ddof=1), df=9, margin=X).p
            yield level(f"borrowed noise, arm at {sd:g} sd: likely better/worse", p < ALPHA, bank, n)


def looks(draws: Draws) -> Iterator[Measurement]:
    """False claims at declared looks, with seeds added after every open verdict, and with contrasts dropped."""
    added, one_by_one = (planning.extendable_looks(first, ALPHA) for first in ((3,), ONE_BY_ONE))
    designs: dict[str, tuple[Sequence[planning.Look], int]] = {  # and seeds of the baseline, where it has more
        "looks at n = 3, 5, 8": (planning.declared_looks(SEEDS, ALPHA), 0),
        "3 seeds, more added up to 12": (added, 0),
        "3 seeds, 10 of the baseline, more added up to 12": (added, 10),
        "5 seeds, more added up to 20": (planning.extendable_looks((5,), ALPHA), 0),
        "looks at n = 3, 5, 8, more added up to 32": (planning.extendable_looks(SEEDS, ALPHA), 0),
        "one by one to 12, then 24 and 48": (one_by_one, 0),
    }
    for bank, arms, sd, (design, (at, base)) in itertools.product(BANKS, (1, 4), APART, designs.items()):
        check, last = f"{design}, noise 1:{sd:g}, {plural(arms, 'arm')}", at[-1].n
        drawn = draws.studies(check, bank, last, (0.0,) * arms, (sd,) * arms, base=max(base, last))
        yield level(f"{check}, all null: any better/worse", differs(words_at_looks(drawn, at, TINY_EFFECT, base)), bank)
        moved = [arm + shift for arm, shift in zip(drawn, (0.0, *AT_X[:arms]), strict=True)]
        yield level(f"{check}, true difference X: called smaller", too_small(words_at_looks(moved, at, X, base)), bank)
    drawn = draws.studies("dropped", GAUSSIAN, 5)
    tests = [welch(arm, drawn[0]) for arm in drawn[1:]]
    best = np.argsort([test.p for test in tests], axis=0)[0]
    best_p = np.choose(best, [statistics.adjust([test], dropped=3).p_holm[..., 0] for test in tests])
    yield level("the best of 4 arms kept, 3 dropped: better/worse", best_p < ALPHA, GAUSSIAN, 5)
    for bank, fresh in itertools.product(BANKS, (True, False)):
        screened = np.stack(draws.studies("screened", bank, 10, (0.0,) * 20))  # (arm, draws, seed): 5 for the screen
        best = np.argmin(screened[1:, :, :5].mean(-1), axis=0)[None, :, None]
        pair = [screened[0], np.take_along_axis(screened[1:], best, axis=0)[0]]
        wrong = differs(judged([arm[:, 5:] if fresh else arm[:, :5] for arm in pair])[1])
        seeds = "5 fresh seeds" if fresh else "the screen's own 5 seeds"
        yield level(f"the best of 20 screened arms on {seeds}: better/worse", wrong, bank, control=not fresh)


def words_at_looks(
    arms: Sequence[Array], at: Sequence[planning.Look], smallest_effect: float = X, base: int = 0
) -> Words:
    """The decisions of `judge_looks` on any number of studies, the baseline first, which has at least `base` seeds at
    every look.  (draws, seed) each

    -> (draws, contrast): of the look that decided a contrast, or else of the last one. A decided contrast stays in the
    family with the comparison of its look.
    """
    settled = np.zeros((len(arms[0]), len(arms) - 1), dtype=bool)
    tested: list[statistics.Comparison] = []
    decisions = np.full(settled.shape, "")
    numbers = [f.name for f in fields(statistics.Comparison) if f.name not in ("sizes", "best_rates")]
    for look in at:
        against = arms[0][:, : max(look.n, base)]
        now = [welch(arm[:, : look.n], against, margin=smallest_effect) for arm in arms[1:]]
        for i, old in enumerate(tested):
            merged = {name: np.where(settled[:, i], getattr(old, name), getattr(now[i], name)) for name in numbers}
            now[i] = replace(now[i], **merged)
        tested, family = now, statistics.adjust(now, alpha=look.level)
        fresh = judging.decide(family.difference, family.p_holm, family.p_equivalence_holm, alpha=look.level)
        decisions = np.where(settled, decisions, fresh)
        settled |= np.logical_or.reduce([np.char.startswith(fresh, word) for word in judging.DECISIVE])
    return decisions


def searched(draws: Draws) -> Iterator[Measurement]:
    """Two arms that are equal at their best rates, each judged at the best rate of a bracket or of 8 rates."""
    once: dict[int, tuple[planning.Look, ...]] = {n: (planning.Look(n, ALPHA),) for n in (3, 5, 10)}
    added = planning.extendable_looks(SEEDS, ALPHA)
    designs = [("bracket", BRACKET, "a parabola", c, once[n]) for c in CURVATURES for n in SEARCHED]
    designs += [("bracket", BRACKET, shape, (0.03, 0.03), once[n]) for shape in list(SHAPES)[1:] for n in (3, 10)]
    designs += [("tuned, 8 rates", EIGHT_RATES, "a parabola", c, once[5]) for c in CURVATURES]
    designs += [("bracket, looks at n = 3, 5, 8, more added", BRACKET, "a parabola", c, added) for c in CURVATURES]
    for (name, rates, shape, curvatures, at), sd in itertools.product(designs, (0.0015, 0.015)):
        check, last = f"{name}, {shape}, curvature {curvatures[0]:g} and {curvatures[1]:g}, sd {sd:g}", at[-1].n
        rng, wrong = draws.generator(f"{check}: better/worse", last), []
        for _ in range(draws.count // EACH):
            drawn = [at_best_trial(rng, curvature, sd, last, SHAPES[shape], rates) for curvature in curvatures]
            arms = [replace(arm, weight=weight) for arm, weight in zip(drawn, (1.0, -1.0), strict=True) if arm]
            wrong.append(len(arms) == 2 and any(_found_to_differ(arms, look) for look in at))  # one is not comparable
        yield level(f"{check}: better/worse", np.array(wrong), GAUSSIAN, last)


def _found_to_differ(arms: Sequence[WeightedArm], look: planning.Look) -> bool:
    arms = [replace(arm, losses=arm.losses[: look.n]) for arm in arms]
    test = statistics.linear([arm.losses for arm in arms], (1.0, -1.0), margin=0.05)
    if float(test.p) >= look.level:  # accounting for the search can only raise it
        return False
    return float(statistics.at_best_rates(test, BestRateDifference(arms), alpha=look.level, margin=0.05).p) < look.level


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


def planned(draws: Draws) -> Iterator[Measurement]:
    """Power as planned, and the recommended numbers of seeds."""
    cells = [(k, sd, n, base) for (n, base), sd, k in itertools.product(FORECASTS, (2.0, 3.0), (1, 4))]
    for contrasts, sd, n, base in [*cells, *((k, sd, n, n) for k, sd, n in SEEDS_NEEDED)]:
        baseline, arm = draws.studies(f"power {sd} {contrasts}", GAUSSIAN, n, (-sd,), base=base)
        test, promised = welch(arm, baseline), power(sd, (n, base), alpha=ALPHA / contrasts)
        check = f"power for {sd:g} sd, {n} seeds against {base}, {plural(contrasts, 'contrast')}"
        yield near(check, (test.p < ALPHA / contrasts) & (test.difference < 0), promised, GAUSSIAN, n)
    unlike = sum(planning.seeds_for_power(sd, alpha=ALPHA / k) != n for k, sd, n in SEEDS_NEEDED)
    yield none_of("seeds for 80 % power unlike those by simulation", unlike, len(SEEDS_NEEDED))


def measures(draws: Draws) -> Iterator[Measurement]:
    """Other intervals: over documents, of compute multipliers, of rank agreement, of the best rate."""
    for sizes in ((4, 4, 4), (54, 5, 40), (4,) * 5, (2, 4, 8, 16, 32), (4,) * 20):
        labels, held = np.repeat(np.arange(len(sizes)), sizes), []
        for losses in draws.generator("text", sizes).standard_normal((draws.count, len(sizes)))[:, labels]:
            se, count = statistics.document_error([losses], [np.zeros_like(losses)], labels)
            effective = statistics.effective_documents(labels)
            text = TextNoise(se=se, count=count, unit="documents", effective=effective)
            held.append(abs(losses.mean()) <= text.halfwidth)
        case = f"{len(sizes)} documents" + ("" if len(set(sizes)) == 1 else f" of unequal size, {sizes}")
        yield covers(f"95 % interval over {case}", held, GAUSSIAN)
    for beta, budgets in itertools.product((0.1, 0.5, 2.0), ((0.5, 1.0, 2.0), (0.25, 1.0, 4.0))):
        rng, sd = draws.generator("multiplier", beta, *budgets), (budgets[0] ** -beta - budgets[-1] ** -beta) / 20
        *curve, target = (b**-beta + sd * rng.standard_normal((draws.count, 3)) for b in (*budgets, 1.3))
        inside = scaling.possible(np.log([1.3]), np.log(budgets), curve, target)[..., 0]
        yield covers(f"compute multiplier, L = b^-{beta:g} at budgets {budgets}", inside, GAUSSIAN, 3)
    for apart in (0.1, 1.0, 3.0):
        rng = draws.generator("tau", apart)
        early, final = ([i * apart + rng.standard_normal((draws.count, 3)) for i in range(5)] for _ in range(2))
        high = scaling.tau_bounds(early, final)[1]
        yield covers(f"Kendall's tau of 5 arms {apart:g} sd apart, true order equal", high >= 1, GAUSSIAN, 3)
    at, sd = np.linspace(-4.0, 3.0, 12), 0.01  # trials over seven octaves
    for steeper, noise_known in itertools.product((1.0, 8.0), (True, False)):
        rng, held = draws.generator("optimum", steeper, noise_known), []
        for best in rng.uniform(-0.7, 0.7, draws.count // 4):
            rise = 0.02 * np.where(at < best, 1.0, steeper) * (at - best) ** 2 / np.sqrt(steeper)
            losses = rise + sd * rng.standard_normal(12)
            interval = parabola.fit(
                2.0**at, losses, log=True, effect=0.05, noise_sd=sd if noise_known else None
            ).interval
            held += [interval[0] <= 2.0**best <= interval[1]] if interval else []
        check = f"best rate, {steeper:g} times as steep above, noise {'known' if noise_known else 'unknown'}"
        yield covers(f"{check}: 95 % interval", held, GAUSSIAN, 12)


def controls(draws: Draws) -> Iterator[Measurement]:
    """Wrong analyses of studies without an effect, which the limits must reject."""
    flagged = functools.partial(level, control=True)
    for bank in BANKS:
        for n in (3, 5):
            baseline, arm = draws.studies("bootstrap", bank, n, (0.0,))
            weights = draws.generator("resamples", n).multinomial(n, [1 / n] * n, (2, 400)) / n  # of the seeds
            differences = arm @ weights[0].T - baseline @ weights[1].T
            low, high = np.quantile(differences, (ALPHA / 2, 1 - ALPHA / 2), axis=-1)
            yield flagged("control: percentile bootstrap", (low > 0) | (high < 0), bank, n)
        arms = draws.studies("uncorrected", bank, 5, (0.0,) * 10)
        wrong = np.stack([welch(arm, arms[0]).p < ALPHA for arm in arms[1:]], axis=-1)
        yield flagged("control: uncorrected p over 10 arms", wrong, bank, 5)
        baseline, arm = draws.studies("peeking", bank, 10, (0.0,))
        wrong = np.stack([welch(arm[:, :n], baseline[:, :n]).p < ALPHA for n in range(3, 11)], axis=-1)
        yield flagged("control: peeking at each n from 3 to 10", wrong, bank, 10)
        arms = draws.studies("pooled", bank, 5, sds=(4.0, 1.0, 1.0, 1.0))
        pooled = np.mean([arm.var(-1, ddof=1) for arm in arms], axis=0)
        t = (arms[1].mean(-1) - arms[0].mean(-1)) / np.sqrt(pooled * 2 / 5)
        wrong = np.asarray(2 * stats.t.sf(np.abs(t), 4 * len(arms)) < ALPHA)
        yield flagged("control: one pooled variance, one arm at 4 sd", wrong, bank, 5)


def agreement(draws: Draws) -> Iterator[Measurement]:
    """`compare`, one study at a time, against the code for many at once; and two public ablations at 124M."""
    numbers = ("difference", "p", "p_holm", "p_equivalence_holm", "low", "high", "joint_low", "joint_high")
    for at, most, names in (((), SINGLE, numbers), (SEEDS, SINGLE // 10, ())):
        sample = Draws(count=min(most, draws.count // 10), seed=draws.seed)
        arms, unlike = sample.studies("agreement", T5, SEEDS[-1], MIXED, (0.5, 2.0, 0.2, 1.0)), 0
        family, decisions = judged(arms)
        if at:
            decisions = words_at_looks(arms, planning.declared_looks(at, ALPHA))
        for i, study in enumerate(zip(*arms, strict=True)):
            rows = [{"arm": str(a), "seed": s, "value": v} for a, arm in enumerate(study) for s, v in enumerate(arm)]
            verdicts = compare(rows, baseline="0", smallest_effect=X, looks=at or None, sensitivity=False)
            for k, contrast in enumerate(verdicts.contrasts):
                pairs = [(getattr(contrast, name), getattr(family, name)[i, k]) for name in names]
                same = all(math.isclose(a, b, rel_tol=1e-9) for a, b in pairs)
                unlike += not (same and decision(contrast) == decisions[i, k])
        check = f"compare against findings, {'at looks: other word' if at else 'other word or number'}"
        yield none_of(check, unlike, sample.count * len(MIXED))
    for name, (word, difference) in GOLDEN.items():
        rows = [row for row in table("golden_contrasts.csv") if row["contrast"] == name]
        golden = compare(rows, baseline="baseline", smallest_effect=0.005, metric="val_loss").contrasts[0]
        yield Measurement(
            check=f"golden {name}: {word}", n=golden.n_arm, reference=difference, note=golden.verdict,
            measured=golden.difference if golden.word == word else math.nan,
            low=difference - 0.00005, high=difference + 0.00005,
        )  # fmt: skip


def decision(contrast: Contrast) -> str:
    """The result of `decide` that a verdict word expresses."""
    return contrast.word.partition(":")[0].replace(f" larger than {X:g}", "").replace(f" than {X:g}", "")


PARTS: Mapping[str, tuple[str, Callable[[Draws], Iterator[Measurement]]]] = {
    "rates": ("Studies with a known answer (in brackets: an independent simulation)", rates),
    "unequal": ("Unequal seeds, unequal noise, and both; one or two seeds with borrowed noise", unequal),
    "looks": ("Declared looks, seeds added after every open verdict, contrasts dropped after a look", looks),
    "searched": ("Arms equal at their best learning rates, judged at the best that a search found", searched),
    "planned": ("Power as simulated (in brackets: as plans promise it)", planned),
    "measures": ("Intervals beside verdicts", measures),
    "controls": ("Wrong methods, which the same limit must flag", controls),
    "agreement": ("One study at a time against many at once, and two public ablations", agreement),
}
"""part -> its title, and its rows"""


def selftest(
    draws: int = LONG, seed: int = 0, *, parts: Sequence[str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> SelfTest:  # fmt: skip
    """Run the self-test, or some of its parts. Deterministic: the same draws and seed give the same rows.

    draws: studies per rate. progress: called before each row with the part and the number of rows so far.
    Raises ConfigError for a number of draws out of range or an unknown part.
    """
    if not FEWEST <= draws <= MOST:
        problem = f"between {FEWEST} and {MOST} draws are expected, not {draws}"
        raise ConfigError(problem, where="draws", hint=f"gpt2lab selftest statistics --draws {LONG}")
    for name in parts or ():
        if name not in PARTS:
            raise ConfigError(unknown("part", name, PARTS), where="parts")
    rows: list[Measurement] = []
    for name in parts or PARTS:
        if progress is not None:
            progress(name, len(rows))
        for row in PARTS[name][1](Draws(count=draws, seed=seed)):
            rows.append(replace(row, part=name))
            if progress is not None:
                progress(name, len(rows))
    return SelfTest(rows=tuple(rows), draws=draws, seed=seed)
