"""How the best value of a setting moves with the size of the model, and what that says of the next size.

A straight line of the logarithm of the optimum over that of the parameters, each size weighted by its own interval. A
power law is taken for granted: with two sizes nothing could speak against it, with three hardly anything. So up to
three sizes, the intervals tell how sure the line is if the optima follow a power law; from four on, the scatter of the
sizes around the line counts too, with Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gpt2lab.analysis.statistics import Array
from gpt2lab.analysis.tuning import Pair, figure
from gpt2lab.text import quantity

ALPHA = 0.05
TESTED = 4
"""Sizes from which on their scatter around the line is told from that of each size."""
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A power law of the best value over parameters. What is not known is None, and `reason` says why."""

    what: str
    sizes: tuple[float, ...]
    """the sizes it rests on, rising"""
    target: float | None = None
    """the size for which a value is predicted"""
    exponent: float | None = None
    exponent_interval: Pair | None = None
    at_target: float | None = None
    target_interval: Pair | None = None
    """95 % interval of the best value at `target`"""
    scatter: float | None = None
    """mean square of the sizes' distances from the line, in units of their own uncertainty; about 1 for a power law"""
    line: tuple[Array, Array] | None = None
    """from the smallest size to `target`, for figures"""
    reason: str = ""

    def told(self) -> str:
        """The sentences of a page."""
        if self.exponent is None or self.target is None:
            return f"How the best {self.what} moves with size cannot be told: {self.reason}."
        count = COUNTS.get(len(self.sizes), str(len(self.sizes)))
        verb = "falls" if self.exponent < 0 else "rises"
        text = f"Over {count} sizes the best {self.what} {verb} as N^{self.exponent:.2f}"
        goal = f"; for {quantity(self.target)} parameters it predicts {figure(self.at_target)}"
        if self.exponent_interval is None or self.target_interval is None:
            return f"{text}{goal}. No interval: {self.reason}."
        low, high = self.exponent_interval
        near, far = map(figure, self.target_interval)
        text += f" ({low:.2f} to {high:.2f}){goal} ({near} to {far})."
        if low < 0 < high:
            text += " It may as well not move."
        return text + self._told_doubt(count)

    __str__ = told

    def _told_doubt(self, count: str) -> str:
        if len(self.sizes) >= TESTED:
            return ""
        doubt = f" That takes a power law for granted, which {count} sizes "
        if len(self.sizes) == 2:
            return doubt + "cannot test; the intervals hold the uncertainty of each size alone."
        wider = stats.t.ppf(1 - ALPHA / 2, len(self.sizes) - 2) / stats.norm.ppf(1 - ALPHA / 2)
        return doubt + f"hardly test: an interval from their scatter would be {wider:.0f} times as wide."


def transfer(
    sizes: Sequence[float], optima: Sequence[float | None], intervals: Sequence[Pair | None], *,
    target: float | None = None, what: str = "learning rate",
) -> Transfer:  # fmt: skip
    """The line through the optima of models with `sizes` parameters, and its value at `target`.

    Without a target, the next size is as much larger than the last one as that is than the one before. Sizes without an
    optimum are left out, and so are those without an interval if two others have one; where fewer have, all count the
    same and no interval is given.
    """
    rows = sorted((s, o, i) for s, o, i in zip(sizes, optima, intervals, strict=True) if o is not None)
    weighed = [row for row in rows if row[2] is not None and row[2][0] < row[2][1]]
    known = len({row[0] for row in weighed}) >= 2
    used = weighed if known else rows
    found = tuple(float(size) for size, _, _ in used)
    if len(set(found)) < 2:
        return Transfer(what=what, sizes=found, reason="fewer than two sizes have an optimum that is not at an edge")
    goal = target if target is not None else found[-1] * found[-1] / max(s for s in found if s < found[-1])
    x, y = np.log(found), np.log([optimum for _, optimum, _ in used])
    width = 2 * float(stats.norm.ppf(1 - ALPHA / 2))
    se = np.array([math.log(i[1] / i[0]) / width if known and i else 1.0 for _, _, i in used])
    line = _Line(x, y, se)
    ends = np.geomspace(found[0], max(goal, found[-1]), 61)
    value = math.exp(line.at(math.log(goal)))
    drawn = (ends, np.exp(line.at(np.log(ends))))
    if not known:
        reason = "fewer than two sizes have an interval of their own"
        return Transfer(what=what, sizes=found, target=goal, exponent=line.slope, at_target=value, line=drawn,
                        reason=reason)  # fmt: skip
    spread = max(1.0, line.scatter) ** 0.5
    tested = len(found) >= TESTED
    quantile = spread * float(stats.t.ppf(1 - ALPHA / 2, len(found) - 2) if tested else stats.norm.ppf(1 - ALPHA / 2))
    half, far = quantile * line.slope_se, quantile * line.se_at(math.log(goal))
    return Transfer(
        what=what, sizes=found, target=goal, exponent=line.slope, at_target=value, line=drawn,
        exponent_interval=(line.slope - half, line.slope + half),
        target_interval=(value * math.exp(-far), value * math.exp(far)),
        scatter=line.scatter if len(found) > 2 else None,
    )  # fmt: skip


class _Line:
    """Least squares of y over x, weighted by known standard errors."""

    def __init__(self, x: Array, y: Array, se: Array) -> None:
        weights = se**-2.0
        total = weights.sum()
        self.middle, self.level = float((weights * x).sum() / total), float((weights * y).sum() / total)
        squares = float((weights * (x - self.middle) ** 2).sum())
        self.slope = float((weights * (x - self.middle) * (y - self.level)).sum() / squares)
        self.slope_se, self.level_se = squares**-0.5, float(total) ** -0.5
        self.scatter = float((weights * (y - self.at(x)) ** 2).sum()) / max(len(x) - 2, 1)

    def at(self, x: Array | float) -> Array:
        return np.asarray(self.level + self.slope * (np.asarray(x) - self.middle))

    def se_at(self, x: float) -> float:
        """Of the line; a size's own distance from it is not in it."""
        return math.hypot(self.level_se, self.slope_se * (x - self.middle))
