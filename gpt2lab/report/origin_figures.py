"""Figures of where differences come from: over the position in the context, over token frequency, and by document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2lab.origins import Difference, Division, Origins
from gpt2lab.report.figures import HALF, WIDE
from gpt2lab.report.health_figures import Parts
from gpt2lab.report.marks import Look, label_ends, note, rows
from gpt2lab.report.origins import span
from gpt2lab.report.svg import INK, MUTED
from gpt2lab.store.parts import DOCUMENT, FREQUENCY, POSITION
from gpt2lab.text import shorten

Arms = Mapping[str, Sequence[Difference]]

WIDEST = 3.0
"""An interval is drawn to this many times the largest difference; beyond, it would squeeze the rest."""

TICKS = [4**power for power in range(12)]


def draw(origins: Origins, look: Mapping[str, Look], baseline: str) -> list[Parts]:
    """Every figure that the study has data for."""
    found = {division.name: division for division in origins.divisions}
    percent = f"{100 * origins.level:g} % intervals over seeds, each by itself, cut where they would squeeze the rest"
    drawn: list[Parts] = []
    if POSITION in found:
        beside = "half" if DOCUMENT in found else "wide"
        height = _height(found[DOCUMENT]) if DOCUMENT in found else 3.4
        caption = f"How the difference depends on how much of the context a prediction can use. Bands: {percent}."
        figure = by_position(found[POSITION], look, baseline, WIDE if beside == "wide" else HALF, height)
        drawn.append(("by-position", "Difference by tokens seen", caption, beside, figure))
    if DOCUMENT in found:
        caption = f"Every document of the validation text, the longest by themselves. Bars: {percent}."
        drawn.append(
            ("by-document", "Difference by document", caption, "half", by_document(found[DOCUMENT], look, baseline))
        )
    if FREQUENCY in found:
        caption = (
            "Predicted tokens, from the most frequent in the training text on the left to the rarest, in groups that "
            "each hold about an equal share of it: their ranks, and below the most frequent tokens of each group (␣ is "
            f"a blank, ⏎ a new line). Bands: {percent}."
        )
        figure = by_frequency(found[FREQUENCY], look, baseline)
        drawn.append(("by-frequency", "Difference by token frequency", caption, "wide", figure))
    return drawn


def by_position(division: Division, look: Mapping[str, Look], baseline: str, width: float, height: float) -> Figure:
    """Over the tokens seen, on a logarithmic axis."""
    figure, axes = _figure(width, height)
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


def by_frequency(division: Division, look: Mapping[str, Look], baseline: str) -> Figure:
    """Over groups of tokens, each as wide as the other."""
    figure, axes = _figure(WIDE, 3.6)
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


def by_document(division: Division, look: Mapping[str, Look], baseline: str) -> Figure:
    """One row per document, the arms one below the other in it; their names stand at the first row."""
    figure, axes = _figure(HALF, _height(division))
    low, high = _limits(division.arms)
    axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
    for place, (arm, found) in enumerate(division.arms.items()):
        style, offset = look[arm], _offset(place, len(division.arms))
        for row, one in enumerate(found):
            at = row + offset
            if one.has_interval:
                ends = [max(one.low, low), min(one.high, high)]
                axes.plot(ends, [at, at], color=style.colour, linewidth=1.6, alpha=0.75, zorder=2)
            axes.plot([one.value], [at], style.marker, color=style.colour, markersize=5.5, zorder=3)
        beside = axes.get_yaxis_transform()  # across the axes, at the height of the arm in the first row
        axes.plot([1.04], [offset], style.marker, color=style.colour, markersize=4, transform=beside, clip_on=False)
        note(axes, shorten(arm, 16), (1.04, offset), (6, 0), "fd", va="center", color=INK, fontsize=8)
    rows(axes, [shorten(name, 22) for name in without_ending(division.groups)])
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
    axes.axhline(0, color=MUTED, linewidth=1, zorder=1)
    for arm, found in arms.items():
        style = look[arm]
        bounds = np.array([(max(one.low, low), min(one.high, high)) for one in found if one.has_interval])
        if len(bounds) == len(found):
            axes.fill_between(x, bounds[:, 0], bounds[:, 1], color=style.colour, alpha=0.16, linewidth=0, zorder=2)
        values = [one.value for one in found]
        axes.plot(x, values, color=style.colour, linestyle=style.dash, marker=style.marker, markersize=5, zorder=3)
    axes.set_ylim(low, high)


def _limits(arms: Arms) -> tuple[float, float]:
    """All differences and 0, and their intervals unless these would squeeze them."""
    values = [one.value for found in arms.values() for one in found]
    ends = [end for found in arms.values() for one in found for end in (one.low, one.high) if math.isfinite(end)]
    widest = WIDEST * max(map(abs, values))
    low = min(0.0, *values, *(max(end, -widest) for end in ends))
    high = max(0.0, *values, *(min(end, widest) for end in ends))
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _difference_axis(axes: Axes, baseline: str) -> None:
    axes.set_ylabel("difference in loss, nats")
    note(axes, f"above 0: higher loss than {shorten(baseline, 20)}", (0, 1), (0, 3), "ff", ha="left", va="bottom")


def _label(axes: Axes, arms: Arms, look: Mapping[str, Look], gap: float = 0.062) -> None:
    label_ends(axes, {arm: found[-1].value for arm, found in arms.items()}, look, gap=gap)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
