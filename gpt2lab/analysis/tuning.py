"""The answer of a search over one setting: its best value, how surely, how far one may be off, and where to look next.

Only final values are points of the curve. A pruned trial has none; it shows that somebody looked there, and closes an
edge with that reservation. A diverged trial closes the side on which it lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpt2lab.analysis.parabola import Curve, Fit, fit, scaled, unscaled
from gpt2lab.analysis.statistics import Array
from gpt2lab.analysis.words import decimals, plural

WIDER = 4.0
"""An edge is closed by a space that reaches this factor beyond the best trial (two octaves)."""
SPAN = 0.75
"""Of the range over which a sensitivity is asked, what the trials must span on its logarithmic scale."""
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """What the trials say of the best value of one setting. What is not known is None, and `reason` says why."""

    what: str
    unit: str
    low: float
    high: float
    log: bool
    maximize: bool
    effect: float | None
    """the smallest difference that matters"""
    finished: int
    diverged: int
    pruned: int
    best: float | None = None
    """the setting of the best trial; None where none finished"""
    value: float | None = None
    """what it reached"""
    curve: Curve | None = None
    """through the trials near the best; of minus the value with `maximize` (`line` has it as it is)"""
    interval: Pair | None = None
    """95 % interval of the best setting"""
    flat: Pair | None = None
    """between these one loses less than `effect`, by the curve, or by lines between trials where there is none"""
    flat_open: tuple[bool, bool] = (False, False)
    """whether `flat` ends on that side only because nothing was tried beyond"""
    edge: str | None = None
    """`low` or `high`: the side on which nothing worse was seen, so that the optimum may lie beyond"""
    unfinished: str | None = None
    """`low` or `high`: the side that is closed by pruned trials alone"""
    widen: Pair | None = None
    """a space that reaches beyond the edge"""
    reason: str = ""

    @property
    def vertex(self) -> float | None:
        """Where the fitted curve is best."""
        return self.curve.at if self.curve else None

    @property
    def factor(self) -> float | None:
        """By which factor one may miss the best setting either way and lose less than `effect`; None without `log`."""
        at = self.vertex or self.best
        if not self.log or self.flat is None or at is None:
            return None
        return min(at / self.flat[0], self.flat[1] / at)

    def line(self, count: int = 101) -> tuple[Array, Array] | None:
        """The fitted curve between the trials that it was fitted to, for figures.  -> (count,) settings, values"""
        if self.curve is None:
            return None
        x, y = self.curve.line(count)
        return x, -y if self.maximize else y

    def told(self) -> str:
        """The sentences that a page opens with."""
        if self.best is None or self.value is None:
            return self._told_nothing()
        sentences = [self._told_edge() if self.edge else self._told_best(), self._told_trial()]
        if self.unfinished:
            side = "above" if self.unfinished == "high" else "below"
            sentences.append(
                f"{side.capitalize()} it, trials were stopped early, so what they would have reached is open."
            )
        return " ".join(sentences)

    __str__ = told

    def _told_nothing(self) -> str:
        ended = [(self.diverged, "diverged"), (self.pruned, "stopped early")]
        counts = [f"{plural(count, 'trial')} {word}" for count, word in ended if count]
        if not counts:
            return "No trial finished."
        lower = f": everything from {figure(self.low)} to {figure(self.high)} that was tried is too much"
        return f"No trial finished: {', '.join(counts)}" + (f"{lower}." if self.diverged and not self.pruned else ".")

    def _told_edge(self) -> str:
        assert self.edge and self.best is not None
        side, beyond = ("upper", "above") if self.edge == "high" else ("lower", "below")
        text = f"The optimum lies at the {side} edge ({figure(self.best)}): "
        if self.widen is None:
            return text + f"nothing was tried {beyond} it; add trials there."
        return text + f"widen to {figure(self.widen[1] if self.edge == 'high' else self.widen[0])}."

    def _told_best(self) -> str:
        flat = self._told_flat()
        if self.vertex is None:
            return f"Best {self.what} {figure(self.best)}, of those that were tried{flat}. No curve: {self.reason}."
        if self.interval is None:
            return f"Best {self.what} about {figure(self.vertex)}{flat}. No interval: {self.reason}."
        low, high = map(figure, self.interval)
        return f"Best {self.what} {figure(self.vertex)} (95 % interval {low} to {high}){flat}."

    def _told_flat(self) -> str:
        if self.flat is None or self.effect is None:
            return ""
        low, high = map(figure, self.flat)
        far = " at least" if any(self.flat_open) else ""
        return f"; within {low} to {high}{far} one loses less than {self.effect:g} {self.unit}"

    def _told_trial(self) -> str:
        assert self.value is not None
        sd = self.curve.sd if self.curve else math.nan
        reached = f"{self.value:.{decimals(sd, self.value)}f} {self.unit}"
        return f"The best trial took {figure(self.best)} and reached {reached}."


def optimum(
    points: Iterable[Pair], *, low: float, high: float, log: bool, effect: float | None = None,
    noise_sd: float | None = None, pruned: Sequence[float] = (), maximize: bool = False,
    alone: bool = True, what: str = "learning rate", unit: str = "nats",
) -> Optimum:  # fmt: skip
    """The best value of a setting that was searched between `low` and `high`.

    `points` are (setting, final value), not finite where the trial diverged; `pruned` the settings of trials that were
    stopped early. `effect` is the smallest difference that matters, `noise_sd` the standard deviation of a trial's
    value over seeds where that is known; else the trials must show it. Where other settings vary too (not `alone`), no
    curve is fitted, and edges go by the place of the best trial.
    """
    tried = np.array([*points], dtype=np.float64).reshape(-1, 2)
    fine = np.isfinite(tried[:, 1])
    x, y = tried[fine, 0], tried[fine, 1] * (-1 if maximize else 1)
    diverged, stopped = tried[~fine, 0], np.asarray(pruned, dtype=np.float64)
    answer = Optimum(
        what=what, unit=unit, low=low, high=high, log=log, maximize=maximize, effect=effect, finished=len(x),
        diverged=len(diverged), pruned=len(stopped), reason="no trial finished",
    )  # fmt: skip
    if not len(x):
        return answer
    found = fit(x, y, log=log, effect=effect, noise_sd=noise_sd) if alone else Fit(reason="other settings vary too")
    best = float(x[np.argmin(y)])
    judged = np.concatenate([x, diverged])
    edge, unfinished = _edge(best, found, judged, stopped, natural=low if low == 0 and not log else -math.inf)
    flat, flat_open = _flat(x, y, diverged, found.curve, effect if alone else None, log)
    return replace(
        answer, best=best, value=float(tried[fine, 1][np.argmin(y)]), curve=found.curve,
        interval=None if edge else found.interval, flat=flat, flat_open=flat_open, edge=edge, unfinished=unfinished,
        widen=_wider(edge, best, low, high, log), reason="it lies at an edge" if edge else found.reason,
    )  # fmt: skip


def _edge(best: float, found: Fit, judged: Array, stopped: Array, *, natural: float) -> tuple[str | None, str | None]:
    """(side on which nothing was seen beyond the best, side that is closed by trials that were stopped early alone).

    `judged`: settings that finished or diverged. Where one value alone was tried, the edge is `high`.
    """
    unfinished = None
    ends = {"low": best, "high": best} | ({found.falls: found.end} if found.falls and found.end is not None else {})
    for side in ("high", "low"):
        sign, end = (1, ends[side]) if side == "high" else (-1, ends[side])
        if (sign * judged > sign * end).any() or (side == "low" and end <= natural):
            continue
        if not (sign * stopped > sign * end).any():
            return side, None
        unfinished = side
    return None, unfinished


def _wider(edge: str | None, best: float, low: float, high: float, log: bool) -> Pair | None:
    """A space that reaches well beyond the best trial; None where the searched one does already."""
    if edge is None:
        return None
    if edge == "high":
        top = best * WIDER if log else best + (high - low) / 2
        return (low, top) if top > high else None
    bottom = best / WIDER if log else best - (high - low) / 2
    bottom = max(bottom, 0.0) if low >= 0 else bottom
    return (bottom, high) if bottom < low else None


def _flat(
    x: Array, y: Array, diverged: Array, curve: Curve | None, effect: float | None, log: bool
) -> tuple[Pair | None, tuple[bool, bool]]:
    """Between which settings one loses less than `effect`, and whether it ends for want of trials; see `Optimum`."""
    best = float(x[np.argmin(y)])
    top = diverged[diverged > best].min(initial=math.inf)
    bottom = diverged[diverged < best].max(initial=-math.inf)
    usable = (x > bottom) & (x < top)
    t, values = averaged(scaled(x[usable], log), y[usable])
    if effect is None or len(t) < 3:
        return None, (False, False)
    first, last = (float(v) for v in unscaled(t[[0, -1]], log))
    if curve is not None:
        low, high = curve.within_loss(effect)
    else:
        low, high = (float(v) for v in unscaled(np.array(_crossings(t, values, effect)), log))
    ends = (low < first and math.isinf(bottom), high > last and math.isinf(top))
    return (max(low, first), min(high, last)), ends


def _crossings(t: Array, y: Array, effect: float) -> Pair:
    """Where lines through (t, y), t rising, first lie `effect` above their lowest; infinite where they never do."""
    best, limit = int(np.argmin(y)), float(y.min() + effect)
    found = []
    for side in (range(best, 0, -1), range(best, len(t) - 1)):
        step = side.step
        over = next((i + step for i in side if y[i + step] > limit), None)
        if over is None:
            found.append(step * math.inf)
        else:
            found.append(float(np.interp(limit, (y[over - step], y[over]), (t[over - step], t[over]))))
    return found[0], found[1]


def sensitivity(points: Iterable[Pair], low: float, high: float, init_loss: float) -> float | None:
    """Learning-rate sensitivity: what is lost on average over rates from `low` to `high` against the best of them.

    The mean of min(loss, loss at init) over log-uniform rates, minus the lowest loss (Wortsman et al. 2023,
    arXiv:2309.14322, who average over a grid of rates). For scattered trials, the losses are joined by straight lines
    over the logarithm of the rate: those at one rate are averaged first, a diverged one counts as the loss at init, and
    beyond the outermost trials their loss is held. None with fewer than three rates in the range, none of them finite,
    or where they span less than three quarters of it. Pruned trials have no final loss: after pruning, bad rates are
    missing, and the number is then too small or None.
    """
    tried = np.array([*points], dtype=np.float64).reshape(-1, 2)
    tried = tried[(tried[:, 0] >= low) & (tried[:, 0] <= high)]
    losses = np.minimum(np.where(np.isfinite(tried[:, 1]), tried[:, 1], init_loss), init_loss)
    t, y = averaged(np.log2(tried[:, 0]), losses)
    ends = (math.log2(low), math.log2(high))
    if len(t) < 3 or not np.isfinite(tried[:, 1]).any() or np.ptp(t) < SPAN * (ends[1] - ends[0]):
        return None
    knots = np.union1d(t, ends)
    return float(np.trapezoid(np.interp(knots, t, y), knots) / (ends[1] - ends[0]) - y.min())


def averaged(t: Array, y: Array) -> tuple[Array, Array]:
    """Distinct t, rising, with the mean of their y."""
    distinct, places = np.unique(t, return_inverse=True)
    return distinct, np.bincount(places, weights=y, minlength=len(distinct)) / np.maximum(np.bincount(places), 1)


def figure(x: float | None) -> str:
    """A setting as people write it: two significant digits, three from 100 on."""
    assert x is not None
    return np.format_float_positional(x, precision=3 if abs(x) >= 100 else 2, fractional=False, trim="-")
