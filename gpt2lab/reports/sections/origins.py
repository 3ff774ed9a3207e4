"""Where differences come from: by position in the context, by how frequent the token is, and by document.

Description only: nothing of it was declared, so no sentence here uses a term of the verdicts. Every number is a
difference in mean loss, arm minus baseline, in nats, over some of the final evaluation's targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.results import StudyRun
from gpt2lab.analysis.statistics import welch
from gpt2lab.basics.text import plural, shorten
from gpt2lab.errors import DataFault
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead, Summary
from gpt2lab.reports.style import HALF, WIDE, ArmStyle, note, panel, picture
from gpt2lab.reports.tables import Cell, Table, difference_cell
from gpt2lab.store.parts import DIVISIONS, DOCUMENT, FREQUENCY, POSITION, PartLosses, read_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

WIDEST = 3.0
"""An interval is drawn to this many times the largest difference; beyond, it would squeeze the rest."""

TICKS = [4**power for power in range(12)]
LABEL = "difference in loss, nats"


@section(order=40, title="Where the difference comes from")
def where_from(read: StudyRead) -> Section | None:
    found = read.once(origins)
    if not found.divisions:
        return Section(points=left_out(found)) if found.lacking else None
    return Section(
        table=_table(read, found),
        note=_note(found),
        points=[*points(found, read.baseline), *left_out(found)],
        figures=drawn(found, read.looks, read.baseline),
    )


@dataclass(frozen=True)
class GroupDifference:
    """A difference and its interval by Welch's test over seeds, not adjusted for anything; NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of 0, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


Arms = Mapping[str, Sequence[GroupDifference]]
Parts = Mapping[str, PartLosses]
"""Of one run: division -> the loss in each of its groups."""


@dataclass(frozen=True, kw_only=True)
class OriginTable:
    """One way to divide the targets. shares: of all targets, by group. examples: what is in a group, or nothing.
    arms: arm -> its difference to the baseline in every group. changes: arm -> that of the last group less that of the
    first."""

    name: str
    groups: Sequence[str]
    shares: Sequence[float]
    examples: Sequence[str]
    arms: Arms
    changes: Mapping[str, GroupDifference]

    def part(self, arm: str, group: int) -> float:
        """What a group contributes to the arm's difference over all targets, as a share of it."""
        parts = [share * difference.value for share, difference in zip(self.shares, self.arms[arm], strict=True)]
        return parts[group] / sum(parts)


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What was measured of a study's differences. totals: arm -> its difference over all targets. seeds: arm, the
    baseline too -> its runs. lacking: arm -> usable runs that kept nothing. apart: arms that cannot be
    compared. level: of every interval."""

    divisions: Sequence[OriginTable] = ()
    totals: Mapping[str, GroupDifference] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
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
    totals = {arm: _difference(_totals(runs), _totals(base), alpha) for arm, runs in ours.items()}
    seeds = {arm: len(runs) for arm, runs in whole.items()}
    return Origins(divisions=divisions, totals=totals, seeds=seeds, lacking=lacking, apart=apart, level=1 - alpha)


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
        shares=[count / sum(first.targets) for count in first.targets],
        examples=first.examples if len(first.examples) == len(first.groups) else (),
        arms={
            arm: [_difference(a, b, alpha) for a, b in zip(ours, theirs, strict=True)] for arm, ours in alike.items()
        },
        changes={arm: _difference(ours[-1] - ours[0], theirs[-1] - theirs[0], alpha) for arm, ours in alike.items()},
    )


def _alike(part: PartLosses | None, first: PartLosses) -> bool:
    return part is not None and (part.groups, part.targets) == (first.groups, first.targets)


def _losses(name: str, runs: Sequence[Parts]) -> Array:
    """-> (group, seed)"""
    return np.array([run[name].losses for run in runs], dtype=np.float64).T


def _totals(runs: Sequence[Parts]) -> Array:
    """Mean loss over all targets.  -> (seed,)"""
    return np.array([np.average(run[POSITION].losses, weights=run[POSITION].targets) for run in runs])


def _difference(ours: Array, theirs: Array, alpha: float) -> GroupDifference:
    """(seed,), (seed,)"""
    test = welch(ours, theirs, alpha=alpha)
    return GroupDifference(float(test.difference), float(test.low), float(test.high))


def _table(read: StudyRead, origins: Origins) -> Table | None:
    """One row per arm that has a difference."""

    def cells(arm: Summary) -> dict[str, Cell | str]:
        row: dict[str, Cell | str] = {"All targets:number": _cell(origins.totals[arm.arm])}
        for division in origins.divisions:
            differences = division.arms.get(arm.arm)
            if division.name == DOCUMENT:
                count = sum(difference.value < 0 for difference in differences or ())
                sure = sum(difference.sign < 0 for difference in differences or ())
                title = f"Below 0 in {plural(len(division.groups), 'document')}:number"
                row[title] = Cell(str(count), f"{sure} by the interval") if differences else ""
                continue
            for place in (0, -1):
                title = label(division, place)
                row[f"{title[0].upper()}{title[1:]}:number"] = _cell(differences[place]) if differences else ""
        return row

    return read.arm_table(cells, origins.totals)


def _cell(difference: GroupDifference) -> Cell:
    return difference_cell(difference.value, difference.low, difference.high)


def label(division: OriginTable, group: int) -> str:
    """`1 token seen`, `79–128 tokens seen`; `rank 1`, `ranks 28–256`; the name of a document."""
    name = division.groups[group]
    if division.name == DOCUMENT:
        return name
    shown = span(name)
    many = shown != "1" if division.name == POSITION else shown != name.partition("-")[0]
    if division.name == POSITION:
        return f"{shown} {'tokens' if many else 'token'} seen"
    return f"{'ranks' if many else 'rank'} {shown}"


def span(group: str) -> str:
    """`79-128` as `79–128`, `3-3` as `3`."""
    first, _, last = group.partition("-")
    return first if first == last else f"{first}–{last}"


def points(origins: Origins, baseline: str) -> list[str]:
    """One sentence for each arm, in its order."""
    return [
        f"{arm}: its difference to {baseline} "
        + "; ".join(
            _over_documents(division.arms[arm])
            if division.name == DOCUMENT
            else f"{_movement(division, arm, baseline)}{_last_group(division, arm, origins)}"
            for division in origins.divisions
            if arm in division.arms
        )
        + "."
        for arm in origins.totals
    ]


def _movement(division: OriginTable, arm: str, baseline: str) -> str:
    """From the first group to the last, and which side that favours where the seeds can tell."""
    ends = f"from {label(division, 0)} to {span(division.groups[-1])}"
    if division.name == FREQUENCY:
        ends = f"from the most frequent tokens ({label(division, 0)}) to the rarest ({label(division, -1)})"
    change = division.changes[arm]
    if not change.has_interval:
        conclusion = "with no interval, for lack of seeds"
    elif change.sign == 0:
        conclusion = "which these seeds cannot tell from no change"
    else:
        conclusion = f"in favour of {arm if change.sign < 0 else baseline}"
    cell = _cell(change)
    return f"moves by {cell.text} nats" + (f" {cell.detail}" if cell.detail else "") + f" {ends}, {conclusion}"


def _last_group(division: OriginTable, arm: str, origins: Origins) -> str:
    """How much of the difference lies in the last group, where that matters; it means nothing where groups are known to
    differ in opposite directions."""
    total, differences = origins.totals[arm], division.arms[arm]
    against = any(d.sign == -total.sign for d in differences) or differences[-1].value * total.value <= 0
    if total.sign == 0 or division.changes[arm].sign == 0 or against:
        return ""
    targets, part = division.shares[-1], division.part(arm, -1)
    return f" ({label(division, -1)}: {100 * targets:.0f} % of the targets, {100 * part:.0f} % of the difference)"


def _over_documents(differences: Sequence[GroupDifference]) -> str:
    sides: list[str] = []
    for side, sign in (("below", -1), ("above", 1)):
        count = sum(difference.value * sign > 0 for difference in differences)
        if count:
            sure = sum(difference.sign == sign for difference in differences)
            of = "" if sides else f" of {plural(len(differences), 'document')}"
            sides.append(f"{side} 0 in {count}{of} ({sure} by the interval)")
    return f"is {' and '.join(sides)}" if sides else "is 0 in every document"


def _note(origins: Origins) -> str:
    """What the numbers are, and what they are not."""
    count = sum(len(differences) for division in origins.divisions for differences in division.arms.values())
    percent, luck = f"{100 * origins.level:g} %", count * (1 - origins.level)
    return (
        "Exploratory: none of this was declared, and none of it decides a verdict. Differences in mean loss, arm minus "
        "baseline, over parts of the final evaluation's targets, in nats; failed runs are left out. Below each its "
        f"{percent} interval over seeds (Welch), every one by itself: of the {count} in the figures about {luck:.0f} "
        "would miss the true difference by luck. Tokens seen: how many a prediction can use. Ranks: tokens by how "
        "frequent they are in the training text, 1 the most frequent, in groups of about equal share of it. The table "
        "has the ends of both, the figures all of it."
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
    """Every figure that the study has data for."""
    by_name = {division.name: division for division in origins.divisions}
    percent = f"{100 * origins.level:g} % intervals over seeds, each by itself, cut where they would squeeze the rest"
    pictures = []
    if POSITION in by_name:
        width, height = ("half", _height(by_name[DOCUMENT])) if DOCUMENT in by_name else ("wide", 3.4)
        caption = f"How the difference depends on how much of the context a prediction can use. Bands: {percent}."
        figure = _by_position(by_name[POSITION], look, baseline, WIDE if width == "wide" else HALF, height)
        pictures.append(picture("by-position", "Difference by tokens seen", caption, figure, width))
    if DOCUMENT in by_name:
        caption = f"Every document of the validation text, the longest by themselves. Bars: {percent}."
        figure = _by_document(by_name[DOCUMENT], look, baseline)
        pictures.append(picture("by-document", "Difference by document", caption, figure, "half"))
    if FREQUENCY in by_name:
        caption = (
            "Predicted tokens, from the most frequent in the training text on the left to the rarest, in groups that "
            "each hold about an equal share of it: their ranks, and below the most frequent tokens of each group (␣ is "
            f"a blank, ⏎ a new line). Bands: {percent}."
        )
        figure = _by_frequency(by_name[FREQUENCY], look, baseline)
        pictures.append(picture("by-frequency", "Difference by token frequency", caption, figure))
    return pictures


def _by_position(
    division: OriginTable, look: Mapping[str, ArmStyle], baseline: str, width: float, height: float
) -> Figure:
    """Over the tokens seen, on a logarithmic axis."""
    figure, axes = panel(width, height, "tokens seen", LABEL)
    axes.set_xscale("log", base=2)
    bands = [tuple(map(int, group.split("-"))) for group in division.groups]
    _lines(axes, [math.sqrt(first * last) for first, last in bands], division.arms, look)
    ticks = [tick for tick in TICKS if tick <= bands[-1][-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    _label(axes, division.arms, look, baseline, gap=0.075 if width == HALF else 0.062)
    return figure


def _by_frequency(division: OriginTable, look: Mapping[str, ArmStyle], baseline: str) -> Figure:
    """Over groups of tokens, each as wide as the other."""
    figure, axes = panel(WIDE, 3.6, "rank of the predicted token", LABEL)
    x = list(range(len(division.groups)))
    _lines(axes, [float(place) for place in x], division.arms, look)
    labels = [span(group) for group in division.groups]
    if division.examples:
        labels = [f"{ranks}\n{shorten(text, 12)}" for ranks, text in zip(labels, division.examples, strict=True)]
    axes.set_xticks(x, labels)
    axes.grid(visible=False, axis="x")
    _label(axes, division.arms, look, baseline)
    return figure


def _by_document(division: OriginTable, look: Mapping[str, ArmStyle], baseline: str) -> Figure:
    """One row per document, the arms one below the other in it; their names are at the first row."""
    figure, axes = panel(HALF, _height(division), f"difference in loss to {shorten(baseline, 16)}, nats")
    low, high = _limits(division.arms)
    style.zero_line(axes, "vertical")
    for place, (arm, differences) in enumerate(division.arms.items()):
        line, offset = look[arm], 0.72 * ((place + 0.5) / len(division.arms) - 0.5)  # within a row of height 1
        for row, difference in enumerate(differences):
            y = row + offset
            if difference.has_interval:
                ends = [max(difference.low, low), min(difference.high, high)]
                axes.plot(ends, [y, y], color=line.colour, linewidth=1.6, alpha=0.75, zorder=2)
            axes.plot([difference.value], [y], line.marker, color=line.colour, markersize=5.5, zorder=3)
        beside = axes.get_yaxis_transform()  # across the axes, at the height of the arm in the first row
        axes.plot([1.04], [offset], line.marker, color=line.colour, markersize=4, transform=beside, clip_on=False)
        note(axes, shorten(arm, 16), (1.04, offset), (6, 0), "fd", va="center", color=style.INK, fontsize=8)
    style.rows(axes, [shorten(name, 22) for name in without_ending(division.groups)])
    axes.set_xlim(low, high)
    axes.locator_params(axis="x", nbins=4)
    return figure


def without_ending(names: Sequence[str]) -> Sequence[str]:
    """Names of files without the ending that all but the last, which may be `12 others`, have in common."""
    endings = {PurePath(name).suffix for name in names[:-1]}
    ending = endings.pop() if len(endings) == 1 else ""
    return [name.removesuffix(ending) for name in names]


def _height(division: OriginTable) -> float:
    """Inches: every arm has a line of its own in every row."""
    row = max(0.34, 0.17 * len(division.arms) + 0.07)
    return max(2.9, 1.0 + row * len(division.groups))


def _lines(axes: Axes, x: Sequence[float], arms: Arms, look: Mapping[str, ArmStyle]) -> None:
    """A line for each arm over the band of its intervals."""
    low, high = _limits(arms)
    style.zero_line(axes, "horizontal")
    for arm, differences in arms.items():
        line = look[arm]
        if all(d.has_interval for d in differences):
            lows, highs = [max(d.low, low) for d in differences], [min(d.high, high) for d in differences]
            axes.fill_between(x, lows, highs, color=line.colour, alpha=0.16, linewidth=0, zorder=2)
        values = [difference.value for difference in differences]
        axes.plot(x, values, color=line.colour, linestyle=line.dash, marker=line.marker, markersize=5, zorder=3)
    axes.set_ylim(low, high)


def _limits(arms: Arms) -> tuple[float, float]:
    """All differences and 0, and their intervals unless these would squeeze them."""
    differences = list(chain.from_iterable(arms.values()))
    values = [difference.value for difference in differences]
    ends = [end for difference in differences for end in (difference.low, difference.high)]
    low, high = style.intervals_within([0.0, *values], ends, WIDEST * max(map(abs, values)))
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _label(axes: Axes, arms: Arms, look: Mapping[str, ArmStyle], baseline: str, gap: float = 0.062) -> None:
    """What it means to lie above 0, and the arms at the ends of their lines."""
    note(axes, f"above 0: higher loss than {shorten(baseline, 20)}", (0, 1), (0, 3), "ff", ha="left", va="bottom")
    style.label_ends(axes, {arm: differences[-1].value for arm, differences in arms.items()}, look, gap=gap)
