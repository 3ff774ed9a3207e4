"""Differences in a task: all runs answer the same questions, so a difference depends on seeds and on questions.

Two levels: `seeds` is how far the difference would move with other seeds, `questions` with other questions of the kind.
Both parts make up the interval, so that it holds for new seeds and new questions. Without several runs per arm it is
about questions alone.

Shapes: n_A and n_B runs of two arms, I questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from gpt2lab.analysis.statistics import Comparison, holm, welch
from gpt2lab.analysis.verdicts import FEWEST, as_json

ALPHA = 0.05
SMALLEST = 1e-12
"""Levels below are not computed."""


@dataclass(frozen=True)
class ItemComparison:
    """One arm minus another over the questions of a task."""

    difference: float
    seeds: Comparison | None
    """of the runs' means; None with a single run in an arm, whose noise is then unknown"""
    questions_se: float
    """standard error over questions, without what seeds contribute to it"""
    questions: int

    def halfwidths(self, level: float) -> tuple[float, float]:
        """Half the width of the 1 - level interval by seeds alone, and by questions alone."""
        by_seeds = 0.0
        if self.seeds is not None and not math.isnan(float(self.seeds.se)):
            by_seeds = float(self.seeds.critical(level) * self.seeds.se)
        return by_seeds, -float(scipy.special.stdtrit(self.questions - 1, level / 2)) * self.questions_se

    def halfwidth(self, level: float) -> float:
        """Of the interval: both parts are independent, so squares of half-widths add up (Zou and Donner 2008,
        Statistics in Medicine 27:1693)."""
        return math.hypot(*self.halfwidths(level))

    def p(self, value: float = 0.0) -> float:
        """Two-sided p of "the true difference is `value`": the level at which the interval ends there."""
        distance = abs(self.difference - value)
        if not self.halfwidth(0.5) > 0:
            return math.nan
        if distance <= self.halfwidth(1 - SMALLEST):
            return 1.0
        if distance >= self.halfwidth(SMALLEST):
            return SMALLEST
        ends = math.log(SMALLEST), math.log1p(-SMALLEST)
        return math.exp(scipy.optimize.brentq(lambda log: self.halfwidth(math.exp(log)) - distance, *ends))

    def p_equivalence(self, margin: float) -> float:
        """p of "the difference is at least as large as the margin" (two one-sided tests)."""
        if abs(self.difference) >= margin:
            return 1.0
        return max(self.p(-margin), self.p(margin)) / 2


def over_items(arm: ArrayLike, against: ArrayLike) -> ItemComparison:
    """The difference of mean scores.  (n_A, I), (n_B, I) -> over the same questions in the same order.

    Of the variance over questions of the difference in each, the part that seeds cause (a question answered otherwise
    by another run, the interaction) is in the runs' means already, and is subtracted.
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (arm, against))
    if a.shape[1] != b.shape[1] or a.shape[1] < 2:
        raise ValueError("both arms need the same questions, two or more")
    count = a.shape[1]
    difference = a.mean(0) - b.mean(0)  # (I,)
    variance = float(difference.var(ddof=1)) / count
    several = min(len(a), len(b)) > 1
    if several:
        for scores in (a, b):
            n = len(scores)
            residual = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
            variance -= float(np.square(residual).sum()) / ((n - 1) * (count - 1)) / (n * count)
    seeds = welch(a.mean(1), b.mean(1)) if several else None
    return ItemComparison(float(difference.mean()), seeds, math.sqrt(max(variance, 0.0)), count)


@dataclass(frozen=True, kw_only=True)
class TaskContrast:
    """One judged contrast in one measure of a task."""

    task: str
    """`hellaswag/acc_norm`"""
    arm: str
    against: str
    difference: float
    low: float
    high: float
    """adjusted for the family by Bonferroni's method, so that all intervals hold together"""
    p_holm: float
    halfwidths: dict[str, float] = field(default_factory=dict)
    """of the interval by each source alone: `seeds` (without it training noise is unknown), `questions`"""
    runs: tuple[int, int] = (1, 1)
    questions: int = 0
    word: str = ""
    """a verdict word; "" where nothing may be claimed"""
    reason: str = ""
    """why it is exploratory"""

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are null."""
        plain: dict[str, Any] = as_json(asdict(self))
        return plain

    def __str__(self) -> str:
        from gpt2lab.analysis.wording import interval, listed, probability, written

        value = written([self.difference], self.low, self.high)[0]
        verdict = self.word or f"exploratory ({self.reason})"
        n = f"n = {self.runs[0]}, {self.runs[1]}; " if "seeds" in self.halfwidths else ""
        parts = listed(f"±{width:.2g} by {name}" for name, width in self.halfwidths.items())
        p = f", Holm p {probability(self.p_holm, ALPHA)}" if self.word else ""
        return (
            f"{self.task}, {self.arm} against {self.against}: {verdict}, {value} {interval(self.low, self.high)}{p} "
            f"({n}{self.questions:,} questions; {parts})"
        )


Scores = tuple[str, str, str, ArrayLike, ArrayLike]
"""(task/measure, arm, against, scores (n_A, I) of the arm, (n_B, I) of the other)"""

WITHOUT_SEEDS = "one run each: training noise is not in the interval, and may be larger than the difference"


def judge_items(
    family: Sequence[Scores], *, smallest_effect: float | None, reasons: Sequence[str] = ()
) -> list[TaskContrast]:
    """The contrasts in all measures as one family, higher scores being better.

    smallest_effect: X in the unit of the scores; without one nothing is called "no difference". reasons: why a contrast
    is exploratory, "" where it is not; one with fewer than FEWEST runs in an arm is in any case.
    """
    from gpt2lab.analysis.judging import decide
    from gpt2lab.analysis.wording import worded

    compared = [over_items(a, b) for *_, a, b in family]
    p = holm([c.p() for c in compared])
    same = holm([c.p_equivalence(smallest_effect) if smallest_effect else 1.0 for c in compared])
    level, judged = ALPHA / max(1, len(compared)), []
    for i, ((task, arm, against, a, b), found) in enumerate(zip(family, compared, strict=True)):
        runs = len(np.atleast_2d(a)), len(np.atleast_2d(b))
        why = reasons[i] if reasons else ""
        if min(runs) < FEWEST:
            why = why or (WITHOUT_SEEDS if min(runs) == 1 else f"fewer than {FEWEST} seeds")
        if math.isnan(p[i]):
            why = why or "no spread between runs or questions, hence no noise to judge by"
        word = str(decide(found.difference, p[i], same[i], alpha=ALPHA, higher_is_better=True))
        half, widths = found.halfwidth(level), dict(zip(("seeds", "questions"), found.halfwidths(level), strict=True))
        if found.seeds is None:
            del widths["seeds"]
        judged.append(TaskContrast(
            task=task, arm=arm, against=against, difference=found.difference, low=found.difference - half,
            high=found.difference + half, p_holm=float(p[i]), halfwidths=widths, runs=runs, questions=found.questions,
            word="" if why else worded(word, smallest_effect or 0.0), reason=why,
        ))  # fmt: skip
    return judged
