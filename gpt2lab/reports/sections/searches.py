"""The searches of a sweep: the best value of every setting, and the value of every trial against each setting. Other
views of the trials are those of optuna-dashboard.

Outcomes look alike in all of them: filled is finished, hollow is pruned (at its last value), a cross along the upper
edge diverged, a plus there failed; a triangle lies above the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2lab.analysis.metric_names import LOSS
from gpt2lab.analysis.tuning import Optimum
from gpt2lab.basics.text import DASH, number, setting, shorten
from gpt2lab.records import TrialRecord
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import (
    DIVERGED,
    FAILED,
    FINISHED,
    PRUNED,
    Axis,
    SearchRead,
    SweepRead,
    last_value,
    look_of,
)
from gpt2lab.reports.style import ARMS, BAND, HALF, INK, MUTED, SURFACE, WIDE, ArmStyle, finite, note
from gpt2lab.reports.tables import Cell, Table, tabulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {FINISHED: ARMS[0], PRUNED: MUTED, DIVERGED: ARMS[1], FAILED: MUTED}
MARKS = {FINISHED: "o", PRUNED: "o", DIVERGED: "x", FAILED: "+"}
MANY = 60
"""Trials from which marks are drawn smaller."""

CLOSE, ENOUGH = 4, 4
"""The only setting of a search is drawn up to this many smallest effects above the best value, if at least so many
trials lie there."""

HEADROOM = 0.13
"""Share of a figure's height that is kept for trials without a value."""

TABLE = (
    "Best trial: the settings of the best finished trial. Optimum: the best point of the curve fitted to the trials, "
    "with its 95 % interval; if several settings vary at once, no curve is fitted. Flat: the range in which less than "
    "the smallest effect declared to matter is lost. Edge: if the best value is at the edge of the space, the true "
    "optimum may lie beyond it."
)
LEGEND = (
    "Filled: finished; hollow: pruned, at its last value; at the upper edge: cross, diverged; plus, failed; triangle, "
    "above the frame."
)
BESIDE = (
    "One mark per finished trial; lines: the fitted curves; bands: the 95 % intervals of the best settings; crosses "
    "at the upper edge: diverged trials. Pruned trials are left out."
)


@section(order=0, title="Best settings", of="sweep")
def best_settings(read: SweepRead) -> Section:
    front = _figures(read, read.single) if read.single else _beside_each_other(read)
    return Section(table=best_table(read), note=TABLE, front=list(front))


@section(order=80, title="Each search by itself", of="sweep")
def each_search(read: SweepRead) -> Section | None:
    if read.single:
        return None
    pictures = [picture for i, search in enumerate(read.searches.values()) for picture in _figures(read, search, i)]
    return Section(figures=pictures, folded=True)


def best_table(read: SweepRead) -> Table | None:
    """One row per setting of every search: its best value, how sure that is, how flat, whether it lies at an edge."""
    several = len(read.searches) > 1
    weighed = any(search.record.importance for search in read.searches.values())

    def cells(item: tuple[int, SearchRead, Axis]) -> dict[str, Cell | str | None]:
        _, search, axis = item
        best, optimum = search.best, search.optima.get(axis.name)
        base, share = search.record.base.get(axis.name), search.importance.get(axis.name)
        chosen = best.settings.get(axis.name) if best else None
        reached = f"{read.metric} {number(best.value)}" if best else ""
        return {
            "Setting": Cell(search.label, axis.name) if several else axis.name,
            "Best trial:number": Cell(DASH if chosen is None else setting(chosen), reached),
            "Optimum:number": optimum_cell(optimum, search) if optimum else "",
            "Flat:number": flat_cell(optimum, search, read.unit) if optimum else "",
            "Searched:number": Cell(axis.range, "on a log scale" if axis.log else ""),
            "Edge:words": edge_cell(optimum) if optimum and best else "",
            "The config's own:number": DASH if base is None else setting(base),
            "Importance:number": None if not weighed else DASH if share is None else f"{100 * share:.0f} %",
        }

    rows = [(i, search, axis) for i, search in enumerate(read.searches.values()) for axis in search.axes.values()]
    return tabulate(rows, cells, lambda item: look_of(item[0]) if several else None)


def ends_text(interval: tuple[float, float] | None) -> str:
    """`[0.0021, 0.0084]`; "" for none."""
    return f"[{setting(interval[0], 3)}, {setting(interval[1], 3)}]" if interval else ""


def optimum_cell(optimum: Optimum, search: SearchRead) -> Cell:
    """The vertex of the fitted curve over its interval; why there is none."""
    if optimum.what and search.alone is None:
        return Cell(DASH, "other settings vary")
    if optimum.vertex is None:
        return Cell(DASH, optimum.reason)
    return Cell(setting(optimum.vertex, 3), ends_text(optimum.interval) or optimum.reason)


def flat_cell(optimum: Optimum, search: SearchRead, unit: str) -> Cell:
    """The range in which little is lost; an end that is only where the trials end is marked as such."""
    if optimum.flat is None or search.alone is None:
        return Cell(DASH)
    low, high = (setting(end, 3) for end in optimum.flat)
    ends = f"{'at most ' if optimum.flat_open[0] else ''}{low} to {'at least ' if optimum.flat_open[1] else ''}{high}"
    return Cell(ends, f"loses less than {number(optimum.effect, 3)} {unit}" if optimum.effect else "")


def edge_cell(optimum: Optimum) -> Cell:
    """Whether the best value lies at the edge of what was searched, and what to widen to."""
    if optimum.edge is None:
        return Cell("inside", "", "same")
    wider = f"try {setting(optimum.widen[0], 2)} to {setting(optimum.widen[1], 2)}" if optimum.widen else ""
    return Cell(f"at the {optimum.edge} edge", wider, "worse")


def settings_text(settings: Mapping[str, Any]) -> str:
    """`optim.lr 0.00213, model.norm rmsnorm`"""
    return ", ".join(f"{name} {setting(value)}" for name, value in settings.items())


def _figures(read: SweepRead, search: SearchRead, place: int | None = None) -> Iterator[style.Picture]:
    """The value of every trial of a search against each setting; `place`: its number among several searches."""
    prefix, of = ("", "") if place is None else (f"search-{place}-", f" ({search.label})")
    close, alone = read.record.smallest_effect or 0.05, len(search.axes) == 1
    for i, axis in enumerate(search.axes.values()):
        about = "" if i else " The other settings differ between the marks."
        caption = f"One mark per trial. {LEGEND}{_fit_caption(read, search, axis) if alone else about}"
        figure, title = against(search, axis, read.metric, close), f"Loss against {axis.name}{of}"
        yield style.picture(f"{prefix}against-{i}", title, caption, figure, "wide" if alone else "half")


def _fit_caption(read: SweepRead, search: SearchRead, axis: Axis) -> str:
    optimum = search.optima.get(axis.name)
    if optimum is None or optimum.curve is None:
        return f" No curve was fitted: {optimum.reason}." if optimum and optimum.reason else ""
    is_flat = optimum.flat and optimum.effect
    flat = f" Grey: less than {number(optimum.effect, 3)} {read.unit} is lost." if is_flat else ""
    band = " Blue band: the 95 % interval of the best setting." if optimum.interval else ""
    return f" Line: two half parabolas that meet at the optimum (dashed), fitted to the trials near it.{band}{flat}"


def _beside_each_other(read: SweepRead) -> Iterator[style.Picture]:
    """Several searches in one figure for every number that all of them search."""
    searches = list(read.searches.values())
    look = style.styles_of([s.label for s in searches], searches[0].label)
    shared = [a for a in searches[0].axes.values() if not a.choices and all(a.name in s.axes for s in searches)]
    for i, axis in enumerate(shared):
        figure = beside(span_of([search.axes[axis.name] for search in searches]), read.searches, look, read.metric)
        yield style.picture(f"beside-{i}", f"Loss against {axis.name}, search by search", BESIDE, figure)


def span_of(axes: Sequence[Axis]) -> Axis:
    """One axis over all of them."""
    return replace(axes[0], low=min(axis.low for axis in axes), high=max(axis.high for axis in axes))


def draw_axis(axes: Axes, axis: Axis, trials: Sequence[TrialRecord]) -> None:
    """Scale, limits, ticks and name of the horizontal axis: all of it, and what was tried beyond its ends."""
    axes.set_xlabel(shorten(axis.name, 40))
    if axis.choices:
        axes.set_xticks(range(len(axis.choices)), [shorten(choice, 16) for choice in axis.choices])
        axes.set_xlim(-0.6, len(axis.choices) - 0.4)
        if len(axis.choices) > 4:
            axes.tick_params(axis="x", rotation=30)
        axes.grid(visible=False, axis="x")
        return
    tried = [axis.place(trial) for trial in trials]
    known = [axis.low, axis.high, *(x for x in tried if math.isfinite(x) and (x > 0 or not axis.log))]
    low, high = min(known), max(known)
    if axis.log and low > 0:
        margin = (high / low) ** 0.03 if high > low else 1.5
        low, high = low / margin, high * margin
        axes.set_xscale("log")
        style.log_ticks(axes.xaxis, low, high)
    else:
        margin = 0.03 * (high - low) or 0.5
        low, high = low - margin, high + margin
        axes.locator_params(axis="x", nbins=6)
    axes.set_xlim(low, high)


def draw_points(axes: Axes, trials: Sequence[TrialRecord], best: TrialRecord | None, axis: Axis) -> None:
    """Every trial; those without a value, or above the frame, along its upper edge."""
    low, high = axes.get_ylim()
    size = 3.6 if len(trials) > MANY else 5.5
    upper, lower = (high - share * HEADROOM * (high - low) for share in (0.25, 0.7))
    places: dict[tuple[str, str], list[tuple[float, float]]] = {}  # one call for all that look alike: many are slow
    for trial in trials:
        x, value = axis.place(trial), last_value(trial)
        if not math.isfinite(x):
            continue
        x += 0.3 * ((trial.index * 0.618034) % 1 - 0.5) if axis.choices else 0.0  # trials must not hide each other
        above = value > high - HEADROOM * (high - low)
        y = lower if above else upper if math.isnan(value) else value
        mark = "^" if above else MARKS.get(trial.outcome, ".")
        places.setdefault((trial.outcome, mark), []).append((x, y))
        if trial is best:
            ring: dict[str, Any] = {"markerfacecolor": "none", "markersize": size + 5, "markeredgewidth": 1.4}
            axes.plot([x], [y], "o", color=INK, zorder=4, **ring)
    for (outcome, mark), marks in places.items():
        colour = COLOURS.get(outcome, MUTED)
        fill = SURFACE if outcome == PRUNED else colour
        alpha = 0.8 if outcome == FINISHED and len(trials) > MANY else 1.0
        options: dict[str, Any] = {"markersize": size, "markeredgewidth": 1.2, "zorder": 3, "alpha": alpha}
        axes.plot(*zip(*marks, strict=True), mark, color=colour, markerfacecolor=fill, linestyle="none", **options)


def set_limits(axes: Axes, trials: Sequence[TrialRecord], name: str) -> None:
    """The vertical axis; without a scale where no trial has a value."""
    axes.set_ylim(*limits_of(trials))
    if any(math.isfinite(last_value(trial)) for trial in trials):
        axes.set_ylabel(name)
        return
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    note(axes, "no trial has a value", (0.5, 0.45), (0, 0), "ff", ha="center", va="center", fontsize=9.5)


def limits_of(trials: Sequence[TrialRecord]) -> tuple[float, float]:
    """From the best value to the highest that does not squeeze the others, and room above for trials without one."""
    known = sorted(filter(math.isfinite, map(last_value, trials)))
    if not known:
        return 0.0, 1.0
    low = known[0]
    middle = float(np.quantile([trial.result for trial in trials if math.isfinite(trial.result)] or known, 0.75))
    high = max(min(known[-1], low + 4 * (middle - low)), middle)
    span = (high - low) or max(0.02 * abs(low), 1e-3)
    low, high = low - 0.14 * span, high + 0.06 * span
    return low, low + (high - low) / (1 - HEADROOM)


def against(search: SearchRead, axis: Axis, metric: str, close: float) -> Figure:
    """Value against one setting. Of the only dimension of a search the figure is wide, and its height is that of the
    trials near the best one, within some `close`, if there are enough of them: there lies the curve."""
    trials, best, alone = search.trials, search.best, len(search.axes) == 1
    near = [t for t in trials if abs(t.result - best.result) <= CLOSE * close] if best else []
    height = 3.1 if not alone else 3.9 if any(math.isfinite(last_value(t)) for t in trials) else 2.2
    figure, axes = style.panel(WIDE if alone else HALF, height)
    _draw_fitted(axes, search.fitted(axis.name))
    draw_axis(axes, axis, trials)
    closer = alone and len(near) >= ENOUGH and search.direction == "minimize"
    set_limits(axes, near if closer else trials, _in_unit(metric))
    draw_points(axes, trials, best, axis)
    if best and math.isfinite(x := axis.place(best)):
        label = f"best {shorten(setting(best.settings[axis.name]), 18)}"
        note(axes, label, (x, best.result), (0, -8), "dd", ha="center", va="top", color=INK)
    return figure


def _draw_fitted(axes: Axes, fitted: Optimum | None) -> None:
    """The flat range in grey, the interval of the optimum in colour, the fitted curve through both."""
    if fitted is None:
        return
    if fitted.flat:
        axes.axvspan(*fitted.flat, color=BAND, linewidth=0, zorder=0)
    if fitted.interval:
        axes.axvspan(*fitted.interval, color=ARMS[0], alpha=0.16, linewidth=0, zorder=1)
    if fitted.vertex is not None:
        axes.axvline(fitted.vertex, color=ARMS[0], linewidth=1, dashes=(3, 2), zorder=1)
    if (line := fitted.line()) is not None:
        axes.plot(*finite(line), color=ARMS[0], linewidth=1.6, alpha=0.75, zorder=2)


def _in_unit(metric: str) -> str:
    return f"{metric}, nats per token" if metric == LOSS else metric


def beside(axis: Axis, searches: Mapping[str, SearchRead], look: Mapping[str, ArmStyle], metric: str) -> Figure:
    """Value against one setting in several searches: marks, the fitted curve and a tick at the optimum of each."""
    figure, axes = style.panel(WIDE, 3.9)
    every = [trial for search in searches.values() for trial in search.trials]
    set_limits(axes, [trial for trial in every if math.isfinite(trial.result)], _in_unit(metric))
    draw_axis(axes, axis, every)
    low, high = axes.get_ylim()
    edge = high - 0.25 * HEADROOM * (high - low)
    ends: dict[str, float] = {}
    for label, search in searches.items():
        marker, colour = look[label].marker, look[label].colour
        for trial in search.trials:
            x, value = axis.place(trial), trial.result
            if math.isfinite(x) and math.isfinite(value):
                mark, y = marker if value <= high else "^", min(value, edge)
                axes.plot([x], [y], mark, color=colour, markersize=4.5, alpha=0.75, zorder=3)
            elif trial.outcome == DIVERGED and math.isfinite(x):
                axes.plot([x], [edge], "x", color=colour, markersize=5, zorder=3)
        fitted = search.fitted(axis.name)
        if fitted and (line := fitted.line()) is not None:
            axes.plot(*finite(line), color=colour, linestyle=look[label].dash, zorder=2)
        if fitted and fitted.interval:
            axes.axvspan(*fitted.interval, color=colour, alpha=0.13, linewidth=0, zorder=0)
        if search.best:
            ends[label] = search.best.result
    style.label_ends(axes, ends, look)
    return figure
