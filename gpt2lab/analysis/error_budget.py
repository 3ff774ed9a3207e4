"""What the interval of a contrast is made of, and what would narrow it most for its training time.

Three sources add to it: few seeds, a coarse search of the learning rate, and the validation text. More seeds do not
help against the other two, so each is shown by itself, with what a next step would bring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from gpt2lab.analysis.best_rate import OwnBest, WeightedArm, closer
from gpt2lab.analysis.calibration import degrees, nominal_level
from gpt2lab.analysis.words import plural


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that could be done next for a contrast. `seconds` of training, all arms of it together."""

    what: str
    halfwidth: float
    """of the contrast's interval afterwards, if the spreads and the curves are as they look now"""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ErrorBudget:
    """Half the width of the interval as it is, by source (see Contrast.halfwidths), and the possible next steps."""

    halfwidth: float
    sources: Mapping[str, float]
    steps: Sequence[Step]

    @property
    def best(self) -> Step | None:
        """The step that narrows the interval most per second; None where nothing does."""
        timed = [step for step in self.steps if step.seconds > 0]
        useful = [((1 - step.halfwidth / self.halfwidth) / step.seconds, step) for step in timed]
        useful = [(gain, step) for gain, step in useful if gain > 0]
        return max(useful, key=lambda item: item[0])[1] if useful else None

    def told(self) -> str:
        """The best next step as a sentence without a stop; "" where the validation text is the largest source."""
        if self.sources.get("text", 0.0) > self.halfwidth:
            return "more validation text (`evaluation.tokens`): it is the largest part and costs no training"
        step = self.best
        if step is None:
            return ""
        return f"{step.what}: {100 * (1 - step.halfwidth / self.halfwidth):.0f} % narrower for {_time(step.seconds)}"


def error_budget(
    arms: Sequence[WeightedArm], sources: Mapping[str, float], seconds: Sequence[float], *, level: float,
    more: int = 1, next_level: float | None = None,
) -> ErrorBudget:  # fmt: skip
    """The budget of one contrast whose interval stands at 1 - level.

    seconds: of one run of each arm. more: seeds that the next look adds to every arm, judged at `next_level`; with no
    seeds to add there is no such step.
    """
    now = _halfwidth(arms, [len(arm.losses) for arm in arms], level)
    grown = [len(arm.losses) + more for arm in arms]
    after = _halfwidth(arms, grown, next_level or level) if more else now
    steps = [Step(what=f"{plural(more, 'more seed')} per arm", halfwidth=after, seconds=more * sum(seconds))]
    searched = [(arm, each) for arm, each in zip(arms, seconds, strict=True) if arm.search]
    if searched:
        finer = [replace(arm, search=closer(arm)) if arm.search else arm for arm in arms]
        after = _halfwidth(finer, [len(arm.losses) for arm in arms], level)
        what = "rates between the best one and its neighbours"
        steps.append(Step(what=what, halfwidth=after, seconds=2 * sum(each for _, each in searched)))
    return ErrorBudget(halfwidth=now, sources=sources, steps=steps)


def _halfwidth(arms: Sequence[WeightedArm], sizes: Sequence[int], level: float) -> float:
    """Of the interval with so many seeds per arm, their spreads as they are."""
    parts = np.array([a.weight**2 * a.losses.var(ddof=1) / n for a, n in zip(arms, sizes, strict=True)])
    if not parts.sum() > 0:
        return math.nan
    df = degrees(parts / parts.sum(), sizes)
    critical = float(-special.stdtrit(df, nominal_level(level, sizes) / 2))
    half = critical * math.sqrt(parts.sum())
    if not any(arm.search for arm in arms):
        return half
    low, high = OwnBest(arms, sizes).interval(critical)
    return max(half, (high - low) / 2)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s of training"
    return f"{seconds / 60:.0f} minutes of training" if seconds < 5400 else f"{seconds / 3600:.1f} hours of training"
