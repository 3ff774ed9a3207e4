"""Evaluates the trials of a search: the best value of each setting, and comparability.

Only final values are points of the curve. A pruned trial has none: an edge beyond which trials were pruned is marked as
unfinished. A diverged trial bounds the best setting on its side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpt2lab.analysis.parabola import Curve, ParabolaFit, fit, scaled, unscaled
from gpt2lab.analysis.statistics import Array
from gpt2lab.analysis.wording import decimals, figure, listed
from gpt2lab.basics.text import plural
from gpt2lab.records import SearchRecord, TrialRecord, best_trial

WIDER = 4.0
"""A widened space extends by this factor beyond the best trial (two octaves)."""
RESULTS = ("finished", "pruned", "diverged")
"""Outcomes that count towards the budget of a search."""
OPEN = ("waiting", "running")
ENDS = {"low": ("lower", "below"), "high": ("upper", "above")}
NAMES = {"optim.lr": "learning rate", "optim.weight_decay": "weight decay"}
"""Settings that have a name in prose; others go by their key."""

Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best value of one setting, from trials. Unknown fields are None, and `reason` says why."""

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
    """its result"""
    curve: Curve | None = None
    """through the trials near the best; of minus the value with `maximize` (`line` undoes that)"""
    interval: Pair | None = None
    """95 % interval of the best setting"""
    flat: Pair | None = None
    """range with a loss of less than `effect`, by the curve, or by lines between trials where there is none"""
    flat_open: tuple[bool, bool] = (False, False)
    """whether `flat` ends on that side for lack of trials beyond"""
    edge: str | None = None
    """`low` or `high`: the side without a worse trial, beyond which the optimum may lie"""
    unfinished: str | None = None
    """`low` or `high`: the side that is bounded by pruned trials only"""
    widen: Pair | None = None
    """a space that extends beyond the edge"""
    reason: str = ""

    @property
    def vertex(self) -> float | None:
        """The minimum of the fitted curve."""
        return self.curve.at if self.curve else None

    def line(self, count: int = 101) -> tuple[Array, Array] | None:
        """The curve between the fitted trials, for figures.  -> (count,) settings, values"""
        if self.curve is None:
            return None
        x, y = self.curve.line(count)
        return x, -y if self.maximize else y

    def __str__(self) -> str:
        """The sentences that a page opens with."""
        if self.best is None or self.value is None:
            return self._nothing()
        sd = self.curve.sd if self.curve else math.nan
        reached = f"{self.value:.{decimals(sd, self.value)}f} {self.unit}"
        sentences = [
            self._at_edge() if self.edge else self._inside(),
            f"The best trial took {figure(self.best)} and reached {reached}.",
        ]
        if self.unfinished:
            side = ENDS[self.unfinished][1].capitalize()
            sentences.append(f"{side} it, trials were stopped early, so what they would have reached is open.")
        return " ".join(sentences)

    def _nothing(self) -> str:
        ended = [(self.diverged, "diverged"), (self.pruned, "stopped early")]
        counts = [f"{plural(count, 'trial')} {word}" for count, word in ended if count]
        if not counts:
            return "No trial finished."
        lower = f": everything from {figure(self.low)} to {figure(self.high)} that was tried is too much"
        return f"No trial finished: {', '.join(counts)}" + (f"{lower}." if self.diverged and not self.pruned else ".")

    def _at_edge(self) -> str:
        assert self.edge and self.best is not None
        side, beyond = ENDS[self.edge]
        text = f"The optimum lies at the {side} edge ({figure(self.best)}): "
        if self.widen is None:
            return text + f"nothing was tried {beyond} it; add trials there."
        return text + f"widen to {figure(self.widen[1] if self.edge == 'high' else self.widen[0])}."

    def _inside(self) -> str:
        flat = self._flat_range()
        if self.vertex is None:
            return f"Best {self.what} {figure(self.best)}, of those that were tried{flat}. No curve: {self.reason}."
        if self.interval is None:
            return f"Best {self.what} about {figure(self.vertex)}{flat}. No interval: {self.reason}."
        low, high = map(figure, self.interval)
        return f"Best {self.what} {figure(self.vertex)} (95 % interval {low} to {high}){flat}."

    def _flat_range(self) -> str:
        if self.flat is None or self.effect is None:
            return ""
        low, high = map(figure, self.flat)
        far = " at least" if any(self.flat_open) else ""
        return f"; within {low} to {high}{far} one loses less than {self.effect:g} {self.unit}"


def optimum(
    points: Iterable[Pair], *, low: float, high: float, log: bool, effect: float | None = None,
    noise_sd: float | None = None, pruned: Sequence[float] = (), maximize: bool = False,
    alone: bool = True, what: str = "learning rate", unit: str = "nats",
) -> Optimum:  # fmt: skip
    """The best value of a setting that was searched between `low` and `high`.

    `points` are (setting, final value), not finite where the trial diverged; `pruned` the settings of trials that were
    stopped early. `effect` is the smallest difference that matters, `noise_sd` the standard deviation of a trial's
    value over seeds, estimated from the trials unless given. Where other settings vary too (not `alone`), no curve is
    fitted, and edges are judged by the best trial.
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
    fitted = (
        fit(x, y, log=log, effect=effect, noise_sd=noise_sd) if alone else ParabolaFit(reason="other settings vary too")
    )
    best = float(x[np.argmin(y)])
    judged = np.concatenate([x, diverged])
    edge, unfinished = _edge(best, fitted, judged, stopped, natural=low if low == 0 and not log else -math.inf)
    flat, flat_open = _flat(x, y, diverged, fitted.curve, effect if alone else None, log)
    return replace(
        answer, best=best, value=float(tried[fine, 1][np.argmin(y)]), curve=fitted.curve,
        interval=None if edge else fitted.interval, flat=flat, flat_open=flat_open, edge=edge, unfinished=unfinished,
        widen=_wider(edge, best, low, high, log), reason="it lies at an edge" if edge else fitted.reason,
    )  # fmt: skip


def _edge(
    best: float, fitted: ParabolaFit, judged: Array, stopped: Array, *, natural: float
) -> tuple[str | None, str | None]:
    """(side without a trial beyond the best, side bounded by pruned trials only).

    `judged`: settings that finished or diverged. Where only one value was tried, the edge is `high`.
    """
    unfinished = None
    ends = {"low": best, "high": best} | ({fitted.falls: fitted.end} if fitted.falls and fitted.end is not None else {})
    for side in ("high", "low"):
        sign, end = (1, ends[side]) if side == "high" else (-1, ends[side])
        if (sign * judged > sign * end).any() or (side == "low" and end <= natural):
            continue
        if not (sign * stopped > sign * end).any():
            return side, None
        unfinished = side
    return None, unfinished


def _wider(edge: str | None, best: float, low: float, high: float, log: bool) -> Pair | None:
    """A space that extends well beyond the best trial; None where the searched one already does."""
    if edge == "high":
        top = best * WIDER if log else best + (high - low) / 2
        return (low, top) if top > high else None
    bottom = best / WIDER if log else best - (high - low) / 2
    bottom = max(bottom, 0.0) if low >= 0 else bottom
    return (bottom, high) if edge == "low" and bottom < low else None


def _flat(
    x: Array, y: Array, diverged: Array, curve: Curve | None, effect: float | None, log: bool
) -> tuple[Pair | None, tuple[bool, bool]]:
    """The range with a loss of less than `effect`, and whether it ends for lack of trials; see `Optimum`."""
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

    def crossing(step: int, last: int) -> float:
        over = next((i for i in range(best + step, last, step) if y[i] > limit), None)
        if over is None:
            return step * math.inf
        return float(np.interp(limit, (y[over - step], y[over]), (t[over - step], t[over])))

    return crossing(-1, -1), crossing(1, len(t))


def averaged(t: Array, y: Array) -> tuple[Array, Array]:
    """Distinct t, rising, with the mean of their y."""
    distinct, places = np.unique(t, return_inverse=True)
    return distinct, np.bincount(places, weights=y, minlength=len(distinct)) / np.maximum(np.bincount(places), 1)


@dataclass(frozen=True)
class Chosen:
    """The best trial of a search, and its limitations."""

    best: TrialRecord | None
    """None where none finished"""
    edge: Mapping[str, str]
    """numeric setting -> `low` or `high`, where the best trial is the outermost one on that side"""
    optima: Mapping[str, Optimum]
    """of each numeric setting; with a curve only where the search has a single setting"""
    reason: str | None
    """why this search cannot be compared with another, or None"""


def chosen(
    search: SearchRecord, direction: str = "minimize", *, count: int | None = None, effect: float | None = None,
    noise_sd: float | None = None, unit: str = "nats",
) -> Chosen:  # fmt: skip
    """The best finished trial, the optimum of each numeric setting, and whether the search may be compared.

    `count` is the number of trials that the search has in all; without it, those in the record.
    """
    trials = search.trials
    best = best_trial(trials, direction)
    optima = {}
    for dimension in search.space:
        name = dimension.name
        if dimension.low is None or dimension.high is None or (best and name not in best.settings):
            continue
        having = [t for t in trials if name in t.settings]
        at = {outcome: [t for t in having if t.outcome == outcome] for outcome in RESULTS}
        points = [(t.settings[name], t.value) for t in at["finished"] if t.value is not None]
        optima[name] = optimum(
            [*points, *((t.settings[name], math.inf) for t in at["diverged"])],
            low=dimension.low, high=dimension.high, log=dimension.log, effect=effect,
            noise_sd=noise_sd, pruned=[t.settings[name] for t in at["pruned"]], maximize=direction == "maximize",
            alone=len(search.space) == 1, what=NAMES.get(name, name), unit=unit,
        )  # fmt: skip
    edges = {name: o.edge for name, o in optima.items() if o.edge}
    at_edge = [o for o in optima.values() if o.edge]
    return Chosen(best, edges, optima, _refusal(trials, count or len(trials), best is not None, at_edge))


def _refusal(trials: Sequence[TrialRecord], count: int, any_finished: bool, edges: Sequence[Optimum]) -> str | None:
    """Why the search is not comparable, or None."""
    ended = sum(t.outcome not in OPEN for t in trials)
    if ended < count:
        return f"{count - ended} of {plural(count, 'trial')} of its search have not ended"
    if not any_finished:
        return "no trial of its search finished"
    parts = [f"its best {o.what} lies at the {ENDS[str(o.edge)][0]} edge ({figure(o.best)})" for o in edges]
    return listed(parts) if parts else None
