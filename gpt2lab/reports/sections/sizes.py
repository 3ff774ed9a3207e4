"""A sweep across sizes of the model: how the best setting moves with the number of parameters, and how activations grow
with width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2lab.analysis.results import cleaned
from gpt2lab.analysis.scaling import Transfer, transfer
from gpt2lab.analysis.tuning import Optimum
from gpt2lab.basics.text import DASH, quantity, setting, shorten
from gpt2lab.errors import Gpt2labError
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import Record, SweepRead, read_chosen, record_errors
from gpt2lab.reports.sections.searches import ends_text
from gpt2lab.reports.style import HALF, INK, SURFACE, WIDE, ArmStyle, finite, looks
from gpt2lab.reports.tables import Cell, Column, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 8
"""Parts of a model that are drawn, evenly from the first to the last; more lines could not be told apart."""

ACROSS = (
    "The best value at each size with its 95 % interval. Line: the power law that was fitted; hollow: what it predicts "
    "for the next size, with its interval."
)
COORDINATES = (
    "How far each part has moved from where it started, in models of growing width after the same few steps. Flat "
    "lines: every part moves as far at every width, so that one rate may serve all of them (Yang et al. 2022, "
    "arXiv:2203.03466)."
)


@dataclass(frozen=True, kw_only=True)
class AtScale:
    """One search at one scale."""

    scale: str
    parameters: float
    optimum: Optimum

    @property
    def at(self) -> float | None:
        """The best value, unless it lies at an edge: then it is only a bound."""
        return None if self.optimum.edge else self.optimum.vertex or self.optimum.best


@dataclass(frozen=True, kw_only=True)
class SearchOverScales:
    """One search (a variant, or the sweep's only one) over all scales, the smallest model first."""

    name: str
    """of the setting"""
    scales: Sequence[AtScale]
    transfer: Transfer


def across(read: SweepRead) -> dict[str, SearchOverScales]:
    """Label -> its search over all scales at which the store has this sweep; only searches over one number that were
    made at two or more. Raises DataFault for a damaged record."""
    records = [read.record]
    for name in read.store.sweeps():
        try:
            other = cleaned(read.store.sweep(name).plain())
            same = other["sweep"] == read.record["sweep"] and name != read.name
            if same and bool(other.get("part_of")) == bool(read.record.get("part_of")):
                over_scales([other])
                records.append(other)
        except (Gpt2labError, KeyError, TypeError, AttributeError):  # of another scale: left out
            continue
    with record_errors(read.name):
        return over_scales(records)


def over_scales(records: Sequence[Record]) -> dict[str, SearchOverScales]:
    """Label -> its search over the scales; only searches over one number that were made at two or more."""
    by_label: dict[str, list[AtScale]] = {}
    names: dict[str, str] = {}
    for record in sorted(records, key=lambda record: (record.get("scope") or {}).get("parameters") or 0):
        for label, search in record["searches"].items():
            optima = read_chosen(search, record).optima
            if len(search["space"]) == 1 and len(optima) == 1:
                name, optimum = next(iter(optima.items()))
                if names.setdefault(label, name) == name:
                    scale = AtScale(scale=record["scale"], parameters=search["parameters"], optimum=optimum)
                    by_label.setdefault(label, []).append(scale)
    return {
        label: SearchOverScales(
            name=names[label],
            scales=scales,
            transfer=transfer(
                [s.parameters for s in scales], [s.at for s in scales], [s.optimum.interval for s in scales],
                what=scales[0].optimum.what,
            ),
        )
        for label, scales in by_label.items()
        if len(scales) > 1
    }  # fmt: skip


@section(order=30, title="Across size", of="sweep")
def across_size(read: SweepRead) -> Section | None:
    found = read.once(across)
    if not found:
        return None
    labels, name = list(found), next(iter(found.values())).name
    figure = best_by_size(found, looks(labels, labels[0]), name)
    return Section(
        table=_table(found),
        points=[f"{label + ': ' if len(found) > 1 else ''}{search.transfer}" for label, search in found.items()],
        figures=[style.picture("across", f"The best {name} against the size of the model", ACROSS, figure)],
    )


def _table(found: Mapping[str, SearchOverScales]) -> Table:
    """One row per scale, the optimum of each search in a column."""
    columns = [Column("Scale"), Column("Parameters", "number")]
    columns += [Column(label if len(found) > 1 else f"Best {search.name}", "number") for label, search in found.items()]
    sizes = {scale.scale: scale.parameters for search in found.values() for scale in search.scales}
    rows = []
    for scale, parameters in sorted(sizes.items(), key=lambda item: item[1]):
        cells = [_cell(next((s for s in search.scales if s.scale == scale), None)) for search in found.values()]
        rows.append(Row((Cell(scale), Cell(quantity(parameters)), *cells)))
    laws = [search.transfer for search in found.values()]
    if any(law.at_target is not None for law in laws):
        target = next(law.target for law in laws if law.target is not None)
        rows.append(Row((Cell("predicted"), Cell(quantity(target)), *map(_predicted, laws))))
    return Table(columns, rows)


def _cell(scale: AtScale | None) -> Cell:
    if scale is None:
        return Cell()
    optimum = scale.optimum
    if optimum.best is None:
        return Cell(DASH, "no trial finished")
    if optimum.edge:
        return Cell(setting(optimum.best, 3), f"at the {optimum.edge} edge: left out")
    return Cell(setting(scale.at, 3), ends_text(optimum.interval) or optimum.reason)


def _predicted(law: Transfer) -> Cell:
    if law.at_target is None:
        return Cell(DASH)
    return Cell(setting(law.at_target, 3), ends_text(law.target_interval))


def best_by_size(found: Mapping[str, SearchOverScales], look: Mapping[str, ArmStyle], name: str) -> Figure:
    """The best setting against the size of the model, both logarithmic; hollow: what the law predicts."""
    figure, axes = style.panel(WIDE, 3.6, "parameters", f"best {shorten(name)}")
    axes.set(xscale="log", yscale="log")
    ends: dict[str, float] = {}
    sizes = set()
    for label, search in found.items():
        law, drawn = search.transfer, look[label]
        known = [(s.parameters, s.at, s.optimum.interval) for s in search.scales if s.at is not None]
        for parameters, at, interval in known:
            _mark(axes, parameters, at, interval, drawn, fill=drawn.colour)
        if law.line is not None:
            axes.plot(*finite(law.line), color=drawn.colour, linestyle=drawn.dash, linewidth=1.4, zorder=2)
        if law.target is not None and law.at_target is not None:
            _mark(axes, law.target, law.at_target, law.target_interval, drawn, fill=SURFACE)
            known.append((law.target, law.at_target, law.target_interval))
        if known:
            ends[label] = known[-1][1]
        sizes |= {parameters for parameters, _, _ in known}
    ticks = sorted(sizes)
    if ticks:
        axes.set_xlim(ticks[0] / 1.35, ticks[-1] * 1.35)
    axes.set_xticks(ticks, [quantity(parameters) for parameters in ticks])
    axes.set_xticks([], minor=True)
    style.log_ticks(axes.yaxis, *axes.get_ylim())
    if len(found) > 1:
        style.label_ends(axes, ends, look)
    return figure


def _mark(
    axes: Axes, size: float, at: float, interval: tuple[float, float] | None, look: ArmStyle, *, fill: str
) -> None:
    if interval:
        axes.plot([size] * 2, interval, color=look.colour, linewidth=1.6, zorder=2)
        axes.plot([size] * 2, interval, "_", color=look.colour, markersize=8, zorder=2)
    axes.plot([size], [at], look.marker, color=look.colour, markerfacecolor=fill, markersize=7, zorder=3)


@section(order=40, title="Coordinate check", of="sweep")
def coordinate_check(read: SweepRead) -> Section | None:
    variants = read.record.get("coordinates")
    if not variants:
        return None
    what = "change" if all("change" in variant for variant in variants.values()) else "rms"
    measured = {label: (variant["widths"], variant["steps"], variant[what]) for label, variant in variants.items()}
    figure = coordinates(measured, "rms of the change" if what == "change" else "rms of activations")
    steepest = [_steepest(label, variant.get("slopes") or {}) for label, variant in variants.items()]
    return Section(
        points=[sentence for sentence in steepest if sentence],
        figures=[style.picture("coordinates", "Change of activations against width", COORDINATES, figure)],
    )


def _steepest(label: str, slopes: Mapping[str, float | None]) -> str:
    """Which part moves most with width."""
    known = {name: slope for name, slope in slopes.items() if slope is not None}
    if not known:
        return ""
    name = max(known, key=lambda part: abs(known[part]))
    return (
        f"{label}: what changes most with width is {name}, as width^{known[name]:+.2f}; a power of 0 means that it "
        "moves as far at every width."
    )


Seen = Mapping[str, Sequence[Sequence[float | None]]]
"""name -> one row per width, one number per step."""


def coordinates(found: Mapping[str, tuple[Sequence[float], Sequence[int], Seen]], what: str) -> Figure:
    """What the parts of a model do after the last step against its width; `found` is variant -> (widths, steps, seen),
    `what` names the numbers."""
    figure = style.empty(WIDE if len(found) > 1 else HALF + 1.5, 3.6)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    names = _some(list(dict.fromkeys(name for _, _, seen in found.values() for name in seen)))
    look = looks(names, names[0]) if names else {}
    for axes, (variant, (widths, steps, seen)) in zip(panels, found.items(), strict=True):
        ends = _against_width(axes, widths, {name: seen.get(name) or () for name in names}, look)
        after = f", after {steps[-1]} steps" if steps else ""
        style.title(axes, f"{shorten(variant)}{after}")
    if names:
        panels[-1].autoscale_view()
        style.log_ticks(panels[0].yaxis, *panels[0].get_ylim())
        style.label_ends(panels[-1], ends, look)
    else:
        style.note(panels[0], "nothing was measured", (0.5, 0.5), (0, 0), "ff", ha="center", color=INK)
    panels[0].set_ylabel(what)
    return figure


def _against_width(axes: Axes, widths: Sequence[float], seen: Seen, look: Mapping[str, ArmStyle]) -> dict[str, float]:
    """One line per name -> where each ends."""
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="width (n_embd)")
    ends: dict[str, float] = {}
    for name, rows in seen.items():
        last = [row[-1] if row else None for row in rows]
        values = [math.nan if value is None or value <= 0 else float(value) for value in last]
        x, y = finite((list(widths)[: len(values)], values))
        line = look[name]
        axes.plot(x, y, color=line.colour, linestyle=line.dash, marker=line.marker, markersize=5, zorder=3)
        if y.size:
            ends[name] = float(y[-1])
    axes.set_xticks(list(widths), [f"{width:g}" for width in widths])
    axes.set_xticks([], minor=True)
    return ends


def _some(names: list[str]) -> list[str]:
    """At most MOST_NAMES of them, from the first to the last."""
    if len(names) <= MOST_NAMES:
        return names
    return [names[round(i * (len(names) - 1) / (MOST_NAMES - 1))] for i in range(MOST_NAMES)]
