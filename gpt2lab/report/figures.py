"""The figures of a study. They take plain data, draw with matplotlib's object-oriented API and own no state.

Every arm has one look (colour, marker, dash) in all of them; the names stand beside the data, not in a legend; and
every one of them can be drawn from a single point, from NaN, and with arms that have no run yet. Draw and save them
inside `svg.drawing()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2lab.analysis.compare import MARGIN
from gpt2lab.report.marks import Array, Curve, Look, finite, label_ends, note, rows, since, stack, thousands
from gpt2lab.report.svg import ARMS, BAND, INK, MUTED, SURFACE
from gpt2lab.text import quantity, shorten

WIDE, HALF = 9.2, 4.5
"""Widths in inches."""

ZOOM_FROM = 0.7

EFFECT_LOOK = Look(ARMS[0], "D", "solid")
"""How an effect is drawn that belongs to no single arm."""


@dataclass(frozen=True)
class Effect:
    """One contrast as the forest plot shows it, in nats; NaN where there is no number."""

    label: str
    arm: str
    difference: float
    low: float
    high: float
    words: str


def forest(
    effects: Sequence[Effect], look: Mapping[str, Look], smallest_effect: float, to: str, noise: float | None = None
) -> Figure:
    """Differences with their family-adjusted intervals, over the band of effects too small to matter; dotted lines one
    sd of the noise floor away from nothing. `to`: what the differences are to, as ` to learned`."""
    figure, axes = _figure(WIDE, 1.1 + 0.4 * max(2, len(effects)))
    limits = _forest_limits(effects, smallest_effect)
    axes.axvspan(-smallest_effect, smallest_effect, color=BAND, linewidth=0, zorder=0)
    axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
    for side in (-noise, noise) if noise else ():
        axes.axvline(side, color=MUTED, linewidth=1, dashes=(1, 2), zorder=1)
    for row, effect in enumerate(effects):
        _draw_effect(axes, row, effect, look.get(effect.arm, EFFECT_LOOK), limits)
        note(axes, shorten(effect.words, 44), (1, row), (10, 0), "fd", va="center", color=INK)
    rows(axes, [effect.label for effect in effects])
    axes.set_xlim(*limits)
    axes.set_xlabel(f"difference in final loss{to}, nats (shaded: ±{smallest_effect:g})")
    note(axes, "◂ lower loss", (0, 1), (0, 3), "ff", ha="left", va="bottom")
    note(axes, "higher loss ▸", (1, 1), (0, 3), "ff", ha="right", va="bottom")
    return figure


def _draw_effect(axes: Axes, row: int, effect: Effect, look: Look, limits: tuple[float, float]) -> None:
    has_interval = math.isfinite(effect.low) and math.isfinite(effect.high)
    if has_interval:
        low, high = (min(max(end, limits[0]), limits[1]) for end in (effect.low, effect.high))
        axes.plot([low, high], [row, row], color=look.colour, linewidth=2.4, zorder=2)
        for end, cut, arrow in ((low, effect.low < low, "<"), (high, effect.high > high, ">")):
            axes.plot([end], [row], arrow if cut else "|", color=look.colour, markersize=7, clip_on=False)
    if math.isfinite(effect.difference):
        at = min(max(effect.difference, limits[0]), limits[1])
        fill = look.colour if has_interval else SURFACE  # hollow: a difference without an interval
        axes.plot([at], [row], look.marker, color=look.colour, markerfacecolor=fill, markersize=7.5, zorder=3)


def _forest_limits(effects: Sequence[Effect], smallest_effect: float) -> tuple[float, float]:
    """All points, and the intervals unless they would squeeze the points: those are cut, with an arrow at the cut."""
    points = [e.difference for e in effects if math.isfinite(e.difference)] or [0.0]
    ends = [end for e in effects for end in (e.low, e.high) if math.isfinite(end)]
    widest = 3 * max(*(abs(p) for p in points), 2 * smallest_effect)
    low = min(-1.6 * smallest_effect, *points, *(max(end, -widest) for end in ends))
    high = max(1.6 * smallest_effect, *points, *(min(end, widest) for end in ends))
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


@dataclass(frozen=True)
class Curves:
    """Validation curves of one arm, one per seed: those that stayed finite, and those that did not."""

    arm: str
    healthy: Sequence[Curve]
    failed: Sequence[Curve] = ()

    def points(self) -> list[tuple[Array, Array]]:
        """Every curve that has something to draw."""
        return [xy for xy in map(finite, (*self.healthy, *self.failed)) if xy[0].size]


def training(curves: Sequence[Curves], look: Mapping[str, Look], floors: Mapping[str, float], metric: str) -> Figure:
    """Loss against tokens: the whole of training on the left, its last 30 % on the right."""
    last = max((float(x.max()) for c in curves for x, _ in c.points()), default=0.0)
    ends = {c.arm: since(c.healthy, ZOOM_FROM * last) for c in curves if c.healthy}
    zoomed = any(len(x) > 1 for x, _ in ends.values())
    figure = Figure(figsize=(WIDE, 3.9), layout="constrained")
    panels = list(figure.subplots(1, 2, width_ratios=(1, 1.05))) if zoomed else [figure.subplots()]
    for axes in panels:
        for c in curves:
            draw_curves(axes, c, look[c.arm])
        for value in floors.values():
            axes.axhline(value, color=MUTED, linewidth=1, dashes=(3, 2), zorder=1)
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(thousands)
    panels[0].set_ylabel(f"{metric}, nats per token")
    panels[0].set_ylim(*_whole_limits(curves, floors))
    for name, value in floors.items():
        note(panels[0], f"{name} {value:.2f}", (1, value), (-2, 2), "fd", ha="right", va="bottom")
    if zoomed:
        panels[0].axvspan(ZOOM_FROM * last, last, color=BAND, linewidth=0, zorder=0)
        panels[1].set_xlim(ZOOM_FROM * last, last * 1.005)
        panels[1].set_ylim(*_zoom_limits([y for _, y in ends.values()], floors))
        panels[1].set_title("the last 30 %", fontsize=9.5, color=MUTED, loc="left")
    label_ends(panels[-1], {arm: float(y[-1]) for arm, (_, y) in ends.items() if y.size}, look)
    return figure


def draw_curves(axes: Axes, curves: Curves, look: Look) -> None:
    """The mean of the healthy ones over a band from lowest to highest; each failed one dashed up to a cross."""
    for curve in curves.failed:
        x, y = finite(curve)
        axes.plot(x, y, color=look.colour, linewidth=1, dashes=(2, 2), zorder=2)
        axes.plot(x[-1:], y[-1:], "x", color=look.colour, markersize=7, markeredgewidth=2, zorder=4)
    x, losses = stack(curves.healthy)
    if x.size == 1:
        axes.plot(np.repeat(x, len(losses)), losses[:, 0], look.marker, color=look.colour, markersize=6, zorder=3)
    elif x.size:
        if len(losses) > 1:
            axes.fill_between(x, losses.min(0), losses.max(0), color=look.colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(x, losses.mean(0), color=look.colour, linestyle=look.dash, zorder=3)


def _whole_limits(curves: Sequence[Curves], floors: Mapping[str, float]) -> tuple[float, float]:
    """From the lowest loss to the highest first one; a run that blows up leaves the panel, not the rest squeezed."""
    losses = [y for c in curves for _, y in c.points()]
    low = min([float(y.min()) for y in losses] + list(floors.values()), default=0.0)
    high = max([float(y[0]) for y in losses] + list(floors.values()), default=1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _zoom_limits(ends: Sequence[Array], floors: Mapping[str, float]) -> tuple[float, float]:
    """The window's own range, without arms that learned next to nothing unless there is nothing else."""
    present = [y for y in ends if y.size]
    learned = [y for y in present if y[-1] < floors.get("unigram", math.inf) - MARGIN] or present
    low, high = min(float(y.min()) for y in learned), max(float(y.max()) for y in learned)
    margin = 0.08 * (high - low) or 0.05
    return low - margin, high + margin


def budgets(finals: Mapping[str, Mapping[float, Sequence[float]]], look: Mapping[str, Look], metric: str) -> Figure:
    """Final loss against training tokens; `finals` is arm -> tokens -> one finite value per seed."""
    figure, axes = _figure(WIDE, 3.5)
    axes.set_xscale("log", base=2)
    ends: dict[str, float] = {}
    for arm, by_tokens in finals.items():
        style, x = look[arm], sorted(by_tokens)
        means = [float(np.mean(by_tokens[tokens])) for tokens in x]
        axes.plot(x, means, color=style.colour, linestyle=style.dash, marker=style.marker, markersize=5.5, zorder=3)
        for tokens in x:
            values = by_tokens[tokens]
            axes.plot([tokens] * len(values), values, ".", color=style.colour, markersize=4, alpha=0.6, zorder=2)
        ends[arm] = means[-1]
    ticks = sorted({tokens for by_tokens in finals.values() for tokens in by_tokens})
    axes.set_xticks(ticks, [quantity(tokens) for tokens in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training tokens, on a schedule of their own")
    axes.set_ylabel(f"final {metric}, nats per token")
    label_ends(axes, ends, look)
    return figure


def contexts(
    losses: Mapping[str, Mapping[float, Sequence[float]]], look: Mapping[str, Look], block_size: int, metric: str
) -> Figure:
    """Loss against evaluated context length; `losses` is arm -> length in tokens -> one finite value per seed."""
    figure, axes = _figure(WIDE, 3.5)
    axes.set_xscale("log", base=2)
    lengths = sorted({length for by_length in losses.values() for length in by_length} | {block_size})
    ends: dict[str, float] = {}
    for arm, by_length in losses.items():
        style = look[arm]
        x = sorted(by_length)
        means = [float(np.mean(by_length[length])) for length in x]
        axes.plot(x, means, color=style.colour, linestyle=style.dash, marker=style.marker, markersize=5.5, zorder=3)
        for length in x:
            values = by_length[length]
            axes.plot([length] * len(values), values, ".", color=style.colour, markersize=4, alpha=0.6, zorder=2)
        if x and x[-1] == lengths[-1]:
            ends[arm] = means[-1]
        elif x:
            note(axes, f"{shorten(arm)} ends here", (x[-1], means[-1]), (6, 5), "dd", va="bottom", color=INK)
    axes.axvline(block_size, color=MUTED, linewidth=1, dashes=(3, 2), zorder=1)
    note(axes, "training length", (block_size, 1), (3, -3), "df", va="top")
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("context length, tokens")
    axes.set_ylabel(f"{metric}, nats per token")
    label_ends(axes, ends, look)
    return figure


def seeds(
    finals: Mapping[str, Sequence[float]], look: Mapping[str, Look], ceiling: float | None, metric: str
) -> Figure:
    """Every seed's final loss, one row per arm; failed runs (NaN, or not below `ceiling`) are counted at the side."""
    figure, axes = _figure(HALF, _half_height(len(finals)))
    top = math.inf if ceiling is None else ceiling
    for row, (arm, values) in enumerate(finals.items()):
        healthy = [value for value in values if math.isfinite(value) and value < top]
        for i, value in enumerate(healthy):
            offset = 0.16 * (i % 3 - 1) if len(healthy) > 1 else 0.0  # equal losses must not hide each other
            style = look[arm]
            axes.plot([value], [row + offset], style.marker, color=style.colour, markersize=5.5, alpha=0.75, zorder=3)
        if healthy:
            axes.plot([np.mean(healthy)] * 2, [row - 0.32, row + 0.32], color=INK, linewidth=1.3, zorder=2)
        failed = len(values) - len(healthy)
        remark = f"× {failed} failed" if failed else "" if values else "no value"
        note(axes, remark, (1, row), (4, 0), "fd", va="center")
    rows(axes, list(finals))
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"final {metric}, nats (bar: mean)")
    return figure


def cost(points: Mapping[str, tuple[float, float]], look: Mapping[str, Look], axis: str, metric: str) -> Figure:
    """Mean final loss against what training costs; `points` is arm -> (cost, loss), both finite."""
    figure, axes = _figure(HALF, _half_height(len(points)))
    for arm, (x, y) in points.items():
        axes.plot([x], [y], look[arm].marker, color=look[arm].colour, markersize=8, zorder=3)
    axes.margins(x=0.12, y=0.15)
    axes.xaxis.set_major_formatter(thousands)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"final {metric}, nats")
    label_ends(axes, {arm: y for arm, (_, y) in points.items()}, look, gap=0.075)
    return figure


def _half_height(arms: int) -> float:
    """The same for both figures that stand side by side."""
    return max(2.9, 1.0 + 0.34 * arms)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
