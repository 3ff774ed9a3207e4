"""The searches of a sweep: the best value of every setting, and figures in which every trial is a mark or a line.

Outcomes look alike in all of them: filled is finished, hollow is pruned (at its last value), a cross along the upper
edge diverged, a plus there failed; a triangle lies above the frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2lab.analysis.results import LOSS, RATE
from gpt2lab.analysis.tuning import Optimum
from gpt2lab.basics.text import DASH, number, setting, shorten
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import (
    DIVERGED,
    FAILED,
    FINISHED,
    PRUNED,
    Axis,
    Record,
    SearchRead,
    SweepRead,
    TrialPoint,
    look_of,
)
from gpt2lab.reports.style import ARMS, BAND, GRID, HALF, INK, MUTED, RAMP, SURFACE, WIDE, ArmStyle, finite, note
from gpt2lab.reports.tables import Cell, Row, Table, columns, tabulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {FINISHED: ARMS[0], PRUNED: MUTED, DIVERGED: ARMS[1], FAILED: MUTED}
MARKS = {FINISHED: "o", PRUNED: "o", DIVERGED: "x", FAILED: "+"}
MANY = 60
"""Trials from which marks and lines are drawn smaller."""

CLOSE = 4
"""The close-up reaches this many smallest effects above the best value."""

HEADROOM = 0.13
"""Share of a figure's height that is kept for trials without a value."""

PAPER = {"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
"""Behind text that lines run through."""

LEGEND = (
    "Filled: finished; hollow: pruned, at its last value; along the upper edge a cross diverged, a plus failed, and a "
    "triangle lies above the frame."
)
PARALLEL = (
    "One line per trial through its settings to its value: the darker, the better; the best in bold, pruned ones in "
    "grey, diverged ones dotted."
)
CURVES = (
    "One line per trial, the best in bold; hollow ends were pruned, dashed ones with a cross diverged. Grey lines: "
    "what counting tokens (unigram) and pairs of tokens (bigram) reach. Values of trials rest on the final evaluation, "
    "which scores other tokens than these."
)
BESIDE = (
    "One mark per finished trial; lines: the fitted curves; bands: the 95 % intervals of the best settings; crosses "
    "along the upper edge diverged. Pruned trials are left out."
)
CHOICES = (
    "The best finished trial with each choice, and what else it had. A choice that was tried less often had fewer "
    "chances; a sampler that learns tries what did well more often."
)


@section(order=0, title="Best settings", of="sweep")
def best_settings(read: SweepRead) -> Section:
    front = _figures(read, read.single) if read.single else _beside_each_other(read)
    return Section(table=best_table(read), note=_table_note(read), front=list(front))


@section(order=20, of="sweep")
def choices(read: SweepRead) -> list[Section]:
    tables = [(search, choices_table(search)) for search in read.searches.values()]
    return [
        Section(title=read.titled(search, "The best per choice"), table=table, note=CHOICES)
        for search, table in tables
        if table
    ]


@section(order=80, title="Each search by itself", of="sweep")
def each_search(read: SweepRead) -> Section | None:
    if read.single:
        return None
    pictures = [picture for i, search in enumerate(read.searches.values()) for picture in _figures(read, search, i)]
    return Section(figures=pictures, folded=True)


def best_table(read: SweepRead) -> Table | None:
    """One row per setting of every search: its best value, how sure that is, how flat, whether it lies at an edge."""
    several = len(read.searches) > 1
    weighed = any(search.record.get("importance") for search in read.searches.values())

    def cells(item: tuple[int, SearchRead, Axis]) -> dict[str, Cell | str | None]:
        _, search, axis = item
        best, optimum = search.best, search.optima.get(axis.name)
        base = (search.record.get("base") or {}).get(axis.name)
        share = ((search.record.get("importance") or {}).get("values") or {}).get(axis.name)
        chosen = best["settings"].get(axis.name) if best else None
        reached = f"{read.metric} {number(best['value'])}" if best else ""
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


def _table_note(read: SweepRead) -> str:
    if not read.counts[FINISHED]:
        return "No trial has a final value, so there is no best one."
    sentences = ["Best trial: the settings of the best finished trial."]
    if any(search.alone for search in read.searches.values()):
        sentences.append(
            "Optimum: where the curve that was fitted to the trials is best, with its 95 % interval. Flat: as far as "
            "one may go before losing what was declared to matter."
        )
    if not all(search.alone for search in read.searches.values()):
        sentences.append("Where several settings vary at once no curve is fitted to one of them alone.")
    return " ".join([*sentences, "Edge: a best value at the edge of the space may lie beyond it."])


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


def choices_table(search: SearchRead) -> Table | None:
    """The best finished trial of every choice of every dimension that has choices."""
    best, rows = search.best, []
    for axis, choice in [(dimension, choice) for dimension in search.axes.values() for choice in dimension.choices]:
        trials = [trial for trial in search.trials if str(trial["settings"].get(axis.name)) == choice]
        done = [trial for trial in trials if trial["outcome"] == FINISHED and trial["value"] is not None]
        top = min(done, key=lambda t: -t["value"] if search.maximize else t["value"], default=None)
        behind = abs(top["value"] - best["value"]) if top and best else None
        others = {key: value for key, value in top["settings"].items() if key != axis.name} if top else {}
        cells = (Cell(choice, axis.name), Cell(number(top["value"] if top else None)),
                 Cell("best" if behind == 0 else number(behind)), Cell(str(len(done))), Cell(str(len(trials))),
                 Cell(settings_text(others)))  # fmt: skip
        rows.append(Row(cells, baseline=behind == 0))
    titles = columns("Choice", "Best:number", "Behind the best:number", "Finished:number", "Trials:number",
                     "With:words")  # fmt: skip
    return Table(titles, rows) if rows else None


def settings_text(settings: Record) -> str:
    """`optim.lr 0.00213, model.norm rmsnorm`"""
    return ", ".join(f"{name} {setting(value)}" for name, value in settings.items())


def _figures(read: SweepRead, search: SearchRead, place: int | None = None) -> Iterator[style.Picture]:
    """The figures of one search; `place`: its number among several."""
    prefix = "" if place is None else f"search-{place}-"
    of = "" if place is None else f" ({search.label})"
    metric, close, alone = read.metric, read.record.get("smallest_effect") or 0.05, len(search.axes) == 1
    width = "wide" if alone else "half"
    for i, axis in enumerate(search.axes.values()):
        about = "" if i else " The other settings differ between the marks."
        caption = f"One mark per trial. {LEGEND}{_fit_caption(read, search, axis) if alone else about}"
        figure = against(search, axis, metric, close)
        yield style.picture(f"{prefix}against-{i}", f"Loss against {axis.name}{of}", caption, figure, width)
    if not alone:
        yield style.picture(f"{prefix}parallel", f"Settings of every trial{of}", PARALLEL, parallel(search, metric))
    if any(point.curve[0] for point in search.points):
        floors = (read.record.get("floors") or {}) if metric == LOSS else {}
        axis = _rate(search)
        figure = curves(search, axis, floors, metric)
        yield style.picture(f"{prefix}curves", f"Training curves by {axis.name}{of}", CURVES, figure)
    caption = f"Line: the best finished trial so far. {LEGEND}"
    yield style.picture(f"{prefix}history", f"The best so far{of}", caption, history(search, metric), width)
    weighed = search.record.get("importance")
    if weighed and not alone:
        shares = {name: float(share) for name, share in weighed["values"].items() if share is not None}
        caption = (
            f"How much of the variation between finished trials each setting explains ({weighed['method']}). It "
            "describes this space: a wider range makes a setting more important."
        )
        yield style.picture(f"{prefix}importance", f"What mattered{of}", caption, importance(shares), "half")


def _fit_caption(read: SweepRead, search: SearchRead, axis: Axis) -> str:
    optimum = search.optima.get(axis.name)
    if optimum is None or optimum.curve is None:
        return f" No curve was fitted: {optimum.reason}." if optimum and optimum.reason else ""
    is_flat = optimum.flat and optimum.effect
    flat = f" Grey: less than {number(optimum.effect, 3)} {read.unit} is lost." if is_flat else ""
    band = " Blue band: the 95 % interval of the best setting." if optimum.interval else ""
    return f" Line: two half parabolas that meet at the optimum (dashed), fitted to the trials near it.{band}{flat}"


def _rate(search: SearchRead) -> Axis:
    """What curves are coloured by: the learning rate, else the first number, else the first setting."""
    numeric = [axis for axis in search.axes.values() if not axis.choices]
    return search.axes.get(RATE) or next(iter([*numeric, *search.axes.values()]))


def _beside_each_other(read: SweepRead) -> Iterator[style.Picture]:
    """Several searches in one figure for every number that all of them search."""
    searches = list(read.searches.values())
    look = style.looks([s.label for s in searches], searches[0].label)
    shared = [a for a in searches[0].axes.values() if not a.choices and all(a.name in s.axes for s in searches)]
    for i, axis in enumerate(shared):
        figure = beside(span_of([search.axes[axis.name] for search in searches]), read.searches, look, read.metric)
        yield style.picture(f"beside-{i}", f"Loss against {axis.name}, search by search", BESIDE, figure)


def span_of(axes: Sequence[Axis]) -> Axis:
    """One axis over all of them."""
    return replace(axes[0], low=min(axis.low for axis in axes), high=max(axis.high for axis in axes))


def around(axis: Axis, points: Sequence[TrialPoint]) -> tuple[float, float]:
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
    axes.set_xlabel(shorten(axis.name, 40))
    if axis.choices:
        axes.set_xticks(range(len(axis.choices)), [shorten(choice, 16) for choice in axis.choices])
        axes.set_xlim(-0.6, len(axis.choices) - 0.4)
        if len(axis.choices) > 4:
            axes.tick_params(axis="x", rotation=30)
        axes.grid(visible=False, axis="x")
        return
    if axis.log:
        axes.set_xscale("log")
        style.log_ticks(axes.xaxis, *limits)
    else:
        axes.locator_params(axis="x", nbins=6)
    axes.set_xlim(*limits)


def draw_points(
    axes: Axes, points: Sequence[TrialPoint], best: TrialPoint | None, x_of: Callable[[TrialPoint], float]
) -> None:
    """Every trial; those without a value, or above the frame, along its upper edge."""
    low, high = axes.get_ylim()
    size = 3.6 if len(points) > MANY else 5.5
    upper, lower = (high - share * HEADROOM * (high - low) for share in (0.25, 0.7))
    places: dict[tuple[str, str], list[tuple[float, float]]] = {}  # one call for all that look alike: many are slow
    for point in points:
        x = x_of(point)
        if not math.isfinite(x):
            continue
        above = point.has_value and point.value > high - HEADROOM * (high - low)
        y = lower if above else point.value if point.has_value else upper
        mark = "^" if above else MARKS.get(point.outcome, ".")
        places.setdefault((point.outcome, mark), []).append((x, y))
        if point is best:
            ring: dict[str, Any] = {"markerfacecolor": "none", "markersize": size + 5, "markeredgewidth": 1.4}
            axes.plot([x], [y], "o", color=INK, zorder=4, **ring)
    for (outcome, mark), marks in places.items():
        colour = COLOURS.get(outcome, MUTED)
        fill = SURFACE if outcome == PRUNED else colour
        alpha = 0.8 if outcome == FINISHED and len(points) > MANY else 1.0
        options: dict[str, Any] = {"markersize": size, "markeredgewidth": 1.2, "zorder": 3, "alpha": alpha}
        axes.plot(*zip(*marks, strict=True), mark, color=colour, markerfacecolor=fill, linestyle="none", **options)


def set_limits(axes: Axes, points: Sequence[TrialPoint], name: str) -> None:
    """The vertical axis; without a scale where no trial has a value."""
    axes.set_ylim(*limits_of(points))
    if any(point.has_value for point in points):
        axes.set_ylabel(name)
        return
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    note(axes, "no trial has a value", (0.5, 0.45), (0, 0), "ff", ha="center", va="center", fontsize=9.5)


def limits_of(points: Sequence[TrialPoint]) -> tuple[float, float]:
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


def against(search: SearchRead, axis: Axis, metric: str, close: float) -> Figure:
    """Value against one setting. The only dimension of a search has a wide figure, with a close-up of what lies within
    `close` of the best value where there is enough to see."""
    points, best, alone = search.points, search.best_point, len(search.axes) == 1
    fitted = search.fitted(axis.name)
    near = [p for p in points if p.finished and p.value <= best.value + CLOSE * close] if best else []
    window = _window(axis, search, near, close) if alone and best and not search.maximize else None
    height = 3.1 if not alone else 3.9 if any(point.has_value for point in points) else 2.2
    figure = style.empty(WIDE if alone else HALF, height)
    panels = list(figure.subplots(1, 2, width_ratios=(1, 1.05))) if window else [figure.subplots()]
    whole = around(axis, points)
    for axes, limits in zip(panels, (whole, window or whole), strict=False):
        _draw_fitted(axes, fitted)
        draw_axis(axes, axis, limits)
    set_limits(panels[0], points, _in_unit(metric))
    if window:
        panels[1].set_ylim(*limits_of(near))
        style.title(panels[1], "near the best")

    def x_of(point: TrialPoint) -> float:
        x = axis.number(point.settings.get(axis.name))
        jitter = 0.3 * ((point.slot * 0.618034) % 1 - 0.5) if axis.choices else 0.0  # names must not hide each other
        return x + jitter

    for axes in panels:
        draw_points(axes, points, best, x_of)
    if best and math.isfinite(x := axis.number(best.settings.get(axis.name))):
        label = f"best {shorten(setting(best.settings[axis.name]), 18)}"
        note(panels[-1], label, (x, best.value), (0, -8), "dd", ha="center", va="top", color=INK)
    return figure


def _window(axis: Axis, search: SearchRead, near: Sequence[TrialPoint], close: float) -> tuple[float, float] | None:
    """The part of the axis that a close-up of trials `near` the best shows; None where it would show the same as the
    whole, or too little."""
    ends = [axis.number(point.settings.get(axis.name)) for point in near]
    if axis.choices or len(ends) < 4:
        return None
    if fitted := search.fitted(axis.name):
        ends += [*(fitted.flat or ()), *(fitted.interval or ())]
    ends = [end for end in ends if math.isfinite(end)]
    low, high = max(min(ends), axis.low), min(max(ends), axis.high)
    share = axis.share(high) - axis.share(low)
    whole = max(p.value for p in search.points if p.has_value) - min(p.value for p in near)
    return padded(axis, low, high, 0.08) if 0 < share < 0.75 or whole >= 2 * CLOSE * close else None


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


def history(search: SearchRead, metric: str) -> Figure:
    """Value over trials, with the best one so far; wide where no other figure is at its side."""
    from matplotlib.ticker import MaxNLocator

    alone, points = len(search.axes) == 1, sorted(search.points, key=lambda point: point.slot)
    known = any(point.has_value for point in points)
    figure, axes = style.panel(WIDE if alone else HALF, (2.8 if alone else 3.1) if known else 2.0, "trial")
    set_limits(axes, points, metric)
    steps: list[tuple[int, float]] = []
    sign = -1 if search.maximize else 1
    for point in points:
        if point.finished and (not steps or sign * point.value < sign * steps[-1][1]):
            steps.append((point.slot, point.value))
    if steps:
        x, y = zip(*steps, (points[-1].slot, steps[-1][1]), strict=True)
        axes.plot(x, y, color=INK, linewidth=1.2, drawstyle="steps-post", zorder=2)
    draw_points(axes, points, search.best_point, lambda point: point.slot)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return figure


def importance(shares: Mapping[str, float]) -> Figure:
    """One bar per dimension, the longest on top; `shares` sum to one."""
    height = max(1.6, 0.9 + 0.36 * len(shares))
    figure, axes = style.panel(HALF, height, "share of the variation between trials")
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    for row, (_, share) in enumerate(ordered):
        axes.barh([row], [share], height=0.55, color=ARMS[0], zorder=2)
        note(axes, f"{100 * share:.0f} %", (share, row), (5, 0), "dd", va="center", color=INK)
    style.rows(axes, [name for name, _ in ordered])
    axes.set_xlim(0, 1.12 * max(shares.values(), default=1.0) or 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.locator_params(axis="x", nbins=5)
    return figure


def _in_unit(metric: str) -> str:
    return f"{metric}, nats per token" if metric == LOSS else metric


def beside(axis: Axis, searches: Mapping[str, SearchRead], look: Mapping[str, ArmStyle], metric: str) -> Figure:
    """Value against one setting in several searches: marks, the fitted curve and a tick at the optimum of each."""
    figure, axes = style.panel(WIDE, 3.9)
    every = [point for search in searches.values() for point in search.points]
    set_limits(axes, [point for point in every if point.finished], _in_unit(metric))
    draw_axis(axes, axis, around(axis, every))
    low, high = axes.get_ylim()
    edge = high - 0.25 * HEADROOM * (high - low)
    ends: dict[str, float] = {}
    for label, search in searches.items():
        marker, colour = look[label].marker, look[label].colour
        for point in search.points:
            x = axis.number(point.settings.get(axis.name))
            if point.finished and math.isfinite(x):
                mark, y = marker if point.value <= high else "^", min(point.value, edge)
                axes.plot([x], [y], mark, color=colour, markersize=4.5, alpha=0.75, zorder=3)
            elif point.outcome == DIVERGED and math.isfinite(x):
                axes.plot([x], [edge], "x", color=colour, markersize=5, zorder=3)
        fitted = search.fitted(axis.name)
        if fitted and (line := fitted.line()) is not None:
            axes.plot(*finite(line), color=colour, linestyle=look[label].dash, zorder=2)
        if fitted and fitted.interval:
            axes.axvspan(*fitted.interval, color=colour, alpha=0.13, linewidth=0, zorder=0)
        if search.best_point:
            ends[label] = search.best_point.value
    style.label_ends(axes, ends, look)
    return figure


def parallel(search: SearchRead, metric: str) -> Figure:
    """Every trial as a line through its settings to its value, in the colours of the ramp by value; the best in ink."""
    figure, axes = style.panel(WIDE, 3.6)
    space, points, best = list(search.axes.values()), search.points, search.best_point
    low, high = limits_of([point for point in points if point.finished])
    outcome = Axis(name=metric, low=low, high=high)
    order = sorted(points, key=lambda p: (p is best, p.finished, p.value if search.maximize else -p.value))
    for point in order:
        end = outcome.share(point.value)
        options: dict[str, Any] = {"color": GRID, "linewidth": 0.7 if len(points) > MANY else 1.2, "zorder": 2}
        if point.outcome == DIVERGED:
            end = end if math.isfinite(end) else 1.0
            options |= {"color": COLOURS[DIVERGED], "dashes": (2, 2), "linewidth": 0.7, "alpha": 0.5}
        elif point is best:
            options |= {"color": INK, "linewidth": 2.4, "zorder": 5}
        elif point.finished:
            options |= {"color": RAMP[level(end)], "zorder": 3}
        y = [axis.share(point.settings.get(axis.name)) for axis in space]
        axes.plot(range(len(space) + 1), [*y, end], **options)
    for place, axis in enumerate([*space, outcome]):
        axes.axvline(place, color=MUTED, linewidth=1, zorder=4)
        for share, text in _ends(axis):
            note(axes, shorten(text, 16), (place, share), (4, 0), "dd", va="center", fontsize=8, bbox=PAPER)
    axes.set_xticks(range(len(space) + 1), [shorten(axis.name.rpartition(".")[2], 18) for axis in space] + [metric])
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(space) + 0.35)
    axes.set_ylim(-0.05, 1.05)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def _ends(axis: Axis) -> list[tuple[float, str]]:
    """What is written along one axis of parallel coordinates."""
    if axis.choices:
        return [(axis.share(choice), choice) for choice in axis.choices]
    middle = math.sqrt(axis.low * axis.high) if axis.log else (axis.low + axis.high) / 2
    values = (axis.low, middle, axis.high)
    return [(axis.share(x), setting(x, 2) if abs(x) < 100 else f"{x:.0f}") for x in values]


def level(share: float) -> int:
    """The colour of the ramp for a share of the way from low to high."""
    return min(int(share * len(RAMP)), len(RAMP) - 1) if math.isfinite(share) else 0


def curves(search: SearchRead, axis: Axis, floors: Mapping[str, float], metric: str) -> Figure:
    """Value during training, coloured by one setting: the whole of training, and its last 30 %."""
    points = {point.slot: xy for point in search.points if (xy := finite(point.curve))[0].size}
    drawn = [point for point in search.points if point.slot in points]
    axis, best = _tried(axis, drawn), search.best_point
    last = max((float(x.max()) for x, _ in points.values()), default=0.0)
    ends = [y for p in drawn if p.finished and (y := style.since([p.curve], style.ZOOM_FROM * last)[1]).size]
    zoom = None
    if any(y.size > 1 for y in ends):
        low = min(float(y.min()) for y in ends)
        high = max(float(np.quantile([y.max() for y in ends], 0.75)), low + 1e-3)
        zoom = (low - 0.08 * (high - low), high + 0.08 * (high - low))

    def draw(axes: Axes) -> None:
        for point in drawn:
            _draw_curve(axes, axis, point, best, len(drawn))

    losses = [y for _, y in points.values()]
    figure, panels = style.over_training(draw, last, metric, floors, losses, zoom, bar=True)
    _colourbar(panels[-1], axis)
    return figure


def _tried(axis: Axis, points: Sequence[TrialPoint]) -> Axis:
    """The part of an axis that these trials lie in, so that their colours differ as much as they can."""
    known = [x for point in points if math.isfinite(x := axis.number(point.settings.get(axis.name)))]
    return axis if axis.choices or not known else replace(axis, low=min(known), high=max(known))


def _draw_curve(axes: Axes, axis: Axis, point: TrialPoint, best: TrialPoint | None, count: int) -> None:
    x, y = finite(point.curve)
    colour = RAMP[level(axis.share(point.settings.get(axis.name)))]
    width = 2.6 if point is best else 0.8 if count > MANY else 1.3
    options: dict[str, Any] = {"dashes": (2, 2)} if point.outcome == DIVERGED else {}
    axes.plot(x, y, color=colour, linewidth=width, zorder=4 if point is best else 3, **options)
    if point.outcome == DIVERGED:
        axes.plot(x[-1:], y[-1:], "x", color=colour, markersize=7, markeredgewidth=2, zorder=4)
    elif point.outcome == PRUNED or x.size == 1:
        fill = SURFACE if point.outcome == PRUNED else colour
        axes.plot(x[-1:], y[-1:], "o", color=colour, markerfacecolor=fill, markersize=4.5, zorder=4)


def _colourbar(axes: Axes, axis: Axis) -> None:
    """The ramp as blocks: a picture of it would not be drawn under the page's policy."""
    from matplotlib.patches import Rectangle

    height = 1 / len(RAMP)
    for step, colour in enumerate(RAMP):
        axes.add_patch(Rectangle((0, step * height), 1, height, color=colour, linewidth=0))
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[])
    axes.grid(visible=False)
    axes.yaxis.tick_right()
    axes.set_yticks([share for share, _ in _ends(axis)], [shorten(text, 14) for _, text in _ends(axis)])
    axes.set_title(shorten(axis.name.rpartition(".")[2], 14), fontsize=9, color=MUTED, loc="left")
    axes.spines[["left", "bottom"]].set_visible(False)
