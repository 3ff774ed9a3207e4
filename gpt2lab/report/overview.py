"""The figure of the page across studies: every contrast's difference, as a multiple of what its study calls small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from gpt2lab.report.across import Entry, Finding
from gpt2lab.report.agreement import found_direction
from gpt2lab.report.marks import note, rows
from gpt2lab.report.svg import ARMS, BAND, BASELINE, INK, MUTED, SURFACE
from gpt2lab.text import plural, shorten

MOST_ROWS = 60
"""What a page can still be scrolled through; the newest studies come first."""

WIDTH, ROW = 9.2, 0.29
"""Inches."""

COLOURS = {-1: ARMS[2], 0: ARMS[0], 1: ARMS[1], None: BASELINE}
TICKS = [m * 10**e for e in range(6) for m in (1, 2, 5)]


@dataclass(frozen=True)
class Bar:
    """One line of the figure, in multiples of the smallest effect of interest; NaN where there is no number."""

    label: str
    words: str
    direction: int | None
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """The bars of one study."""

    name: str
    bars: Sequence[Bar]


def groups(entries: Sequence[Entry]) -> list[Group]:
    """The newest studies that have differences, as many as the figure holds."""
    found: list[Group] = []
    left = MOST_ROWS
    for entry in entries:
        bars = [_bar(f, entry) for f in entry.findings if math.isfinite(f.contrast.difference)]
        left -= len(bars) + 1
        if bars and left < 0 and found:
            break
        if bars:
            found.append(Group(entry.name, bars[: MOST_ROWS - 1]))
        else:
            left += 1
    return found


def _bar(finding: Finding, entry: Entry) -> Bar:
    c, small = finding.contrast, entry.verdicts.smallest_effect
    label = c.arm if c.against == entry.study["baseline"] else f"{c.arm} − {c.against}"
    words = f"{finding.difference.text} {entry.unit}, {finding.verdict.text}"
    return Bar(label, words, found_direction(c), c.difference / small, c.low / small, c.high / small)


def caption(shown: Sequence[Group], all_bars: int) -> str:
    """What is drawn, and what is not."""
    drawn = sum(len(group.bars) for group in shown)
    left = all_bars - drawn
    rest = (
        f" {plural(left, 'contrast')} of older studies, or without a difference, are in the tables only."
        if left
        else ""
    )
    return (
        "Differences and their family-adjusted intervals as multiples of the smallest effect of interest that each "
        "study declared (shaded: smaller than that), so that studies of different scales share one axis; it is linear "
        "within the shading and logarithmic beyond. The numbers at the side are not multiples. A hollow mark has no "
        "interval; an arrow is an end outside the frame; grey: no verdict either way." + rest
    )


def overview(shown: Sequence[Group]) -> Figure:
    """Draw inside `svg.drawing()`."""
    lines: list[Group | Bar] = []
    for group in shown:
        lines += [group, *group.bars]
    figure = Figure(figsize=(WIDTH, 1.0 + ROW * max(3, len(lines))), layout="constrained")
    axes = figure.subplots()
    limit = _limit([bar for group in shown for bar in group.bars])
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.6)
    axes.axvspan(-1, 1, color=BAND, linewidth=0, zorder=0)
    axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
    for row, line in enumerate(lines):
        if isinstance(line, Bar):
            _draw(axes, row, line, limit)
            note(axes, shorten(line.words, 44), (1, row), (10, 0), "fd", va="center", color=INK)
    rows(axes, [line.label if isinstance(line, Bar) else line.name for line in lines])
    for line, label in zip(lines, axes.get_yticklabels(), strict=True):
        if isinstance(line, Group):
            label.set_fontweight("bold")
    axes.set_xlim(-limit, limit)
    ticks = [tick for tick in TICKS if tick <= limit]
    every = -(-len(ticks) // 6)  # at most six on each side
    ticks = ticks[::every]
    axes.xaxis.set_major_locator(FixedLocator([*(-t for t in reversed(ticks)), 0, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    axes.set_xlabel("difference, in smallest effects of interest")
    note(axes, "◂ better", (0, 1), (0, 3), "ff", ha="left", va="bottom")
    note(axes, "worse ▸", (1, 1), (0, 3), "ff", ha="right", va="bottom")
    return figure


def _draw(axes: Axes, row: int, bar: Bar, limit: float) -> None:
    colour = COLOURS[bar.direction]
    has_interval = math.isfinite(bar.low) and math.isfinite(bar.high)
    if has_interval:
        low, high = (min(max(end, -limit), limit) for end in (bar.low, bar.high))
        axes.plot([low, high], [row, row], color=colour, linewidth=2.2, zorder=2)
        for end, cut, arrow in ((low, bar.low < low, "<"), (high, bar.high > high, ">")):
            axes.plot([end], [row], arrow if cut else "|", color=colour, markersize=6, clip_on=False)
    at = min(max(bar.difference, -limit), limit)
    axes.plot(
        [at], [row], "o", color=colour, markerfacecolor=colour if has_interval else SURFACE, markersize=6, zorder=3
    )


def _limit(bars: Sequence[Bar]) -> float:
    """All points, and the intervals unless they would squeeze the points."""
    points = [abs(bar.difference) for bar in bars]
    ends = [abs(end) for bar in bars for end in (bar.low, bar.high) if math.isfinite(end)]
    widest = 4 * max(2.0, *points)
    return 1.15 * max(2.0, *points, *(min(end, widest) for end in ends))
