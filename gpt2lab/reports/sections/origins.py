"""Where differences come from: by position in the context, by how frequent the token is, and by document.

Description only: nothing of it was declared, so no sentence here carries a word of the verdicts. Every number is a
difference in mean loss, arm minus baseline, in nats, over some of the final evaluation's targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gpt2lab.analysis.statistics import welch
from gpt2lab.errors import DataFault
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.style import HALF, WIDE, Look, note, panel, picture
from gpt2lab.reports.tables import Cell, Row, Table, columns, difference_cell
from gpt2lab.results import StudyRun
from gpt2lab.store.parts import DIVISIONS, DOCUMENT, FREQUENCY, POSITION, Part, read_parts
from gpt2lab.text import plural, shorten

Array = NDArray[np.float64]
METRICS = ("context_loss", "frequency_loss", "document_loss")

WIDEST = 3.0
"""An interval is drawn to this many times the largest difference; beyond, it would squeeze the rest."""

TICKS = [4**power for power in range(12)]


@section(order=40, title="Where the difference comes from")
def where_from(read: StudyRead) -> Section | None:
    """Without numbers it is there to say how to get them, if any run could give some."""
    found = read.once(origins)
    if not found.divisions and not found.lacking:
        return None
    return Section(
        table=_table(read, found) if found.divisions else None,
        note=_note(found) if found.divisions else "",
        points=[*points(found, read.baseline), *left_out(found, read.name)],
        figures=drawn(found, read.looks, read.baseline),
    )


@dataclass(frozen=True)
class Difference:
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


@dataclass(frozen=True, kw_only=True)
class Division:
    """One way to divide the targets. shares: of all targets, by group. examples: what is in a group, or nothing.
    arms: arm -> its difference to the baseline in every group. changes: arm -> that of the last group less that of the
    first."""

    name: str
    groups: Sequence[str]
    shares: Sequence[float]
    examples: Sequence[str]
    arms: Mapping[str, Sequence[Difference]]
    changes: Mapping[str, Difference]

    def part(self, arm: str, group: int) -> float:
        """What a group contributes to the arm's difference over all targets, as a share of it."""
        parts = [share * one.value for share, one in zip(self.shares, self.arms[arm], strict=True)]
        return parts[group] / sum(parts)


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What was measured of a study's differences. totals: arm -> its difference over all targets. seeds: arm, the
    baseline too -> runs that stand for it. lacking: arm -> usable runs that kept nothing. apart: arms that cannot be
    compared. level: of every interval."""

    divisions: Sequence[Division] = ()
    totals: Mapping[str, Difference] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    lacking: Mapping[str, int] = field(default_factory=dict)
    apart: Sequence[str] = ()
    level: float = 0.95


def origins(read: StudyRead) -> Origins:
    """Of every arm but those that cannot be compared with the baseline. Failed runs are left out, and so are arms of
    which some run kept nothing, for the others would not stand for it."""
    baseline, alpha = read.baseline, read.study.alpha
    apart = [c.arm for c in read.verdicts.contrasts if c.word == "not comparable" and c.against == baseline]
    kept: dict[str, list[dict[str, Part]]] = {}
    lacking: dict[str, int] = {}
    for run in read.usable:
        if run.arm in apart:
            continue
        found = _kept_of(run, read)
        if POSITION in found:
            kept.setdefault(run.arm, []).append(found)
        else:
            lacking[run.arm] = lacking.get(run.arm, 0) + 1
    whole = {arm: kept[arm] for arm in read.study.arms if arm in kept and arm not in lacking}
    ours = {arm: found for arm, found in whole.items() if arm != baseline}
    if baseline not in whole or not ours:
        return Origins(lacking=lacking, apart=apart, level=1 - alpha)
    base = whole[baseline]
    divisions = [made for name in DIVISIONS if (made := _division(name, ours, base, alpha)) is not None]
    totals = {arm: _difference(_totals(found), _totals(base), alpha) for arm, found in ours.items()}
    seeds = {arm: len(found) for arm, found in whole.items()}
    return Origins(divisions=divisions, totals=totals, seeds=seeds, lacking=lacking, apart=apart, level=1 - alpha)


def _kept_of(run: StudyRun, read: StudyRead) -> dict[str, Part]:
    """What a run kept of its final evaluation, by division; empty for older runs and for damaged files."""
    try:
        return read_parts(read.store.run(run.id).parts(read.study.evaluation.key))
    except DataFault:
        return {}


def _division(
    name: str, arms: Mapping[str, Sequence[Mapping[str, Part]]], base: Sequence[Mapping[str, Part]], alpha: float
) -> Division | None:
    """Arms whose runs were divided otherwise than the baseline's first are left out."""
    first = base[0].get(name)
    if first is None or len(first.groups) < 2 or not all(_alike(run.get(name), first) for run in base):
        return None
    theirs = _losses(name, base)
    found, changes = {}, {}
    for arm, runs in arms.items():
        if not all(_alike(run.get(name), first) for run in runs):
            continue
        ours = _losses(name, runs)
        found[arm] = [_difference(a, b, alpha) for a, b in zip(ours, theirs, strict=True)]
        changes[arm] = _difference(ours[-1] - ours[0], theirs[-1] - theirs[0], alpha)
    if not found:
        return None
    return Division(
        name=name,
        groups=first.groups,
        shares=[count / sum(first.targets) for count in first.targets],
        examples=first.examples if len(first.examples) == len(first.groups) else (),
        arms=found,
        changes=changes,
    )


def _alike(kept: Part | None, first: Part) -> bool:
    return kept is not None and (kept.groups, kept.targets) == (first.groups, first.targets)


def _losses(name: str, runs: Sequence[Mapping[str, Part]]) -> Array:
    """-> (group, seed)"""
    return np.array([run[name].losses for run in runs], dtype=np.float64).T


def _totals(runs: Sequence[Mapping[str, Part]]) -> Array:
    """Mean loss over all targets.  -> (seed,)"""
    return np.array([np.average(run[POSITION].losses, weights=run[POSITION].targets) for run in runs])


def _difference(ours: Array, theirs: Array, alpha: float) -> Difference:
    """(seed,), (seed,)"""
    test = welch(ours, theirs, alpha=alpha)
    return Difference(float(test.difference), float(test.low), float(test.high))


def _table(read: StudyRead, origins: Origins) -> Table:
    """One row per arm that can be told."""
    titles = ["Arm", "All targets:number"]
    titles += [f"{title}:number" for division in origins.divisions for title in _titles(division)]
    rows = []
    for name, arm in read.arms.items():
        if name in origins.totals:
            cells = [cell for division in origins.divisions for cell in _cells(division, name)]
            rows.append(Row((Cell(name), _cell(origins.totals[name]), *cells), arm.look))
    return Table(columns(*titles), rows)


def _titles(division: Division) -> tuple[str, ...]:
    if division.name == DOCUMENT:
        return (f"Below 0 in {plural(len(division.groups), 'document')}",)
    return tuple(f"{text[0].upper()}{text[1:]}" for text in (label(division, 0), label(division, -1)))


def _cells(division: Division, arm: str) -> tuple[Cell, ...]:
    found = division.arms.get(arm)
    if found is None:
        return (Cell(),) * len(_titles(division))
    if division.name == DOCUMENT:
        sure = sum(one.sign < 0 for one in found)
        return (Cell(str(sum(one.value < 0 for one in found)), f"{sure} by the interval"),)
    return _cell(found[0]), _cell(found[-1])


def _cell(one: Difference) -> Cell:
    return difference_cell(one.value, one.low, one.high)


def label(division: Division, group: int) -> str:
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
    told = []
    for arm in origins.totals:
        parts = [_told(division, arm, baseline, origins) for division in origins.divisions if arm in division.arms]
        told.append(f"{arm}: its difference to {baseline} {'; '.join(parts)}.")
    return told


def _told(division: Division, arm: str, baseline: str, origins: Origins) -> str:
    if division.name == DOCUMENT:
        return _by_work(division.arms[arm])
    ends = f"from {label(division, 0)} to {span(division.groups[-1])}"
    if division.name == FREQUENCY:
        ends = f"from the most frequent tokens ({label(division, 0)}) to the rarest ({label(division, -1)})"
    change = _cell(division.changes[arm])
    moved = f"moves by {change.text} nats" + (f" {change.detail}" if change.detail else "")
    return f"{moved} {ends}, {_way(division, arm, baseline)}{_held(division, arm, origins)}"


def _way(division: Division, arm: str, baseline: str) -> str:
    """Whom a change favours, where the seeds can tell."""
    change = division.changes[arm]
    if not change.has_interval:
        return "with no interval, for lack of seeds"
    if change.sign == 0:
        return "which these seeds cannot tell from no change"
    return f"in favour of {arm if change.sign < 0 else baseline}"


def _held(division: Division, arm: str, origins: Origins) -> str:
    """How much of the difference lies in the last group, where that matters; it means nothing where groups are known to
    differ in opposite directions."""
    total, found = origins.totals[arm], division.arms[arm]
    against = any(one.sign == -total.sign for one in found) or found[-1].value * total.value <= 0
    if total.sign == 0 or division.changes[arm].sign == 0 or against:
        return ""
    own, part = division.shares[-1], division.part(arm, -1)
    return f" ({label(division, -1)}: {100 * own:.0f} % of the targets, {100 * part:.0f} % of the difference)"


def _by_work(found: Sequence[Difference]) -> str:
    sides: list[str] = []
    for word, sign in (("below", -1), ("above", 1)):
        count = sum(one.value * sign > 0 for one in found)
        if count:
            sure = sum(one.sign == sign for one in found)
            of = "" if sides else f" of {plural(len(found), 'document')}"
            sides.append(f"{word} 0 in {count}{of} ({sure} by the interval)")
    return f"is {' and '.join(sides)}" if sides else "is 0 in every document"


def _note(origins: Origins) -> str:
    """What the numbers are, and what they are not."""
    count = sum(len(found) for division in origins.divisions for found in division.arms.values())
    percent, luck = f"{100 * origins.level:g} %", count * (1 - origins.level)
    return (
        "Exploratory: none of this was declared, and none of it decides a verdict. Differences in mean loss, arm minus "
        "baseline, over parts of the final evaluation's targets, in nats; failed runs are left out. Below each its "
        f"{percent} interval over seeds (Welch), every one by itself: of the {count} in the figures about {luck:.0f} "
        "would miss the true difference by luck. Tokens seen: how many a prediction can use. Ranks: tokens by how "
        "frequent they are in the training text, 1 the most frequent, in groups of about equal share of it. The table "
        "has the ends of both, the figures all of it."
    )


def left_out(origins: Origins, study: str) -> list[str]:
    """Arms without such numbers, and how to get them."""
    told = []
    if origins.lacking:
        listed = ", ".join(f"{arm} ({plural(count, 'run')})" for arm, count in origins.lacking.items())
        asked = " ".join(f"--metric {name}" for name in METRICS)
        command = f"gpt2lab eval --study {study} {asked}"
        told.append(f"Not measured, as these runs are older than it: {listed}. `{command}` does it now.")
    if origins.apart:
        told.append(f"Not comparable, so without a difference: {', '.join(origins.apart)}.")
    return told


Arms = Mapping[str, Sequence[Difference]]


def drawn(origins: Origins, look: Mapping[str, Look], baseline: str) -> list[style.Picture]:
    """Every figure that the study has data for."""
    found = {division.name: division for division in origins.divisions}
    percent = f"{100 * origins.level:g} % intervals over seeds, each by itself, cut where they would squeeze the rest"
    pictures = []
    if POSITION in found:
        width, height = ("half", _height(found[DOCUMENT])) if DOCUMENT in found else ("wide", 3.4)
        caption = f"How the difference depends on how much of the context a prediction can use. Bands: {percent}."
        figure = _by_position(found[POSITION], look, baseline, WIDE if width == "wide" else HALF, height)
        pictures.append(picture("by-position", "Difference by tokens seen", caption, figure, width))
    if DOCUMENT in found:
        caption = f"Every document of the validation text, the longest by themselves. Bars: {percent}."
        figure = _by_document(found[DOCUMENT], look, baseline)
        pictures.append(picture("by-document", "Difference by document", caption, figure, "half"))
    if FREQUENCY in found:
        caption = (
            "Predicted tokens, from the most frequent in the training text on the left to the rarest, in groups that "
            "each hold about an equal share of it: their ranks, and below the most frequent tokens of each group (␣ is "
            f"a blank, ⏎ a new line). Bands: {percent}."
        )
        figure = _by_frequency(found[FREQUENCY], look, baseline)
        pictures.append(picture("by-frequency", "Difference by token frequency", caption, figure))
    return pictures


def _by_position(division: Division, look: Mapping[str, Look], baseline: str, width: float, height: float) -> Figure:
    """Over the tokens seen, on a logarithmic axis."""
    figure, axes = panel(width, height)
    axes.set_xscale("log", base=2)
    bands = [tuple(map(int, group.split("-"))) for group in division.groups]
    _lines(axes, [math.sqrt(first * last) for first, last in bands], division.arms, look)
    ticks = [tick for tick in TICKS if tick <= bands[-1][-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens seen")
    _difference_axis(axes, baseline)
    _label(axes, division.arms, look, gap=0.075 if width == HALF else 0.062)
    return figure


def _by_frequency(division: Division, look: Mapping[str, Look], baseline: str) -> Figure:
    """Over groups of tokens, each as wide as the other."""
    figure, axes = panel(WIDE, 3.6)
    x = list(range(len(division.groups)))
    _lines(axes, [float(place) for place in x], division.arms, look)
    labels = [span(group) for group in division.groups]
    if division.examples:
        labels = [f"{ranks}\n{shorten(text, 12)}" for ranks, text in zip(labels, division.examples, strict=True)]
    axes.set_xticks(x, labels)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("rank of the predicted token")
    _difference_axis(axes, baseline)
    _label(axes, division.arms, look)
    return figure


def _by_document(division: Division, look: Mapping[str, Look], baseline: str) -> Figure:
    """One row per document, the arms one below the other in it; their names stand at the first row."""
    figure, axes = panel(HALF, _height(division))
    low, high = _limits(division.arms)
    axes.axvline(0, color=style.MUTED, linewidth=1, zorder=1)
    for place, (arm, found) in enumerate(division.arms.items()):
        line, offset = look[arm], _offset(place, len(division.arms))
        for row, one in enumerate(found):
            at = row + offset
            if one.has_interval:
                ends = [max(one.low, low), min(one.high, high)]
                axes.plot(ends, [at, at], color=line.colour, linewidth=1.6, alpha=0.75, zorder=2)
            axes.plot([one.value], [at], line.marker, color=line.colour, markersize=5.5, zorder=3)
        beside = axes.get_yaxis_transform()  # across the axes, at the height of the arm in the first row
        axes.plot([1.04], [offset], line.marker, color=line.colour, markersize=4, transform=beside, clip_on=False)
        note(axes, shorten(arm, 16), (1.04, offset), (6, 0), "fd", va="center", color=style.INK, fontsize=8)
    style.rows(axes, [shorten(name, 22) for name in without_ending(division.groups)])
    axes.set_xlim(low, high)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(f"difference in loss to {shorten(baseline, 16)}, nats")
    return figure


def without_ending(names: Sequence[str]) -> Sequence[str]:
    """Names of files without the ending that all but the last, which may be `12 others`, have in common."""
    endings = {PurePath(name).suffix for name in names[:-1]}
    ending = endings.pop() if len(endings) == 1 else ""
    return [name.removesuffix(ending) for name in names]


def _offset(place: int, arms: int) -> float:
    """Of an arm's mark within a row, whose height is 1."""
    return 0.72 * ((place + 0.5) / arms - 0.5)


def _height(division: Division) -> float:
    """Inches: every arm has a line of its own in every row."""
    row = max(0.34, 0.17 * len(division.arms) + 0.07)
    return max(2.9, 1.0 + row * len(division.groups))


def _lines(axes: Axes, x: Sequence[float], arms: Arms, look: Mapping[str, Look]) -> None:
    """A line for each arm over the band of its intervals."""
    low, high = _limits(arms)
    axes.axhline(0, color=style.MUTED, linewidth=1, zorder=1)
    for arm, found in arms.items():
        line = look[arm]
        bounds = np.array([(max(one.low, low), min(one.high, high)) for one in found if one.has_interval])
        if len(bounds) == len(found):
            axes.fill_between(x, bounds[:, 0], bounds[:, 1], color=line.colour, alpha=0.16, linewidth=0, zorder=2)
        values = [one.value for one in found]
        axes.plot(x, values, color=line.colour, linestyle=line.dash, marker=line.marker, markersize=5, zorder=3)
    axes.set_ylim(low, high)


def _limits(arms: Arms) -> tuple[float, float]:
    """All differences and 0, and their intervals unless these would squeeze them."""
    values = [one.value for found in arms.values() for one in found]
    ends = [end for found in arms.values() for one in found for end in (one.low, one.high)]
    low, high = style.intervals_within([0.0, *values], ends, WIDEST * max(map(abs, values)))
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _difference_axis(axes: Axes, baseline: str) -> None:
    axes.set_ylabel("difference in loss, nats")
    note(axes, f"above 0: higher loss than {shorten(baseline, 20)}", (0, 1), (0, 3), "ff", ha="left", va="bottom")


def _label(axes: Axes, arms: Arms, look: Mapping[str, Look], gap: float = 0.062) -> None:
    style.label_ends(axes, {arm: found[-1].value for arm, found in arms.items()}, look, gap=gap)
