"""Figures of a sweep in which every trial is a line: through its settings, and over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gpt2lab.report.figures import WIDE, ZOOM_FROM
from gpt2lab.report.marks import finite, note, since, thousands
from gpt2lab.report.svg import BAND, GRID, INK, MUTED, RAMP, SURFACE
from gpt2lab.report.sweep.axes import COLOURS, DIVERGED, MANY, PRUNED, Axis, Point, best_of, limits_of
from gpt2lab.text import setting, shorten

PAPER = {"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
"""Behind words that lines run through."""


def parallel(space: Sequence[Axis], points: Sequence[Point], metric: str, *, maximize: bool = False) -> Figure:
    """Every trial as a line through its settings to its value, in the colours of the ramp by value; the best in ink."""
    figure = Figure(figsize=(WIDE, 3.6), layout="constrained")
    axes = figure.subplots()
    low, high = limits_of([point for point in points if point.finished])
    outcome = Axis(name=metric, low=low, high=high)
    best = best_of(points, maximize=maximize)
    thin = 0.7 if len(points) > MANY else 1.2
    order = sorted(points, key=lambda p: (p.finished, p.value if maximize else -p.value))
    for point in [p for p in order if p is not best] + ([best] if best else []):
        y = [axis.share(point.settings.get(axis.name)) for axis in space]
        style: dict[str, Any] = {"color": RAMP[level(outcome.share(point.value))] if point.finished else GRID}
        style |= {"linewidth": thin, "zorder": 3 if point.finished else 2}
        if point.outcome == DIVERGED:
            style |= {"color": COLOURS[DIVERGED], "dashes": (2, 2), "linewidth": 0.7, "alpha": 0.5}
        if point is best:
            style |= {"color": INK, "linewidth": 2.4, "zorder": 5}
        end = (
            outcome.share(point.value) if math.isfinite(point.value) else 1.0 if point.outcome == DIVERGED else math.nan
        )
        axes.plot(range(len(space) + 1), [*y, end], **style)
    for place, axis in enumerate([*space, outcome]):
        axes.axvline(place, color=MUTED, linewidth=1, zorder=4)
        ends = _ends(axis)
        for share, text in ends:
            note(axes, shorten(text, 16), (place, share), (4, 0), "dd", va="center", fontsize=8, bbox=PAPER)
    axes.set_xticks(range(len(space) + 1), [shorten(axis.name.rpartition(".")[2], 18) for axis in space] + [metric])
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(space) + 0.35)
    axes.set_ylim(-0.05, 1.05)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _ends(axis: Axis) -> list[tuple[float, str]]:
    """What is written along one axis of parallel coordinates."""
    if axis.choices:
        return [(axis.share(choice), choice) for choice in axis.choices]
    middle = math.sqrt(axis.low * axis.high) if axis.log else (axis.low + axis.high) / 2
    values = (axis.low, middle, axis.high)
    return [(axis.share(one), setting(one, 2) if abs(one) < 100 else f"{one:.0f}") for one in values]


def level(share: float) -> int:
    """The colour of the ramp for a share of the way from low to high."""
    return min(int(share * len(RAMP)), len(RAMP) - 1) if math.isfinite(share) else 0


def curves(
    axis: Axis, points: Sequence[Point], floors: Mapping[str, float], metric: str, *, maximize: bool = False
) -> Figure:
    """Value during training, coloured by one setting: the whole of training, and its last 30 %."""
    drawn = [point for point in points if finite(point.curve)[0].size]
    axis = _tried(axis, drawn)
    last = max((float(finite(p.curve)[0].max()) for p in drawn), default=0.0)
    ends = [since([p.curve], ZOOM_FROM * last)[1] for p in drawn if p.finished]
    ends = [y for y in ends if y.size]
    zoomed = any(y.size > 1 for y in ends)
    figure = Figure(figsize=(WIDE, 3.9), layout="constrained")
    *panels, bar = figure.subplots(1, 3 if zoomed else 2, width_ratios=(1, 1.05, 0.035) if zoomed else (1, 0.02))
    for axes in panels:
        for point in drawn:
            _draw_curve(axes, axis, point, best_of(points, maximize=maximize), len(drawn))
        for value in floors.values():
            axes.axhline(value, color=MUTED, linewidth=1, dashes=(3, 2), zorder=1)
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(thousands)
    panels[0].set_ylabel(metric)
    panels[0].set_ylim(*_curve_limits(drawn, floors))
    for name, value in floors.items():
        note(panels[0], f"{name} {value:.2f}", (1, value), (-2, 2), "fd", ha="right", va="bottom")
    if zoomed:
        panels[0].axvspan(ZOOM_FROM * last, last, color=BAND, linewidth=0, zorder=0)
        panels[1].set_xlim(ZOOM_FROM * last, last * 1.005)
        low = min(float(y.min()) for y in ends)
        high = max(float(np.quantile([y.max() for y in ends], 0.75)), low + 1e-3)
        panels[1].set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        panels[1].set_title("the last 30 %", fontsize=9.5, color=MUTED, loc="left")
    _colourbar(bar, axis)
    return figure


def _tried(axis: Axis, points: Sequence[Point]) -> Axis:
    """The part of an axis that these trials lie in, so that their colours differ as much as they can."""
    known = [x for point in points if math.isfinite(x := axis.number(point.settings.get(axis.name)))]
    return axis if axis.choices or not known else replace(axis, low=min(known), high=max(known))


def _draw_curve(axes: Axes, axis: Axis, point: Point, best: Point | None, count: int) -> None:
    x, y = finite(point.curve)
    colour = RAMP[level(axis.share(point.settings.get(axis.name)))]
    width = 2.6 if point is best else 0.8 if count > MANY else 1.3
    style: dict[str, Any] = {"dashes": (2, 2)} if point.outcome == DIVERGED else {}
    axes.plot(x, y, color=colour, linewidth=width, zorder=4 if point is best else 3, **style)
    if point.outcome == DIVERGED:
        axes.plot(x[-1:], y[-1:], "x", color=colour, markersize=7, markeredgewidth=2, zorder=4)
    elif point.outcome == PRUNED or x.size == 1:
        fill = SURFACE if point.outcome == PRUNED else colour
        axes.plot(x[-1:], y[-1:], "o", color=colour, markerfacecolor=fill, markersize=4.5, zorder=4)


def _curve_limits(points: Sequence[Point], floors: Mapping[str, float]) -> tuple[float, float]:
    """From the lowest value to the highest first one; a run that blows up leaves the frame."""
    found = [finite(point.curve)[1] for point in points]
    low = min([float(y.min()) for y in found] + list(floors.values()), default=0.0)
    high = max([float(y[0]) for y in found] + list(floors.values()), default=1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _colourbar(axes: Axes, axis: Axis) -> None:
    """The ramp as blocks: a picture of it would not be drawn under the page's policy."""
    count = len(RAMP)
    for step, colour in enumerate(RAMP):
        axes.add_patch(Rectangle((0, step / count), 1, 1 / count, color=colour, linewidth=0))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.yaxis.tick_right()
    ends = _ends(axis)
    axes.set_yticks([share for share, _ in ends], [shorten(text, 14) for _, text in ends])
    axes.set_title(shorten(axis.name.rpartition(".")[2], 14), fontsize=9, color=MUTED, loc="left")
    axes.spines[["left", "bottom"]].set_visible(False)
