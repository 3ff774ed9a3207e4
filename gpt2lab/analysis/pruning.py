"""What stopping bad trials early saved, and how often it would have cut the best one.

`savings`: tokens, of a search that was pruned; the results of its cut trials are unknown. `audit`: of a search whose
trials all ran to their end, with the step at which each would have been cut, in the one order of its trials. `replay`:
the probability, given these curves, that the median rule cuts the best in a random order, where cut trials do not count
for later ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gpt2lab.analysis.statistics import Array
from gpt2lab.text import plural, quantity

Trial = Mapping[str, Any]
Flags = NDArray[np.bool_]
BEST_PART = 4
"""The best quarter is reported beside the best one."""


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Tokens of a search whose bad trials were stopped early."""

    trained: float
    full: float
    """of the same trials without pruning"""
    pruned: int
    ended: int
    """trials that finished, were pruned or diverged"""

    @property
    def share(self) -> float | None:
        """Share of the tokens of a full search that was saved; None before any trial ended."""
        return 1 - self.trained / self.full if self.full > 0 else None

    def __str__(self) -> str:
        if self.share is None:
            return "No trial has ended, so nothing was saved yet."
        if not self.pruned:
            return f"None of {plural(self.ended, 'trial')} was stopped early."
        return (
            f"{self.pruned} of {plural(self.ended, 'trial')} were stopped early: {quantity(self.trained)} tokens were "
            f"trained where {quantity(self.full)} would have been, {100 * self.share:.0f} % less."
        )


def savings(trials: Iterable[Trial], tokens: float) -> Savings:
    """Of the trials of a sweep record; `tokens` of a full trial over all its seeds.

    A finished trial counts in full on both sides, even if its runs were reused, so that the share measures pruning
    alone. A diverged one counts with the tokens that it trained.
    """
    trained = full = 0.0
    counts = {"finished": 0, "pruned": 0, "diverged": 0}
    for trial in trials:
        outcome = trial["outcome"]
        if outcome not in counts:
            continue
        counts[outcome] += 1
        used = tokens if outcome == "finished" else min(float(trial.get("tokens") or 0), tokens)
        trained += used
        full += tokens if outcome == "pruned" else used
    return Savings(trained=trained, full=full, pruned=counts["pruned"], ended=sum(counts.values()))


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Where pruning would have cut trials that all ran to their end."""

    finished: int
    cut: int
    best_cut: bool
    quarter: int
    """number of trials in the best quarter"""
    quarter_cut: int
    interval: tuple[float, float]
    """95 % interval of the chance that one of the best quarter is cut (Clopper and Pearson)"""
    share: float
    """of the tokens of these trials that pruning would have saved"""

    def __str__(self) -> str:
        fate = "would have been cut" if self.best_cut else "would not have been cut"
        low, high = (f"{100 * end:.0f}" for end in self.interval)
        return (
            f"All trials ran to their end. Pruning would have cut {self.cut} of {self.finished} and saved "
            f"{100 * self.share:.0f} % of the tokens; the eventual best {fate}, and {self.quarter_cut or 'none'} of "
            f"the best {self.quarter} would have been (95 % interval of that chance {low} to {high} %)."
        )


def audit(trials: Iterable[Trial], steps: int, *, maximize: bool = False) -> Audit | None:
    """Of the trials of an audited sweep, `steps` of a full run; None where none finished. Diverged trials, which are no
    loss when cut, are left out."""
    done = [t for t in trials if t["outcome"] == "finished" and t["value"] is not None]
    if not done:
        return None
    done.sort(key=lambda t: ((-t["value"] if maximize else t["value"]), t["slot"]))
    cut = [t.get("would_stop_at") is not None for t in done]
    quarter = math.ceil(len(done) / BEST_PART)
    ends = stats.binomtest(sum(cut[:quarter]), quarter).proportion_ci(method="exact")
    left = sum(max(0.0, 1 - t["would_stop_at"] / steps) for t in done if t.get("would_stop_at") is not None)
    return Audit(
        finished=len(done), cut=sum(cut), best_cut=cut[0], quarter=quarter, quarter_cut=sum(cut[:quarter]),
        interval=(float(ends.low), float(ends.high)), share=left / len(done),
    )  # fmt: skip


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

    def told(self, unit: str = "nats") -> str:
        """One sentence."""
        text = f"Replayed with these {self.trials} curves in {self.orders:,} random orders, pruning saves "
        text += f"{100 * self.share:.0f} % of the steps and "
        if self.best_cut == 0:
            return text + "never cuts the eventual best."
        often = f"{100 * self.best_cut:.0f} %" if self.best_cut >= 0.01 else "less than 1 %"
        cost = f"; the best trial that is left is then worse by {self.regret / self.best_cut:.2g} {unit} on average"
        return text + f"cuts the eventual best in {often} of them{cost}."

    __str__ = told


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
    ranked = np.argsort(np.where(np.isfinite(final), final, np.inf), kind="stable")
    quarter = ranked[: math.ceil(np.isfinite(final).sum() / BEST_PART)]
    left = np.where(cut, np.inf, np.where(np.isfinite(final), final, np.inf)).min(-1)
    return Replay(
        orders=orders, trials=len(curves), best_cut=float(cut[:, ranked[0]].mean()),
        quarter_cut=float(cut[:, quarter].mean()), share=float(saved.mean()),
        regret=float((left - final[ranked[0]]).mean()),
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
