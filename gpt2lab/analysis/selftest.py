"""Tests whether verdicts are calibrated: the code judges thousands of simulated studies with known answers.

Nothing is trained: studies are drawn from three noise banks (Gaussian, Student's t with 5 degrees of freedom, and the
final losses of 1,261 seeds of one 124M recipe). Every guarantee of a verdict is a row: a measurement and its limit. The
same limits must reject methods that are known to be wrong. benchmarks/searches.py simulates searched rates; the tests
simulate power as planned, and the intervals of other numbers on a page.

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

from gpt2lab.analysis import judging, planning, statistics
from gpt2lab.analysis.statistics import Array, welch
from gpt2lab.analysis.verdicts import as_json
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
AT_X, EFFECTS, LARGE = (X, -X, X, -X), (-3.0, -2.0, 0.0, 0.0), (-30.0, -6.0, 0.0, 0.0)
TINY_EFFECT = 0.1
"""A smallest effect, in sd, that few seeds cannot rule out, so that every null study continues to the last look."""
SIGMAS, NARROWEST = 3.0, 0.03
"""Tolerance of a rate, in standard errors; and the least tolerance around a reference."""
TIMES = 20
"""Draws of a single contrast per study of other parts, since they cost little."""

# (true -3 sd -> better, true -2 sd -> better, no effect -> no difference larger than X), by noise and seeds per arm.
# From a simulation that shares no code with ours: means, variances and Welch's t written out in numpy, critical values
# from 3,000,000 studies without an effect at each of nine ratios of noise, Holm's method as step-wise rejection for the
# differences and for equivalence; 1,000,000 studies of five arms per cell. A test repeats it with fewer.
REFERENCES = {
    (GAUSSIAN, 3): (0.153, 0.063, 0.254), (GAUSSIAN, 5): (0.813, 0.449, 0.945), (GAUSSIAN, 8): (0.996, 0.853, 0.990),
    (T5, 3): (0.199, 0.085, 0.362), (T5, 5): (0.811, 0.508, 0.906), (T5, 8): (0.980, 0.848, 0.984),
    (REAL, 3): (0.154, 0.063, 0.260), (REAL, 5): (0.814, 0.451, 0.941), (REAL, 8): (0.996, 0.852, 0.990),
}  # fmt: skip
UNEQUAL = ((1, 3, 10), (10, 3, 3), (10, 3, 6), (10, 3, 10), (10, 3, 50), (4, 5, 10), (4, 5, 20), (4, 8, 16))
"""(arms, seeds of each, seeds of the baseline)"""
SPREADS = ((1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (1.0, 10.0), (10.0, 1.0))
"""(sd of the baseline, of every arm)"""


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
        names = ("part", "check", "bank", "n", "measured", "reference", "low", "high", "status", "ok")
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
    """The family and decisions of studies whose first arm is the baseline.  -> (draws, contrast) each"""
    return judging.findings(arms[0], arms[1:], smallest_effect=X, alpha=ALPHA)


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
    designs = [("looks at n = 3, 5, 8", planning.declared_looks(SEEDS, ALPHA), 1.0)]
    for first, sd in itertools.product((3, 5), (1.0, 6.0)):
        added = planning.extendable_looks((first,), ALPHA)
        designs.append((f"{first} seeds, more added up to {added[-1].n}, noise 1:{sd:g}", added, sd))
    one_by_one = planning.extendable_looks(ONE_BY_ONE, ALPHA)
    designs += [(f"one by one to 12, then 24 and 48, noise 1:{sd:g}", one_by_one, sd) for sd in (1.0, 6.0)]
    for bank, arms, (design, at, sd) in itertools.product(BANKS, (1, 4), designs):
        check = f"{design}, {plural(arms, 'arm')}"
        drawn = draws.studies(check, bank, at[-1].n, (0.0,) * arms, (sd,) * arms)
        yield level(f"{check}, all null: any better/worse", differs(words_at_looks(drawn, at, TINY_EFFECT)), bank)
        moved = [arm + shift for arm, shift in zip(drawn, (0.0, *AT_X[:arms]), strict=True)]
        yield level(f"{check}, true difference X: called smaller", too_small(words_at_looks(moved, at)), bank)
    drawn = draws.studies("dropped", GAUSSIAN, 5)
    tests = [welch(arm, drawn[0]) for arm in drawn[1:]]
    best = np.argsort([test.p for test in tests], axis=0)[0]
    best_p = np.choose(best, [statistics.adjust([test], dropped=3).p_holm[..., 0] for test in tests])
    yield level("the best of 4 arms kept, 3 dropped: better/worse", best_p < ALPHA, GAUSSIAN, 5)


def words_at_looks(arms: Sequence[Array], at: Sequence[planning.Look], smallest_effect: float = X) -> Words:
    """The decisions of `judge_looks` on any number of studies, the baseline first.  (draws, seed) each

    -> (draws, contrast): of the look that decided a contrast, or else of the last one. A decided contrast stays in the
    family with the comparison of its look.
    """
    settled = np.zeros((len(arms[0]), len(arms) - 1), dtype=bool)
    tested: list[statistics.Comparison] = []
    decisions = np.full(settled.shape, "")
    numbers = [f.name for f in fields(statistics.Comparison) if f.name not in ("sizes", "best_rates")]
    for look in at:
        now = [welch(arm[:, : look.n], arms[0][:, : look.n], margin=smallest_effect) for arm in arms[1:]]
        for i, old in enumerate(tested):
            merged = {name: np.where(settled[:, i], getattr(old, name), getattr(now[i], name)) for name in numbers}
            now[i] = replace(now[i], **merged)
        tested, family = now, statistics.adjust(now, alpha=look.level)
        fresh = judging.decide(family.difference, family.p_holm, family.p_equivalence_holm, alpha=look.level)
        decisions = np.where(settled, decisions, fresh)
        settled |= np.logical_or.reduce([np.char.startswith(fresh, word) for word in judging.DECISIVE])
    return decisions


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


PARTS: Mapping[str, tuple[str, Callable[[Draws], Iterator[Measurement]]]] = {
    "rates": ("Studies with a known answer (in brackets: an independent simulation)", rates),
    "unequal": ("Unequal seeds, unequal noise, and both; one or two seeds with borrowed noise", unequal),
    "looks": ("Declared looks, seeds added after every open verdict, contrasts dropped after a look", looks),
    "controls": ("Wrong methods, which the same limit must flag", controls),
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
