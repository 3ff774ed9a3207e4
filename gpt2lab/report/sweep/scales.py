"""Figures of a sweep across sizes of the model: how the best setting moves, and how activations grow with width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from gpt2lab.report.figures import HALF, WIDE
from gpt2lab.report.marks import Curve, Look, finite, label_ends, looks, note
from gpt2lab.report.svg import INK, MUTED, SURFACE
from gpt2lab.report.sweep.axes import log_ticks
from gpt2lab.text import quantity, setting, shorten

MOST_NAMES = 8
"""Parts of a model that are drawn, evenly from the first to the last; more lines could not be told apart."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The best setting at one size; NaN for an end that is not known."""

    parameters: float
    at: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The best setting of one variant at several sizes, the law that was fitted, and what it predicts."""

    sizes: Sequence[Size]
    line: Curve = ((), ())
    """(parameters, setting)"""
    predicted: Size | None = None


def across(trends: Mapping[str, Trend], look: Mapping[str, Look], name: str) -> Figure:
    """The best setting against the size of the model, both logarithmic; hollow: what the law predicts."""
    figure = Figure(figsize=(WIDE, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends: dict[str, float] = {}
    for label, trend in trends.items():
        style = look[label]
        for size in trend.sizes:
            _mark(axes, size, style, fill=style.colour)
        x, y = finite(trend.line)
        if x.size > 1:
            axes.plot(x, y, color=style.colour, linestyle=style.dash, linewidth=1.4, zorder=2)
        last = trend.predicted or (trend.sizes[-1] if trend.sizes else None)
        if trend.predicted:
            _mark(axes, trend.predicted, style, fill=SURFACE)
        if last:
            ends[label] = last.at
    every = [s for t in trends.values() for s in (*t.sizes, *([t.predicted] if t.predicted else []))]
    known = sorted({size.parameters for size in every})
    if known:
        axes.set_xlim(known[0] / 1.35, known[-1] * 1.35)
    axes.set_xticks(known, [quantity(parameters) for parameters in known])
    axes.set_xticks([], minor=True)
    _ticks(axes)
    axes.set_xlabel("parameters")
    axes.set_ylabel(f"best {shorten(name)}")
    if len(trends) > 1:
        label_ends(axes, ends, look)
    return figure


def _ticks(axes: Axes) -> None:
    """Of a logarithmic vertical axis."""
    axes.yaxis.set_major_locator(LogLocator(subs=log_ticks(*axes.get_ylim()), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: setting(value))


def _mark(axes: Axes, size: Size, style: Look, *, fill: str) -> None:
    if math.isfinite(size.low) and math.isfinite(size.high):
        axes.plot([size.parameters] * 2, [size.low, size.high], color=style.colour, linewidth=1.6, zorder=2)
        axes.plot([size.parameters] * 2, [size.low, size.high], "_", color=style.colour, markersize=8, zorder=2)
    axes.plot(
        [size.parameters], [size.at], style.marker, color=style.colour, markerfacecolor=fill, markersize=7, zorder=3
    )


Seen = Mapping[str, Sequence[Sequence[float | None]]]
"""name -> one row per width, one number per step."""


def coordinates(found: Mapping[str, tuple[Sequence[float], Sequence[int], Seen]], what: str) -> Figure:
    """What the parts of a model do after the last step against its width; `found` is variant -> (widths, steps, seen),
    `what` names the numbers."""
    figure = Figure(figsize=(WIDE if len(found) > 1 else HALF + 1.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    names = _some(list(dict.fromkeys(name for _, _, seen in found.values() for name in seen)))
    look = looks(names, names[0]) if names else {}
    for axes, (variant, (widths, steps, seen)) in zip(panels, found.items(), strict=True):
        ends = _against_width(axes, widths, {name: seen.get(name) or () for name in names}, look)
        after = f", after {steps[-1]} steps" if steps else ""
        axes.set_title(f"{shorten(variant)}{after}", fontsize=9.5, color=MUTED, loc="left")
    if names:
        panels[-1].autoscale_view()
        _ticks(panels[0])
        label_ends(panels[-1], ends, look)
    else:
        note(panels[0], "nothing was measured", (0.5, 0.5), (0, 0), "ff", ha="center", color=INK)
    panels[0].set_ylabel(what)
    return figure


def _against_width(axes: Axes, widths: Sequence[float], seen: Seen, look: Mapping[str, Look]) -> dict[str, float]:
    """One line per name -> where each ends."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends: dict[str, float] = {}
    for name, rows in seen.items():
        last = [row[-1] if row else None for row in rows]
        values = [math.nan if value is None or value <= 0 else float(value) for value in last]
        x, y = finite((list(widths)[: len(values)], values))
        style = look[name]
        axes.plot(x, y, color=style.colour, linestyle=style.dash, marker=style.marker, markersize=5, zorder=3)
        if y.size:
            ends[name] = float(y[-1])
    axes.set_xticks(list(widths), [f"{width:g}" for width in widths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("width (n_embd)")
    return ends


def _some(names: list[str]) -> list[str]:
    """At most MOST_NAMES of them, from the first to the last."""
    if len(names) <= MOST_NAMES:
        return names
    return [names[round(i * (len(names) - 1) / (MOST_NAMES - 1))] for i in range(MOST_NAMES)]
