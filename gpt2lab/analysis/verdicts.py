"""From numbers to words: the only words that a comparison may carry, and when.

Precedence: not comparable > unstable > exploratory > better / worse > no difference larger than X > inconclusive.
One or two seeds never yield plain better or worse: with the noise of at least ten baseline repeats they are "likely
better" or "likely worse", without it exploratory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from gpt2lab.analysis import words
from gpt2lab.analysis.best_rate import Search
from gpt2lab.analysis.statistics import Family, adjust, no_spread, welch

FEWEST = 3
"""Seeds per arm from which on an arm's own noise can be judged by."""

FEWEST_LENT = 10
"""Baseline repeats that a borrowed noise floor must rest on."""

DECISIVE = ("better", "worse", "no difference")
"""Words that answer the question, so that no further seed is needed."""

MOST_FAILED = 0.25
"""Share of failed seeds up to which the survivors are still judged."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A noise floor: the sd of `runs` repeats of the baseline on one scale and software stack."""

    sd: float
    df: float
    runs: int
    scale: str
    stack: str

    @property
    def lends(self) -> bool:
        """Whether it rests on enough repeats to stand in for an arm's own noise."""
        return self.runs >= FEWEST_LENT and self.sd > 0 and self.df > 0


@dataclass(frozen=True, kw_only=True)
class TextNoise:
    """Standard error of a difference over the validation text, in the metric's unit, and over how many of what:
    `documents`, or `windows` where all lie in one document."""

    se: float
    count: int
    unit: str
    effective: float | None = None
    """how many of equal size would tell as much; `count` unless given"""

    @property
    def halfwidth(self) -> float:
        """Of the 95 % interval of the difference on other text of the same kind (Student's t)."""
        return float(stats.t.ppf(0.975, (self.effective or self.count) - 1)) * self.se


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm's final values, by seed. Failed runs are counted, never averaged; missing ones have no value yet."""

    name: str
    values: Mapping[str, float]
    failed: int = 0
    missing: int = 0
    end: float | None = None
    """step at which its runs end, where the table holds steps"""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def declared(self) -> int:
        """Runs that there are or should be."""
        return self.n + self.failed + self.missing

    @property
    def array(self) -> NDArray[np.float64]:
        return np.array(list(self.values.values()), dtype=np.float64)

    @property
    def mean(self) -> float:
        return float(self.array.mean()) if self.n else math.nan

    @property
    def sd(self) -> float:
        if self.n < 2:
            return math.nan
        return 0.0 if no_spread(self.array) else float(self.array.std(ddof=1))


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A contrast as declared before looking: the sum of `weights` x the arms' means, the weights adding up to 0."""

    arm: str
    against: str
    weights: Mapping[str, float]
    """by arm; a pair has 1 and -1, the effects of a factorial design have more"""

    @classmethod
    def pair(cls, arm: str, against: str) -> Declared:
        """One arm against another."""
        return cls(arm=arm, against=against, weights={arm: 1.0, against: -1.0})

    @property
    def is_pair(self) -> bool:
        """Whether it compares two arms and nothing else."""
        return list(self.weights.items()) == [(self.arm, 1.0), (self.against, -1.0)]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What was declared before looking: see `compare`, whose arguments these are."""

    smallest_effect: float
    alpha: float = 0.05
    unit: str = "nats"
    higher_is_better: bool = False
    noise: Noise | None = None
    exploratory: Mapping[str, str] = field(default_factory=dict)
    not_comparable: Mapping[str, str] = field(default_factory=dict)
    late: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(arm, against) -> why that contrast alone may claim nothing"""
    dropped: int = 0
    """contrasts that were declared once and are no longer compared"""
    searches: Mapping[str, Search] = field(default_factory=dict)
    """arm -> what its search for a rate has tried"""
    text: Mapping[tuple[str, str], TextNoise] = field(default_factory=dict)
    """(arm, against) -> how far the difference depends on the validation text"""
    coming: Sequence[int] | None = None
    """seeds per arm at which open contrasts are judged again; None where any number may be added"""
    force_exploratory: bool = False
    """whether runs of unequal length are shown, with nothing claimed of them"""
    screen: bool = False
    scope: Sequence[str] = ()
    look: str = ""
    """which of several declared looks this is, in words"""
    sensitivity: bool = True
    """whether other estimators are computed beside"""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One arm against another, in numbers and words. Numbers that cannot be had are NaN."""

    arm: str
    against: str
    n_arm: int
    n_against: int
    mean_arm: float
    mean_against: float
    sd_arm: float
    sd_against: float
    failed_arm: int
    failed_against: int
    difference: float
    """arm minus against, over the runs that did not fail"""
    low: float
    high: float
    """adjusted for the family, at the level at which the word was decided"""
    joint_low: float
    joint_high: float
    """the same at 1 - alpha / m: these intervals of all contrasts hold together"""
    raw_low: float
    raw_high: float
    p: float
    p_holm: float
    p_equivalence_holm: float
    in_noise_sd: float
    """the difference in sds of the noise floor; NaN without one"""
    detectable: float
    """true difference that this many seeds would find with 80 % power, at the family's level"""
    detectable_upper: float
    """the same with the sd at its upper 80 % limit"""
    exaggeration: float | None
    """how many times too large small significant effects are on average, where this is one"""
    word: str
    survivors: str | None
    """the word that holds "conditional on not failing", where at most a quarter of the seeds failed"""
    reason: str | None
    """why the contrast is not comparable, unstable or exploratory"""
    verdict: str
    """the whole sentence, with its scope"""
    halfwidths: Mapping[str, float]
    """what each source adds to the uncertainty, as half the width of an interval by itself: `seeds`, `search` of the
    rates, `text`; those that are known"""
    notes: tuple[str, ...]
    sensitivity: dict[str, dict[str, float]]
    weights: Mapping[str, float]
    """of the arms' means in the difference: 1 and -1 for a pair"""
    alpha: float
    """the level at which it was judged: smaller than the study's where several looks share that"""
    look: int | None = None
    """seeds per arm at the look that this verdict is from, where looks were declared"""
    settled: bool = True
    """whether no declared look is left for it"""
    next_look: int | None = None
    """seeds per arm at which it is judged again; None where it is decided, or where any number may be added"""
    next_alpha: float | None = None
    """the level of that look"""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a pair of arms may claim, before any p value is looked at; reasons are "" where they do not apply."""

    not_comparable: str = ""
    unstable: str = ""
    where: str = ""
    conditional: bool = False
    exploratory: str = ""
    borrow: bool = False
    testable: bool = True


def decide(
    difference: ArrayLike,
    p_holm: ArrayLike,
    p_equivalence_holm: ArrayLike,
    *,
    alpha: float = 0.05,
    higher_is_better: bool = False,
) -> NDArray[np.str_]:
    """better, worse, either with " (smaller)", no difference, inconclusive; "" without a p.  (...) -> (...)"""
    difference, p_holm, p_same = (np.asarray(x, dtype=np.float64) for x in (difference, p_holm, p_equivalence_holm))
    sure, same = p_holm < alpha, p_same < alpha
    gain = difference > 0 if higher_is_better else difference < 0
    return np.select(
        [np.isnan(p_holm), sure & same & gain, sure & same, sure & gain, sure, same],
        ["", "better (smaller)", "worse (smaller)", "better", "worse", "no difference"],
        default="inconclusive",
    )


def findings(
    baseline: ArrayLike, arms: Sequence[ArrayLike], *, smallest_effect: float, alpha: float = 0.05
) -> tuple[Family, NDArray[np.str_]]:
    """Any number of studies at once: every arm (..., seed) against the baseline (..., seed), one family per study.

    -> the family and what `decide` makes of it, both (..., contrast): what `compare` does where no run failed.
    """
    tested = [welch(arm, baseline, alpha=alpha, margin=smallest_effect) for arm in arms]
    family = adjust(tested, alpha=alpha)
    return family, decide(family.difference, family.p_holm, family.p_equivalence_holm, alpha=alpha)


def standing(sides: Sequence[Arm], terms: Terms) -> Standing:
    """What a contrast of these arms may claim; noise can be borrowed for a pair."""
    barred = _reason(sides, terms.not_comparable) or ("" if terms.force_exploratory else _unequal(sides))
    unstable, where, conditional = _failures(sides)
    fewest = min(side.n for side in sides)
    few = fewest < FEWEST
    lent = terms.noise is not None and terms.noise.lends and len(sides) == 2
    borrow = few and lent and fewest > 0
    still = not few and all(bool(no_spread(side.array)) for side in sides)
    late = terms.late.get((sides[0].name, sides[-1].name), "") if len(sides) == 2 else ""
    return Standing(
        not_comparable=barred,
        unstable=unstable,
        where=where,
        conditional=conditional,
        exploratory=_exploratory(sides, terms, few=few, borrow=borrow, still=still) or late,
        borrow=borrow,
        testable=not (barred or late) and (not unstable or conditional) and (not few or borrow) and not still,
    )


def _failures(sides: Sequence[Arm]) -> tuple[str, str, bool]:
    """(the word, in which arms, whether so few failed that the survivors may be judged); ("", "", True) for none."""
    broken = [side for side in sides if side.failed]
    if not broken:
        return "", "", True
    counts = [f"({side.failed} of {side.failed + side.n} failed)" for side in broken]
    others = (f"{count} in {side.name}" for count, side in zip(counts[1:], broken[1:], strict=True))
    where = words.listed([broken[0].name, *others])
    return f"unstable {counts[0]}", where, all(s.failed <= MOST_FAILED * (s.failed + s.n) for s in broken)


def _exploratory(sides: Sequence[Arm], terms: Terms, *, few: bool, borrow: bool, still: bool) -> str:
    empty = [side.name for side in sides if not side.n and not side.failed]
    if empty:
        return f"no value for {words.listed(empty)}"
    if terms.screen:
        return "a screen, to be confirmed on fresh seeds"
    declared = _reason(sides, terms.exploratory)
    unequal = _unequal(sides)
    if declared or unequal:
        return declared or f"not comparable: {unequal}"
    waiting = [side for side in sides if side.missing]
    if waiting:
        return words.listed(f"{words.plural(s.missing, 'run')} of {s.name} without a value" for s in waiting)
    if few and not borrow:
        poor = terms.noise is not None and not terms.noise.lends
        lent = f", and the noise floor rests on fewer than {FEWEST_LENT} repeats" if poor else ""
        return f"fewer than {FEWEST} seeds{lent}"
    return "no spread between seeds, hence no noise to judge by" if still else ""


def _unequal(sides: Sequence[Arm]) -> str:
    """How the lengths of training differ; "" where they do not, or are not known."""
    ends = [(side.name, side.end) for side in sides if side.end is not None]
    differing = [(name, end) for name, end in ends if end != ends[-1][1]]
    if not differing:
        return ""
    (name, end), (other, other_end) = differing[0], ends[-1]
    whose = "its runs" if len(sides) == 2 else f"the runs of {name}"
    return f"{whose} end at step {end:.15g}, those of {other} at {other_end:.15g}"


def _reason(sides: Sequence[Arm], reasons: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(reasons[side.name] for side in sides if reasons.get(side.name)))


def as_json(value: Any) -> Any:
    """Plain data for a JSON file: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value
