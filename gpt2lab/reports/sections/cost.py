"""What training costs: size, work, speed and memory of every arm, against its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.figure import Figure

from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.sections.tuned import cost_points
from gpt2lab.reports.sections.worth import worth
from gpt2lab.reports.tables import Cell, Row, Table, columns
from gpt2lab.text import DASH, change, memory, quantity

NOTE = (
    "The smaller figures compare with the baseline. FLOPs are forward and backward. Speed is the median over runs, "
    "memory the largest of them; both depend on what else the machine was doing."
)
DECLARED = ("parameters", "non_embedding_parameters", "active_parameters", "flops_per_token", "tokens")


@section(order=50, title="What it costs")
def costs(read: StudyRead) -> Section:
    return Section(
        table=_table(read), note=NOTE, points=[*_per_second(read), *cost_points(read)], front=_loss_and_cost(read)
    )


def _table(read: StudyRead) -> Table:
    """Every arm, and how it compares with the baseline; MFU where it is known."""
    with_mfu = any(arm.mfu is not None for arm in read.arms.values())
    titles = columns("Arm", "Parameters:number", "Non-embedding:number", "Active:number", "FLOPs per token:number",
                     "Tokens:number", "Tokens per second:number", "Peak memory:number",
                     *(["MFU:number"] if with_mfu else []))  # fmt: skip
    base, reference = read.study.arms[read.baseline], read.arms[read.baseline]
    rows = []
    for name, arm in read.arms.items():
        entry, is_baseline = read.study.arms[name], name == read.baseline
        speed, peak = arm.tokens_per_second, arm.peak_memory_bytes
        numbers = [(quantity(getattr(entry, key)), getattr(entry, key), getattr(base, key)) for key in DECLARED]
        numbers.append((quantity(speed), speed, reference.tokens_per_second))
        numbers.append((memory(peak), peak, reference.peak_memory_bytes))
        cells = [Cell(shown, "" if is_baseline else change(value, other)) for shown, value, other in numbers]
        cells += [Cell(DASH if arm.mfu is None else f"{100 * arm.mfu:.1f} %")] if with_mfu else []
        rows.append(Row((Cell(name), *cells), arm.look, is_baseline))
    return Table(titles, rows)


def _per_second(read: StudyRead) -> list[str]:
    """Arms that win per token and lose, or may lose, per second."""
    base = read.arms[read.baseline].tokens_per_second
    told = []
    for c in read.verdicts.contrasts:
        speed = read.arms[c.arm].tokens_per_second if c.arm in read.arms else None
        if not c.word.startswith(("better", "likely better")) or c.against != read.baseline:
            continue
        if not speed or not base or speed >= base:
            continue
        slower = f"{c.arm} wins per token, but trains at {100 * speed / base:.0f} % of the baseline's speed here"
        reach = read.once(worth).in_tokens.get(c.arm)
        if reach is None or not math.isfinite(reach.value):
            told.append(f"{slower}; whether it wins per second, only a `budget_curve` of the baseline can tell.")
            continue
        seconds = reach.value * speed / base
        word = "still wins" if seconds > 1 else "loses"
        told.append(f"{slower}: per second it {word}, since its loss takes the baseline {seconds:.2f} times as long.")
    return told


def _loss_and_cost(read: StudyRead) -> list[style.Picture]:
    costs: dict[str, float | None] = {name: arm.tokens_per_second for name, arm in read.arms.items()}
    axis = "training speed, tokens per second"
    if not any(costs.values()):
        axis = "FLOPs per token"
        costs = {name: read.study.arms[name].flops_per_token for name in read.arms}
    points = {
        name: (float(spent), arm.mean)
        for name, arm in read.arms.items()
        if (spent := costs[name]) is not None and arm.mean is not None
    }
    if not points:
        return []
    caption = "Mean final loss against the median over runs. Names at the height of their marks."
    return [style.picture("cost", "Loss and cost", caption, cost(points, read.looks, axis, read.metric), "half")]


def cost(points: Mapping[str, tuple[float, float]], look: Mapping[str, style.Look], axis: str, metric: str) -> Figure:
    """Mean final loss against what training costs; `points` is arm -> (cost, loss), both finite."""
    figure, axes = style.panel(style.HALF, style.half_height(len(points)))
    for arm, (x, y) in points.items():
        axes.plot([x], [y], look[arm].marker, color=look[arm].colour, markersize=8, zorder=3)
    axes.margins(x=0.12, y=0.15)
    axes.xaxis.set_major_formatter(style.thousands)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"final {metric}, nats")
    style.label_ends(axes, {arm: y for arm, (_, y) in points.items()}, look, gap=0.075)
    return figure
