"""The sections of the page across studies: agreement, scale by scale, every contrast, each study, the rules, sweeps."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt2lab.basics.text import plural, quantity
from gpt2lab.reports import style
from gpt2lab.reports.index import Overview, StudyContrast, StudyEntry, facts
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.published import AGAIN, AGAINST, OPEN, RULES, PublishedAgreement, found_direction
from gpt2lab.reports.tables import Cell, Column, Link, Row, Table, tabulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "gpt2lab run ablations/posenc.yaml --scale nano"
"""What makes a first study."""

TALLIES = (
    "A contrast that several publications speak of is counted once for each. How agreement is decided stands at the "
    "end of this page."
)
MATRIX = (
    "Difference: arm minus what it is compared with, in the study's primary metric; lower is better. An empty cell was "
    "not run."
)

MOST_ROWS = 60
"""Of the figure; the newest studies come first."""

ROW = 0.29
"""Inches of a row of the figure."""

COLOURS = {-1: style.ARMS[2], 0: style.ARMS[0], 1: style.ARMS[1], None: style.BASELINE}
TICKS = [m * 10**e for e in range(6) for m in (1, 2, 5)]


@section(order=0, of="index")
def first_command(read: Overview) -> Section | None:
    return None if read.entries or read.sweeps else Section(code=COMMAND)


@section(order=10, title="Agreement", of="index")
def agreement(read: Overview) -> Section | None:
    expected = [finding.agreement for finding in read.findings if finding.agreement]
    published = [agreement for finding in read.findings for _, agreement in finding.published]
    rows = [("what the study's file expects", expected), ("published results", published)]

    def cells(row: tuple[str, Sequence[PublishedAgreement]]) -> dict[str, str]:
        counts = Counter((agreed.kind, agreed.elsewhere) for agreed in row[1])
        return {
            "Contrasts compared with": row[0],
            "found again:number": str(counts[AGAIN, False]),
            "same at another scale:number": str(counts[AGAIN, True]),
            "contradicted:number": str(counts[AGAINST, False]),
            "other sign at another scale:number": str(counts[AGAINST, True]),
            "inconclusive:number": str(counts[OPEN, False] + counts[OPEN, True]),
        }

    table = tabulate([row for row in rows if row[1]], cells)
    return Section(table=table, note=TALLIES) if table else None


@section(order=20, title="Scale by scale", of="index")
def scale_by_scale(read: Overview) -> Section | None:
    """Every contrast of an ablation in one row, a scale in each column; those at most scales first."""
    if not read.entries:
        return None
    sizes: dict[str, list[float]] = {}
    places: dict[tuple[str, str], dict[str, Cell]] = {}
    for number, entry in enumerate(read.entries, start=1):
        sizes.setdefault(entry.scale, []).append(entry.study.scope.parameters or 0.0)
        for finding in entry.findings:
            verdict = finding.verdict
            difference = Link(finding.difference.text, f"#study-{number}", after=f" {entry.unit}")
            row = places.setdefault((entry.study.ablation or entry.name, finding.label), {})
            row.setdefault(entry.scale, Cell(verdict.text, difference, verdict.chip))
    middle = {scale: statistics.median(found) for scale, found in sizes.items()}
    scales = sorted(middle, key=lambda scale: (middle[scale], scale))
    order = sorted(places, key=lambda key: (-len(places[key]), key[0]))
    titles = [Column("Contrast"), *(Column(scale, "", f"{quantity(middle[scale])} parameters") for scale in scales)]
    rows = [Row([Cell(key[1], key[0]), *(places[key].get(scale, Cell()) for scale in scales)]) for key in order]
    return Section(table=Table(titles, rows), note=MATRIX)


@section(order=30, title="Every contrast", of="index")
def every_contrast(read: Overview) -> Section | None:
    shown = groups(read.entries)
    if not shown:
        return None
    figure = overview(shown)
    return Section(figures=[style.picture("index", "Every contrast", caption(shown, len(read.findings)), figure)])


@section(order=40, title="Studies", of="index")
def studies(read: Overview) -> Section | None:
    parts = [
        Section(
            title=entry.name, link=entry.link, anchor=f"study-{number}", lead=[entry.study.question],
            aside=_line(entry), table=_contrasts(entry),
            note="" if entry.findings else "No contrast is declared.",
            facts=[(key, value) for key, value in facts(entry) if value], facts_title="What it rests on",
        )
        for number, entry in enumerate(read.entries, start=1)
    ]  # fmt: skip
    return Section(parts=parts) if parts else None


def _contrasts(entry: StudyEntry) -> Table | None:
    def cells(finding: StudyContrast) -> dict[str, Cell]:
        expected, contrast = finding.agreement, finding.contrast
        sources = [(Link(e.source, e.address, before=f"{e}; "), agreed) for e, agreed in finding.published]
        return {
            "Contrast": Cell(contrast.arm, f"against {contrast.against}"),
            f"Difference, {entry.unit}:number": finding.difference,
            "Verdict:words": finding.verdict,
            "Expected:words":
                Cell(expected.word, finding.expected, expected.chip, remark=expected.why) if expected else Cell(),
            "Published:words":
                Cell(parts=[Cell(agreed.word, link, agreed.chip, remark=agreed.why) for link, agreed in sources]),
        }  # fmt: skip

    return tabulate(entry.findings, cells)


def _line(entry: StudyEntry) -> str:
    """A study in a line: `nano · 842 k parameters, 819 k tokens · 2026-11-23`."""
    parts = [entry.scale, entry.sizes, entry.study.created[:10], entry.study.caveat or ""]
    return " · ".join(part for part in parts if part)


@section(order=50, title="How agreement is decided", of="index")
def rules(read: Overview) -> Section | None:
    return Section(points=RULES) if read.entries else None


@section(order=60, title="Sweeps", of="index")
def sweeps(read: Overview) -> Section | None:
    parts = [
        Section(title=sweep.name, link=sweep.link, lead=[sweep.question, *sweep.answer], aside=sweep.line)
        for sweep in read.sweeps
    ]
    return Section(parts=parts) if parts else None


Group = tuple[str, list[style.Interval]]
"""A study's name, and its differences as multiples of its smallest effect of interest."""


def groups(entries: Sequence[StudyEntry]) -> list[Group]:
    """The newest studies that have differences, as many as the figure holds."""
    shown: list[Group] = []
    room = MOST_ROWS
    for entry in entries:
        bars = [_bar(f, entry) for f in entry.findings if math.isfinite(f.contrast.difference)]
        room -= len(bars) + 1 if bars else 0
        if room < 0 and shown:
            break
        shown += [(entry.name, bars[: MOST_ROWS - 1])] if bars else []
    return shown


def _bar(finding: StudyContrast, entry: StudyEntry) -> style.Interval:
    c, small = finding.contrast, entry.verdicts.smallest_effect
    label = c.arm if c.against == entry.study.baseline else f"{c.arm} − {c.against}"
    text = f"{finding.difference.text} {entry.unit}, {finding.verdict.text}"
    return style.Interval(label, c.difference / small, c.low / small, c.high / small, text, COLOURS[found_direction(c)])


def caption(shown: Sequence[Group], all_bars: int) -> str:
    """What is drawn, and what is not."""
    others = all_bars - sum(len(bars) for _, bars in shown)
    rest = f" {plural(others, 'contrast')} of older studies, or without a difference, are in the tables only."
    return (
        "Differences and their family-adjusted intervals as multiples of the smallest effect of interest that each "
        "study declared (shaded: smaller than that), so that studies of different scales share one axis; it is linear "
        "within the shading and logarithmic beyond. The numbers at the side are not multiples. A hollow mark has no "
        "interval; an arrow is an end outside the frame; grey: no verdict either way." + (rest if others else "")
    )


def overview(shown: Sequence[Group]) -> Figure:
    """Differences with their intervals, a row for each under the name of its study."""
    from matplotlib.ticker import FixedLocator, NullLocator

    lines: list[style.Interval | str] = []
    for name, bars in shown:
        lines += [name, *bars]
    x = "difference, in smallest effects of interest"
    figure, axes = style.panel(style.WIDE, 1.0 + ROW * max(3, len(lines)), x)
    bars = [bar for _, bars in shown for bar in bars]
    points, ends = [abs(bar.difference) for bar in bars], [abs(end) for bar in bars for end in (bar.low, bar.high)]
    limit = 1.15 * style.intervals_within([2.0, *points], ends, 4 * max(2.0, *points))[1]
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.6)
    axes.axvspan(-1, 1, color=style.BAND, linewidth=0, zorder=0)
    style.zero_line(axes, "vertical")
    style.draw_intervals(axes, lines, (-limit, limit), ("better", "worse"), width=2.2, end=6, size=6)
    ticks = [tick for tick in TICKS if tick <= limit]
    ticks = ticks[:: -(-len(ticks) // 6)]  # at most six on each side
    axes.xaxis.set_major_locator(FixedLocator([*(-t for t in reversed(ticks)), 0, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    return figure
