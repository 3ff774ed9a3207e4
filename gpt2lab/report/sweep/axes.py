"""What the figures of a sweep share: axes of settings, trials as marks, limits that no bad trial can squeeze.

Outcomes look alike in all of them: filled is finished, hollow is pruned (at its last value), a cross along the upper
edge diverged, a plus there failed; a triangle lies above the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from gpt2lab.report.marks import Curve, note
from gpt2lab.report.svg import ARMS, INK, MUTED, SURFACE
from gpt2lab.text import setting, shorten

FINISHED, PRUNED, DIVERGED, FAILED = "finished", "pruned", "diverged", "failed"
COLOURS = {FINISHED: ARMS[0], PRUNED: MUTED, DIVERGED: ARMS[1], FAILED: MUTED}
MARKS = {FINISHED: "o", PRUNED: "o", DIVERGED: "x", FAILED: "+"}
MANY = 60
"""Trials from which marks and lines are drawn smaller."""

CLOSE = 4
"""The close-up reaches this many smallest effects above the best value."""

HEADROOM = 0.13
"""Share of a figure's height that is kept for trials without a value."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A dimension of the space as it is drawn. `choices`: names in the place of numbers."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: Sequence[str] = ()

    def number(self, value: Any) -> float:
        """Where a setting lies on the axis, in its own unit; NaN for none."""
        if self.choices:
            return float(self.choices.index(value)) if value in self.choices else math.nan
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan

    def share(self, value: Any) -> float:
        """The same as a share of the way from low to high, 0 to 1."""
        at = self.number(value)
        if self.choices:
            return at / max(1, len(self.choices) - 1)
        if self.log and at > 0:
            at, low, high = math.log(at), math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return min(max((at - low) / (high - low), 0.0), 1.0) if high > low else 0.5


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trial. `value`: final, or the last one of a pruned trial; NaN where there is none."""

    slot: int
    settings: Mapping[str, Any]
    outcome: str
    value: float = math.nan
    curve: Curve = ((), ())
    """(tokens, value)"""

    @property
    def finished(self) -> bool:
        return self.outcome == FINISHED and math.isfinite(self.value)

    @property
    def has_value(self) -> bool:
        return self.outcome in (FINISHED, PRUNED) and math.isfinite(self.value)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What an analysis found along one axis, in the axis' unit; NaN where it found none."""

    line: Curve = ((), ())
    at: float = math.nan
    low: float = math.nan
    high: float = math.nan
    flat_low: float = math.nan
    flat_high: float = math.nan


def best_of(points: Iterable[Point], *, maximize: bool = False) -> Point | None:
    """The finished trial with the best value; the earlier of two equal ones."""
    done = [point for point in points if point.finished]
    return min(done, key=lambda p: (-p.value if maximize else p.value, p.slot), default=None)


def around(axis: Axis, points: Sequence[Point]) -> tuple[float, float]:
    """The whole axis, and what was tried beyond its ends."""
    tried = [axis.number(point.settings.get(axis.name)) for point in points]
    known = [x for x in tried if math.isfinite(x) and (x > 0 or not axis.log)]
    return padded(axis, min([axis.low, *known]), max([axis.high, *known]), 0.03)


def padded(axis: Axis, low: float, high: float, share: float) -> tuple[float, float]:
    if axis.log and low > 0:
        margin = (high / low) ** share if high > low else 1.5
        return low / margin, high * margin
    margin = share * (high - low) or 0.5
    return low - margin, high + margin


def draw_axis(axes: Axes, axis: Axis, limits: tuple[float, float]) -> None:
    """Scale, limits, ticks and name of the horizontal axis; names have limits of their own."""
    if axis.choices:
        axes.set_xticks(range(len(axis.choices)), [shorten(choice, 16) for choice in axis.choices])
        axes.set_xlim(-0.6, len(axis.choices) - 0.4)
        if len(axis.choices) > 4:
            axes.tick_params(axis="x", rotation=30)
        axes.grid(visible=False, axis="x")
    elif axis.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=log_ticks(*limits), numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: setting(value))
    else:
        axes.locator_params(axis="x", nbins=6)
    if not axis.choices:
        axes.set_xlim(*limits)
    axes.set_xlabel(shorten(axis.name, 40))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Which multiples of powers of ten have a tick."""
    decades = math.log10(high / low)
    return (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 1.2 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def draw_points(axes: Axes, axis: Axis, points: Sequence[Point], best: Point | None) -> None:
    """Every trial; those without a value, or above the frame, along its upper edge."""
    low, high = axes.get_ylim()
    size = 3.6 if len(points) > MANY else 5.5
    upper, lower = (high - share * HEADROOM * (high - low) for share in (0.25, 0.7))
    places: dict[tuple[str, str], list[tuple[float, float]]] = {}  # one call for all that look alike: many are slow
    for point in points:
        x = axis.number(point.settings.get(axis.name))
        if not math.isfinite(x):
            continue
        if axis.choices:  # equal names must not hide each other
            x += 0.3 * ((point.slot * 0.618034) % 1 - 0.5)
        above = point.has_value and point.value > high - HEADROOM * (high - low)
        y = lower if above else point.value if point.has_value else upper
        mark = "^" if above else MARKS.get(point.outcome, ".")
        places.setdefault((point.outcome, mark), []).append((x, y))
        if point is best:
            ring: dict[str, Any] = {
                "markerfacecolor": "none",
                "markersize": size + 5,
                "markeredgewidth": 1.4,
                "zorder": 4,
            }
            axes.plot([x], [y], "o", color=INK, **ring)
    for (outcome, mark), found in places.items():
        colour = COLOURS.get(outcome, MUTED)
        fill = SURFACE if outcome == PRUNED else colour
        alpha = 0.8 if outcome == FINISHED and len(points) > MANY else 1.0
        style: dict[str, Any] = {"markersize": size, "markeredgewidth": 1.2, "zorder": 3, "alpha": alpha}
        axes.plot(*zip(*found, strict=True), mark, color=colour, markerfacecolor=fill, linestyle="none", **style)


def set_limits(axes: Axes, points: Sequence[Point], name: str) -> None:
    """The vertical axis; without a scale where no trial has a value."""
    axes.set_ylim(*limits_of(points))
    if any(point.has_value for point in points):
        axes.set_ylabel(name)
        return
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    note(axes, "no trial has a value", (0.5, 0.45), (0, 0), "ff", ha="center", va="center", fontsize=9.5)


def limits_of(points: Sequence[Point]) -> tuple[float, float]:
    """From the best value to the highest that does not squeeze the others, and room above for trials without one."""
    known = sorted(point.value for point in points if point.has_value)
    if not known:
        return 0.0, 1.0
    low = known[0]
    middle = float(np.quantile([point.value for point in points if point.finished] or known, 0.75))
    high = max(min(known[-1], low + 4 * (middle - low)), middle)
    span = (high - low) or max(0.02 * abs(low), 1e-3)
    low, high = low - 0.14 * span, high + 0.06 * span
    return low, low + (high - low) / (1 - HEADROOM)
