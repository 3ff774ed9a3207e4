"""The figures of a sweep: value against each setting, over trials, of several searches, and what mattered.

They take plain data and own no state; draw and save them inside `svg.drawing()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gpt2lab.report.figures import HALF, WIDE
from gpt2lab.report.marks import Look, finite, label_ends, note, rows
from gpt2lab.report.svg import ARMS, BAND, INK, MUTED
from gpt2lab.report.sweep.axes import (
    DIVERGED,
    HEADROOM,
    Axis,
    Fitted,
    Point,
    around,
    best_of,
    draw_axis,
    draw_points,
    limits_of,
    padded,
    set_limits,
)
from gpt2lab.results import LOSS
from gpt2lab.text import setting, shorten

CLOSE = 4
"""The close-up reaches this many smallest effects above the best value."""


def against(
    axis: Axis,
    points: Sequence[Point],
    fitted: Fitted,
    metric: str,
    close: float,
    *,
    alone: bool,
    maximize: bool = False,
) -> Figure:
    """Value against one setting. alone: the only dimension; then wide, with a close-up of what lies within `close` of
    the best value where there is enough to see."""
    best = best_of(points, maximize=maximize)
    window = _window(axis, points, fitted, best, close) if alone and best and not maximize else None
    height = 3.1 if not alone else 3.9 if any(point.has_value for point in points) else 2.2
    figure = Figure(figsize=(WIDE if alone else HALF, height), layout="constrained")
    panels = list(figure.subplots(1, 2, width_ratios=(1, 1.05))) if window else [figure.subplots()]
    whole = around(axis, points)
    for axes, limits in zip(panels, (whole, window or whole), strict=False):
        _draw_fitted(axes, fitted, alone=alone)
        draw_axis(axes, axis, limits)
    set_limits(panels[0], points, _in_unit(metric))
    if window and best:
        panels[1].set_ylim(*limits_of(_near(points, best, close)))
        panels[1].set_title("near the best", fontsize=9.5, color=MUTED, loc="left")
    for axes in panels:
        draw_points(axes, axis, points, best)
    if best is not None:
        last = panels[-1]
        x = axis.number(best.settings.get(axis.name))
        if math.isfinite(x):
            label = setting(best.settings[axis.name])
            note(last, f"best {shorten(label, 18)}", (x, best.value), (0, -8), "dd", ha="center", va="top", color=INK)
    return figure


def _window(
    axis: Axis, points: Sequence[Point], fitted: Fitted, best: Point, close: float
) -> tuple[float, float] | None:
    """The part of the axis that a close-up shows; None where it would show the same as the whole, or too little."""
    near = [axis.number(point.settings.get(axis.name)) for point in _near(points, best, close)]
    if axis.choices or len(near) < 4:
        return None
    ends = [end for end in (*near, fitted.flat_low, fitted.flat_high, fitted.low, fitted.high) if math.isfinite(end)]
    low, high = (max(min(ends), axis.low), min(max(ends), axis.high))
    shares = axis.share(high) - axis.share(low)
    whole = max(p.value for p in points if p.has_value) - best.value
    if not 0 < shares < 0.75 and whole < 2 * CLOSE * close:
        return None
    return padded(axis, low, high, 0.08)


def _near(points: Sequence[Point], best: Point, close: float) -> list[Point]:
    """The finished trials that a close-up shows."""
    return [point for point in points if point.finished and point.value <= best.value + CLOSE * close]


def _draw_fitted(axes: Axes, fitted: Fitted, *, alone: bool) -> None:
    """The flat range in grey, the interval of the optimum in colour, the fitted curve through both."""
    if math.isfinite(fitted.flat_low) and math.isfinite(fitted.flat_high):
        axes.axvspan(fitted.flat_low, fitted.flat_high, color=BAND, linewidth=0, zorder=0)
    if math.isfinite(fitted.low) and math.isfinite(fitted.high):
        axes.axvspan(fitted.low, fitted.high, color=ARMS[0], alpha=0.16, linewidth=0, zorder=1)
    if math.isfinite(fitted.at):
        axes.axvline(fitted.at, color=ARMS[0], linewidth=1, dashes=(3, 2), zorder=1)
    x, y = finite(fitted.line)
    if alone and x.size > 1:
        axes.plot(x, y, color=ARMS[0], linewidth=1.6, alpha=0.75, zorder=2)


def history(points: Sequence[Point], metric: str, *, alone: bool = False, maximize: bool = False) -> Figure:
    """Value over trials, with the best one so far. alone: no figure stands beside it, so it is wide."""
    known = any(point.has_value for point in points)
    figure = Figure(figsize=(WIDE if alone else HALF, (2.8 if alone else 3.1) if known else 2.0), layout="constrained")
    axes = figure.subplots()
    done = sorted(points, key=lambda point: point.slot)
    set_limits(axes, done, metric)
    steps: list[tuple[float, float]] = []
    for point in done:
        better = point.finished and (
            not steps or (point.value > steps[-1][1] if maximize else point.value < steps[-1][1])
        )
        if better:
            steps.append((float(point.slot), point.value))
    if steps:
        last = max(point.slot for point in done)
        x, y = zip(*steps, (float(last), steps[-1][1]), strict=True)
        axes.plot(x, y, color=INK, linewidth=1.2, drawstyle="steps-post", zorder=2)
    slots = Axis(name="slot", low=0, high=max([1, *(point.slot for point in done)]))
    numbered = [Point(slot=p.slot, settings={"slot": p.slot}, outcome=p.outcome, value=p.value) for p in done]
    draw_points(axes, slots, numbered, best_of(numbered, maximize=maximize))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("trial")
    return figure


def importance(shares: Mapping[str, float]) -> Figure:
    """One bar per dimension, the longest on top; `shares` sum to one."""
    figure = Figure(figsize=(HALF, max(1.6, 0.9 + 0.36 * len(shares))), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    for row, (_, share) in enumerate(ordered):
        axes.barh([row], [share], height=0.55, color=ARMS[0], zorder=2)
        note(axes, f"{100 * share:.0f} %", (share, row), (5, 0), "dd", va="center", color=INK)
    rows(axes, [name for name, _ in ordered])
    axes.set_xlim(0, 1.12 * max([share for _, share in ordered] or [1.0]) or 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("share of the variation between trials")
    return figure


def _in_unit(metric: str) -> str:
    return f"{metric}, nats per token" if metric == LOSS else metric


def searches(
    axis: Axis,
    found: Mapping[str, tuple[Sequence[Point], Fitted]],
    look: Mapping[str, Look],
    metric: str,
    *,
    maximize: bool = False,
) -> Figure:
    """Value against one setting in several searches: marks, the fitted curve and a tick at the optimum of each."""
    figure = Figure(figsize=(WIDE, 3.9), layout="constrained")
    axes = figure.subplots()
    every = [point for points, _ in found.values() for point in points]
    set_limits(axes, [point for point in every if point.finished], _in_unit(metric))
    draw_axis(axes, axis, around(axis, every))
    low, high = axes.get_ylim()
    edge = high - 0.25 * HEADROOM * (high - low)
    ends: dict[str, float] = {}
    for label, (points, fitted) in found.items():
        style = look[label]
        for point in points:
            x = axis.number(point.settings.get(axis.name))
            if point.finished and math.isfinite(x):
                mark = style.marker if point.value <= high else "^"
                at = min(point.value, edge)
                axes.plot([x], [at], mark, color=style.colour, markersize=4.5, alpha=0.75, zorder=3)
            elif point.outcome == DIVERGED and math.isfinite(x):
                axes.plot([x], [edge], "x", color=style.colour, markersize=5, zorder=3)
        line, values = finite(fitted.line)
        if line.size > 1:
            axes.plot(line, values, color=style.colour, linestyle=style.dash, zorder=2)
        if math.isfinite(fitted.low) and math.isfinite(fitted.high):
            axes.axvspan(fitted.low, fitted.high, color=style.colour, alpha=0.13, linewidth=0, zorder=0)
        best = best_of(points, maximize=maximize)
        if best:
            ends[label] = best.value
    label_ends(axes, ends, look)
    return figure
