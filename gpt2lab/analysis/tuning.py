"""Evaluates the trials of a search: the best value of each setting, comparability, savings and risks of pruning.

Only final values are points of the curve. A pruned trial has none: an edge beyond which trials were pruned is marked as
unfinished. A diverged trial bounds the best setting on its side. A search, in a sweep record, has a `space` and
`trials` with outcome, settings and value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from gpt2lab.analysis.parabola import Curve, Fit, fit, scaled, unscaled
from gpt2lab.analysis.statistics import Array
from gpt2lab.analysis.wording import decimals, figure, listed
from gpt2lab.basics.text import plural, quantity

WIDER = 4.0
"""A widened space extends by this factor beyond the best trial (two octaves)."""
SPAN = 0.75
"""Share of the range of a sensitivity that the trials must span on its logarithmic scale."""
RESULTS = ("finished", "pruned", "diverged")
"""Outcomes that count towards the budget of a search."""
OPEN = ("waiting", "running")
ENDS = {"low": ("lower", "below"), "high": ("upper", "above")}
BEST_PART = 4
"""One in so many trials counts as the best part."""
NAMES = {"optim.lr": "learning rate", "optim.weight_decay": "weight decay"}
"""Settings that have a name in prose; others go by their key."""

Pair = tuple[float, float]
Search = Mapping[str, Any]
Trial = Mapping[str, Any]
Flags = NDArray[np.bool_]


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

    @property
    def factor(self) -> float | None:
        """The factor by which one may miss the best setting and lose less than `effect`; None without `log`."""
        at = self.vertex or self.best
        if not self.log or self.flat is None or at is None:
            return None
        return min(at / self.flat[0], self.flat[1] / at)

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
    fitted = fit(x, y, log=log, effect=effect, noise_sd=noise_sd) if alone else Fit(reason="other settings vary too")
    best = float(x[np.argmin(y)])
    judged = np.concatenate([x, diverged])
    edge, unfinished = _edge(best, fitted, judged, stopped, natural=low if low == 0 and not log else -math.inf)
    flat, flat_open = _flat(x, y, diverged, fitted.curve, effect if alone else None, log)
    return replace(
        answer, best=best, value=float(tried[fine, 1][np.argmin(y)]), curve=fitted.curve,
        interval=None if edge else fitted.interval, flat=flat, flat_open=flat_open, edge=edge, unfinished=unfinished,
        widen=_wider(edge, best, low, high, log), reason="it lies at an edge" if edge else fitted.reason,
    )  # fmt: skip


def _edge(best: float, fitted: Fit, judged: Array, stopped: Array, *, natural: float) -> tuple[str | None, str | None]:
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


def sensitivity(points: Iterable[Pair], low: float, high: float, init_loss: float) -> float | None:
    """Learning-rate sensitivity: the mean loss over rates from `low` to `high`, minus the lowest.

    The mean of min(loss, loss at init) over log-uniform rates, minus the lowest loss (Wortsman et al. 2023,
    arXiv:2309.14322, who average over a grid of rates). Losses are interpolated linearly over the logarithm of the
    rate: those at one rate are averaged first, a diverged one counts as the loss at init, and beyond the outermost
    trials the loss is constant. None with fewer than three rates in the range, without a finite one, or where they span
    less than three quarters of it. After pruning bad rates are missing, and the number is too small or None.
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


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The best trial of a search, and its limitations."""

    settings: Mapping[str, Any] | None
    """of the best finished trial; None where none finished"""
    value: float | None
    slot: int | None
    edge: Mapping[str, str]
    """numeric setting -> `low` or `high`, where the best trial is the outermost one on that side"""
    optima: Mapping[str, Optimum] = field(default_factory=dict)
    """of each numeric setting; with a curve only where the search has a single setting"""
    reason: str | None = None
    """why this search cannot be compared with another, or None"""


def ranked(trials: Iterable[Trial], *, maximize: bool = False) -> list[Trial]:
    """The finished trials with a value, the best first; of equals the lowest slot."""
    done = [trial for trial in trials if trial["outcome"] == "finished" and trial["value"] is not None]
    return sorted(done, key=lambda trial: (-trial["value"] if maximize else trial["value"], trial["slot"]))


def chosen(
    search: Search, *, maximize: bool = False, slots: int | None = None, effect: float | None = None,
    noise_sd: float | None = None, unit: str = "nats",
) -> Chosen:  # fmt: skip
    """The settings of the best finished trial (of equals the lowest slot), and whether they may be compared.

    `slots` is the number of trials that the sweep has in all; without it, those in the record.
    """
    trials = search["trials"]
    best = next(iter(ranked(trials, maximize=maximize)), None)
    optima = {}
    for dimension in search["space"]:
        name = dimension["name"]
        if dimension["kind"] == "categorical" or (best and name not in best["settings"]):
            continue
        having = [t for t in trials if name in t["settings"]]
        at = {outcome: [t for t in having if t["outcome"] == outcome] for outcome in RESULTS}
        points = [(t["settings"][name], t["value"]) for t in at["finished"] if t["value"] is not None]
        optima[name] = optimum(
            [*points, *((t["settings"][name], math.inf) for t in at["diverged"])],
            low=dimension["low"], high=dimension["high"], log=bool(dimension.get("log")), effect=effect,
            noise_sd=noise_sd, pruned=[t["settings"][name] for t in at["pruned"]], maximize=maximize,
            alone=len(search["space"]) == 1, what=NAMES.get(name, name), unit=unit,
        )  # fmt: skip
    edges = {name: o.edge for name, o in optima.items() if o.edge}
    return Chosen(
        settings=best["settings"] if best else None, value=best["value"] if best else None,
        slot=best["slot"] if best else None, edge=edges, optima=optima,
        reason=_refusal(trials, slots or len(trials), bool(best), [o for o in optima.values() if o.edge]),
    )  # fmt: skip


def _refusal(trials: Sequence[Trial], slots: int, any_finished: bool, edges: Sequence[Optimum]) -> str | None:
    """Why the search is not comparable, or None."""
    ended = sum(t["outcome"] not in OPEN for t in trials)
    if ended < slots:
        return f"{slots - ended} of {plural(slots, 'trial')} of its search have not ended"
    if not any_finished:
        return "no trial of its search finished"
    parts = [f"its best {o.what} lies at the {ENDS[str(o.edge)][0]} edge ({figure(o.best)})" for o in edges]
    return listed(parts) if parts else None


# Pruning: what it saved, and how often it would have cut the best trial.


def savings(trials: Iterable[Trial], tokens: float) -> str:
    """What was saved in a search whose bad trials were stopped early, from the trials of a sweep record; `tokens` of a
    full trial over all its seeds.

    A finished trial counts in full on both sides, even if its runs were reused, so that the share measures pruning
    alone. A diverged one counts with the tokens that it trained.
    """
    ended = [trial for trial in trials if trial["outcome"] in RESULTS]
    pruned = [trial["outcome"] == "pruned" for trial in ended]
    trained = [
        tokens if trial["outcome"] == "finished" else min(float(trial.get("tokens") or 0), tokens) for trial in ended
    ]
    full = sum(tokens if cut else used for cut, used in zip(pruned, trained, strict=True))
    if not full > 0:
        return "No trial has ended, so nothing was saved yet."
    if not any(pruned):
        return f"None of {plural(len(ended), 'trial')} was stopped early."
    return (
        f"{sum(pruned)} of {plural(len(ended), 'trial')} were stopped early: {quantity(sum(trained))} tokens were "
        f"trained where {quantity(full)} would have been, {100 * (1 - sum(trained) / full):.0f} % less."
    )


def audit(trials: Iterable[Trial], steps: int, *, maximize: bool = False) -> str | None:
    """Where pruning would have cut trials that all ran to their end, `steps` each; None where none finished. Diverged
    trials, which are no loss when cut, are left out. The interval is that of Clopper and Pearson."""
    done = ranked(trials, maximize=maximize)
    if not done:
        return None
    stops = [trial.get("would_stop_at") for trial in done]
    cut = [stop is not None for stop in stops]
    quarter = math.ceil(len(done) / BEST_PART)
    among_best = sum(cut[:quarter])
    ends = scipy.stats.binomtest(among_best, quarter).proportion_ci(method="exact")
    share = sum(max(0.0, 1 - stop / steps) for stop in stops if stop is not None) / len(done)
    fate = "would have been cut" if cut[0] else "would not have been cut"
    return (
        f"All trials ran to their end. Pruning would have cut {sum(cut)} of {len(done)} and saved {100 * share:.0f} % "
        f"of the tokens; the eventual best {fate}, and {among_best or 'none'} of the best {quarter} would have been "
        f"(95 % interval of that chance {100 * ends.low:.0f} to {100 * ends.high:.0f} %)."
    )


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The median rule on the same curves in random orders."""

    orders: int
    trials: int
    best_cut: float
    """share of the orders in which the best trial is cut"""
    quarter_cut: float
    """mean share of the best quarter that is cut"""
    share: float
    """mean share of the steps of all trials that is saved"""
    regret: float
    """mean difference between the best remaining trial and the best of all"""

    def sentence(self, unit: str = "nats") -> str:
        """One sentence."""
        text = f"Replayed with these {self.trials} curves in {self.orders:,} random orders, pruning saves "
        text += f"{100 * self.share:.0f} % of the steps and "
        if self.best_cut == 0:
            return text + "never cuts the eventual best."
        often = f"{100 * self.best_cut:.0f} %" if self.best_cut >= 0.01 else "less than 1 %"
        cost = f"; the best trial that is left is then worse by {self.regret / self.best_cut:.2g} {unit} on average"
        return text + f"cuts the eventual best in {often} of them{cost}."


def replay(
    curves: Sequence[Sequence[tuple[float, float]]], finals: Sequence[float], *, startup: int, warmup: float = 0,
    percentile: float = 50.0, maximize: bool = False, orders: int = 1000, seed: int = 0,
) -> Replay | None:  # fmt: skip
    """The median (or another percentile) rule on full curves [(step, value), ...] and final values, in random orders.

    Optuna's rule: a trial is cut at a step from `warmup` on if its best value so far is worse than that percentile of
    the values at this step of the trials completed before it, once `startup` trials are complete. Trials that were cut,
    or whose final value is not finite, do not complete. One trial runs at a time, and the order does not depend on the
    results, as it does with TPE. None where no trial has a finite final value.
    """
    sign = -1.0 if maximize else 1.0
    final = sign * np.asarray(finals, dtype=np.float64)
    if not np.isfinite(final).any():
        return None
    steps = np.unique([step for curve in curves for step, _ in curve])
    values = np.full((len(curves), len(steps)), np.nan)  # (trial, step)
    for row, curve in enumerate(curves):
        for step, value in curve:
            values[row, np.searchsorted(steps, step)] = sign * value
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(len(curves)), (orders, 1)), axis=1)  # (order, place)
    stopped = _replayed(values, np.isfinite(final), steps >= warmup, order, startup, percentile)
    cut = stopped < len(steps)
    lasts = np.array([max((step for step, _ in curve), default=0.0) for curve in curves])
    at = np.append(steps, np.inf)[stopped]  # (order, trial)
    saved = np.maximum(0.0, lasts - at).sum(-1) / max(lasts.sum(), 1e-300)
    order_of = np.argsort(np.where(np.isfinite(final), final, np.inf), kind="stable")
    quarter = order_of[: math.ceil(np.isfinite(final).sum() / BEST_PART)]
    best_remaining = np.where(cut, np.inf, np.where(np.isfinite(final), final, np.inf)).min(-1)
    return Replay(
        orders=orders, trials=len(curves), best_cut=float(cut[:, order_of[0]].mean()),
        quarter_cut=float(cut[:, quarter].mean()), share=float(saved.mean()),
        regret=float((best_remaining - final[order_of[0]]).mean()),
    )  # fmt: skip


def _replayed(
    values: Array, finite: Flags, reported: Flags, order: NDArray[np.int64], startup: int, percentile: float
) -> NDArray[np.int64]:
    """Index of the step at which each trial is cut in each order; the number of steps if it is not.

    (trial, step), (trial,), (step,), (order, place) -> (order, trial)
    """
    orders, trials = order.shape
    reached = np.fmin.accumulate(values, axis=1)  # best so far
    done = np.zeros((orders, trials), dtype=bool)
    stopped = np.full((orders, trials), values.shape[1])
    rows = np.arange(orders)
    for trial in order.T:  # (order,)
        ready = done.sum(-1) >= max(startup, 1)
        for step in np.flatnonzero(reported):
            line = _percentiles(np.where(done, values[:, step], np.nan), percentile)
            worse = ~np.isnan(values[trial, step]) & (reached[trial, step] > line)
            now = ready & worse & (stopped[rows, trial] == values.shape[1])
            stopped[rows[now], trial[now]] = step
        done[rows, trial] = finite[trial] & (stopped[rows, trial] == values.shape[1])
    return stopped


def _percentiles(values: Array, percentile: float) -> Array:
    """Percentile of each row without its NaN, linear between neighbours; NaN where there is none.  (n, k) -> (n,)"""
    ordered = np.sort(values, axis=-1)  # NaN last
    count = (~np.isnan(values)).sum(-1)
    place = np.maximum(count - 1, 0) * percentile / 100
    below = np.floor(place).astype(int)
    rows = np.arange(len(values))
    low, high = ordered[rows, below], ordered[rows, np.minimum(below + 1, np.maximum(count - 1, 0))]
    return np.asarray(low + (place - below) * (high - low))
