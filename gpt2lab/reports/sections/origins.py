"""Where differences come from: by position in the context, by how frequent the token is, and by document.

Description only: nothing of it was declared, so no sentence here uses a term of the verdicts. Every number is a
difference in mean loss, arm minus baseline, in nats, over some of the final evaluation's targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.results import StudyRun
from gpt2lab.analysis.statistics import Comparison, welch
from gpt2lab.basics.text import plural, shorten
from gpt2lab.errors import DataFault
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead, Summary
from gpt2lab.reports.style import WIDE, ArmStyle, note, picture
from gpt2lab.reports.tables import Cell, Table, difference_cell
from gpt2lab.store.parts import DIVISIONS, DOCUMENT, FREQUENCY, POSITION, PartLosses, read_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

WIDEST = 3.0
"""An interval is drawn to this many times the largest difference; beyond, it would squeeze the rest."""

TICKS = [4**power for power in range(12)]
CHANGES = {POSITION: "tokens seen", FREQUENCY: "rank"}
LABEL = "difference in loss, nats"


@section(order=40, title="Where the difference comes from")
def where_from(read: StudyRead) -> Section | None:
    divided = read.once(origins)
    if not divided.divisions:
        return Section(points=left_out(divided)) if divided.lacking else None
    return Section(
        table=_table(read, divided),
        note=_note(divided),
        points=left_out(divided),
        figures=drawn(divided, read.styles, read.baseline),
    )


Parts = Mapping[str, PartLosses]
"""Of one run: division -> the loss in each of its groups."""


@dataclass(frozen=True, kw_only=True)
class OriginTable:
    """One way to divide the targets. examples: what is in a group, or nothing. arms: arm -> its difference to the
    baseline in every group (group,). changes: arm -> that of the last group less that of the first ()."""

    name: str
    groups: Sequence[str]
    examples: Sequence[str]
    arms: Mapping[str, Comparison]
    changes: Mapping[str, Comparison]


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What was measured of a study's differences. totals: arm -> its difference over all targets. lacking: arm ->
    usable runs that kept nothing. apart: arms that cannot be compared. level: of every interval."""

    divisions: Sequence[OriginTable] = ()
    totals: Mapping[str, Comparison] = field(default_factory=dict)
    lacking: Mapping[str, int] = field(default_factory=dict)
    apart: Sequence[str] = ()
    level: float = 0.95


def origins(read: StudyRead) -> Origins:
    """Of every arm but those that cannot be compared with the baseline. Failed runs are left out, and so are arms of
    which some run has no parts, for the others would not represent it."""
    if read.study.validation_text:  # tokens of several tokenizers have no parts in common
        return Origins()
    baseline, alpha = read.baseline, read.study.alpha
    apart = [c.arm for c in read.verdicts.contrasts if c.word == "not comparable" and c.against == baseline]
    parts: dict[str, list[Parts]] = {}
    for run in read.usable:
        if run.arm not in apart:
            parts.setdefault(run.arm, []).append(_parts(run, read))
    lacking = {arm: count for arm, runs in parts.items() if (count := sum(POSITION not in run for run in runs))}
    whole = {arm: parts[arm] for arm in read.study.arms if arm in parts and arm not in lacking}
    ours = {arm: runs for arm, runs in whole.items() if arm != baseline}
    if baseline not in whole or not ours:
        return Origins(lacking=lacking, apart=apart, level=1 - alpha)
    base = whole[baseline]
    divisions = [division for name in DIVISIONS if (division := _division(name, ours, base, alpha)) is not None]
    totals = {arm: welch(_totals(runs), _totals(base), alpha=alpha) for arm, runs in ours.items()}
    return Origins(divisions=divisions, totals=totals, lacking=lacking, apart=apart, level=1 - alpha)


def _parts(run: StudyRun, read: StudyRead) -> Parts:
    """The losses by part of a run's final evaluation; empty where they are missing or damaged."""
    try:
        return read_parts(read.store.run(run.id).parts(read.study.evaluation.key))
    except DataFault:
        return {}


def _division(
    name: str, arms: Mapping[str, Sequence[Parts]], base: Sequence[Parts], alpha: float
) -> OriginTable | None:
    """Arms whose runs were divided otherwise than the baseline's first are left out."""
    first = base[0].get(name)
    if first is None or len(first.groups) < 2 or not all(_alike(run.get(name), first) for run in base):
        return None
    theirs = _losses(name, base)
    alike = {
        arm: _losses(name, runs) for arm, runs in arms.items() if all(_alike(run.get(name), first) for run in runs)
    }
    if not alike:
        return None
    return OriginTable(
        name=name,
        groups=first.groups,
        examples=first.examples if len(first.examples) == len(first.groups) else (),
        arms={arm: welch(ours, theirs, alpha=alpha) for arm, ours in alike.items()},
        changes={arm: welch(ours[-1] - ours[0], theirs[-1] - theirs[0], alpha=alpha) for arm, ours in alike.items()},
    )


def _alike(part: PartLosses | None, first: PartLosses) -> bool:
    return part is not None and (part.groups, part.targets) == (first.groups, first.targets)


def _losses(name: str, runs: Sequence[Parts]) -> Array:
    """-> (group, seed)"""
    return np.array([run[name].losses for run in runs], dtype=np.float64).T


def _totals(runs: Sequence[Parts]) -> Array:
    """Mean loss over all targets.  -> (seed,)"""
    return np.array([np.average(run[POSITION].losses, weights=run[POSITION].targets) for run in runs])


def _table(read: StudyRead, origins: Origins) -> Table | None:
    """One row per arm that has a difference."""

    def cells(arm: Summary) -> dict[str, Cell | str]:
        row: dict[str, Cell | str] = {"All targets:number": _cell(origins.totals[arm.arm])}
        for division in origins.divisions:
            differences = division.arms.get(arm.arm)
            if division.name == DOCUMENT:
                sides = (differences.difference, differences.high) if differences else ()
                counts = [int((side < 0).sum()) for side in sides]
                title = f"Below 0 in {plural(len(division.groups), 'document')}:number"
                row[title] = Cell(str(counts[0]), f"{counts[1]} by the interval") if counts else ""
                continue
            for place in (0, -1):
                title = label(division, place)
                row[f"{title[0].upper()}{title[1:]}:number"] = _cell(differences, place) if differences else ""
            change = division.changes.get(arm.arm)
            row[f"Change with {CHANGES[division.name]}:number"] = _cell(change) if change else ""
        return row

    return read.arm_table(cells, origins.totals)


def _cell(compared: Comparison, place: int | None = None) -> Cell:
    """A difference, or that of one group, over its interval."""
    numbers = compared.difference, compared.low, compared.high
    difference, low, high = (float(number if place is None else number[place]) for number in numbers)
    return difference_cell(difference, low, high)


def label(division: OriginTable, group: int) -> str:
    """`1 token seen`, `79–128 tokens seen`; `rank 1`, `ranks 28–256`."""
    name = division.groups[group]
    shown = span(name)
    if division.name == POSITION:
        return f"{shown} {'token' if shown == '1' else 'tokens'} seen"
    return f"{'rank' if shown == name.partition('-')[0] else 'ranks'} {shown}"


def span(group: str) -> str:
    """`79-128` as `79–128`, `3-3` as `3`."""
    first, _, last = group.partition("-")
    return first if first == last else f"{first}–{last}"


def _note(origins: Origins) -> str:
    """What the numbers are, and what they are not."""
    count = sum(arm.difference.size for division in origins.divisions for arm in division.arms.values())
    percent, luck = f"{100 * origins.level:g} %", count * (1 - origins.level)
    return (
        "Exploratory: none of this was declared, and none of it decides a verdict. Differences in mean loss, arm minus "
        "baseline, over parts of the final evaluation's targets, in nats; failed runs are left out. Below each is its "
        f"{percent} interval over seeds (Welch), unadjusted: of these {count} about {luck:.0f} would "
        "miss the true difference by chance. Tokens seen: the number of tokens that a prediction can use. Ranks: "
        "tokens by frequency in the training text, 1 the most frequent, in groups of about equal share. The table "
        "shows the first and last group of both, and the change between them; the figure shows all groups."
    )


def left_out(origins: Origins) -> list[str]:
    """Arms without such numbers, and why."""
    sentences = []
    if origins.lacking:
        listed = ", ".join(f"{arm} ({plural(count, 'run')})" for arm, count in origins.lacking.items())
        sentences.append(f"Without losses by part of the text: {listed}.")
    if origins.apart:
        sentences.append(f"Not comparable, so without a difference: {', '.join(origins.apart)}.")
    return sentences


def drawn(origins: Origins, look: Mapping[str, ArmStyle], baseline: str) -> list[style.Picture]:
    """Differences by tokens seen and by rank, of those that the study has data for."""
    by_name = {division.name: division for division in origins.divisions if division.name != DOCUMENT}
    if not by_name:
        return []
    figure = style.empty(WIDE, 3.6)
    panels = figure.subplots(1, len(by_name), squeeze=False)[0]
    for axes, division in zip(panels, by_name.values(), strict=True):
        if division.name == POSITION:
            _over_positions(axes, division, look)
        else:
            _over_ranks(axes, division, look)
    panels[0].set_ylabel(LABEL)
    note(panels[0], f"above 0: higher loss than {shorten(baseline, 20)}", (0, 1), (0, 3), "ff", ha="left", va="bottom")
    arms = next(iter(by_name.values())).arms
    style.legend(figure, arms, look)
    caption = (
        "Left: the difference by the amount of context that a prediction can use; right: by the frequency of the "
        "predicted token in the training text, with the most frequent tokens of each group below its ranks (␣ is a "
        f"blank, ⏎ a new line). Bands: {100 * origins.level:g} % intervals over seeds, unadjusted, cut off where they "
        "would squeeze the rest."
    )
    return [picture("origins", "Difference by part of the text", caption, figure)]


def _over_positions(axes: Axes, division: OriginTable, look: Mapping[str, ArmStyle]) -> None:
    bands = [tuple(map(int, group.split("-"))) for group in division.groups]
    axes.set_xscale("log", base=2)
    _lines(axes, [math.sqrt(first * last) for first, last in bands], division.arms, look)
    ticks = [tick for tick in TICKS if tick <= bands[-1][-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens seen")


def _over_ranks(axes: Axes, division: OriginTable, look: Mapping[str, ArmStyle]) -> None:
    """Groups of tokens, each as wide as the other."""
    x, labels = list(range(len(division.groups))), [span(group) for group in division.groups]
    if division.examples:
        labels = [f"{ranks} {shorten(text, 8)}" for ranks, text in zip(labels, division.examples, strict=True)]
    _lines(axes, [float(place) for place in x], division.arms, look)
    axes.set_xticks(x, labels, rotation=90 if len(x) > 4 else 0)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("rank of the predicted token")


def _lines(axes: Axes, x: Sequence[float], arms: Mapping[str, Comparison], look: Mapping[str, ArmStyle]) -> None:
    """A line for each arm over the band of its intervals, unless these would squeeze the lines."""
    values = np.concatenate([compared.difference for compared in arms.values()])
    ends = np.concatenate([end for compared in arms.values() for end in (compared.low, compared.high)])
    low, high = style.intervals_within([0.0, *values], list(ends), WIDEST * float(np.abs(values).max()))
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    style.zero_line(axes, "horizontal")
    for arm, compared in arms.items():
        line = look[arm]
        if np.isfinite(compared.low).all():
            band = np.maximum(compared.low, low), np.minimum(compared.high, high)
            axes.fill_between(x, *band, color=line.colour, alpha=0.16, linewidth=0, zorder=2)
        options: dict[str, Any] = {"color": line.colour, "linestyle": line.dash, "marker": line.marker, "markersize": 5}
        axes.plot(x, compared.difference, zorder=3, **options)
    axes.set_ylim(low, high)
