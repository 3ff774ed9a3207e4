"""Figures of the losses: during training, of every seed, and over lengths of context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from gpt2lab.analysis.compare import failure_ceiling_of
from gpt2lab.analysis.metric_names import BITS, LOSS
from gpt2lab.analysis.results import ENDED, StudyRun, by_arm, contexts_of, failure_ceiling
from gpt2lab.analysis.studies import AtContext, judge_contexts
from gpt2lab.analysis.wording import decimals, listed
from gpt2lab.basics.text import DASH, clean, number, shorten, signed
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.sections.health import health
from gpt2lab.reports.style import ArmStyle, Curve, Curves
from gpt2lab.reports.tables import Cell, difference_cell, p_text, tabulate, verdict_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING = (
    "Mean over seeds; the band runs from the lowest seed to the highest. Dashed with a cross: a run that diverged or "
    "has not finished, up to its last finite loss. Grey lines: the losses of counting tokens (unigram) and pairs of "
    "tokens (bigram). Verdicts do not use these evaluations during training."
)
FURTHER = "Validation loss against FLOPs and seconds"
ZOOM_FROM = 0.7
"""Share of training from which the second panel shows it."""
BEYOND = (
    "Loss at a longer context minus the loss of the same runs at the training context, on the same target tokens. "
    "Intervals, p and words as in the verdicts, over a separate family."
)
VERBS = {"worse": "loses", "exploratory": "changes by", "inconclusive": "undecided:"}
"""How a verdict against the training context is put into a sentence."""
CONTEXTS = (
    "The same target tokens are scored at every length. Lines: mean over seeds; dots: seeds. An arm whose positions "
    "cannot be extended ends at the training length. Failed runs are left out."
)


def curves(read: StudyRead) -> dict[str, Curve]:
    """Run -> its validation loss during training; empty where none was recorded or the journal is damaged."""
    by_run: dict[str, Curve] = {}
    for recorded in itertools.chain.from_iterable(read.once(health).values()):
        tokens, losses = recorded.losses
        factor = per_byte(read, recorded.run)
        by_run[recorded.run.id] = tokens, [loss * factor for loss in losses]
    return by_run


def per_byte(read: StudyRead, run: StudyRun) -> float:
    """The factor from nats per token to bits per byte, where arms have tokenizers of their own; else 1."""
    metrics = run.evaluation.get("metrics", {})
    return float(metrics[BITS] / metrics[LOSS]) if read.study.validation_text and BITS in metrics else 1.0


@section(order=10.1, title="Validation loss during training")
def during_training(read: StudyRead) -> Section:
    losses, without = read.once(curves), []
    damage = {run.run.id: run.damage for runs in read.once(health).values() for run in runs if run.damage}
    for run in read.runs:
        if run.id in damage:
            without.append(f"{run.arm} seed {run.seed} (damaged: {damage[run.id]})")
        elif run.value is not None and not losses[run.id][0]:
            without.append(f"{run.arm} seed {run.seed} (no evaluations recorded)")
    caption = TRAINING + (f" Without a curve: {clean('; '.join(without))}." if without else "")
    drawn: dict[str, tuple[list[Curve], list[Curve]]] = {arm: ([], []) for arm in read.styles}
    for run in read.runs:
        drawn[run.arm][run.status not in ENDED].append(losses[run.id])
    by_arm = [Curves(arm, healthy, failed) for arm, (healthy, failed) in drawn.items()]
    by_bytes = read.study.validation_text is not None
    metric = f"{BITS}, bits per byte" if by_bytes else f"{LOSS}, nats per token"
    floors = {} if by_bytes else read.study.floors or {}
    figure = training(by_arm, read.styles, floors, metric)
    front = [style.picture("training", "Validation loss during training", caption, figure)]
    return Section(title=FURTHER, front=front, figures=list(_further(read, by_arm, floors, metric)), folded=True)


def _further(
    read: StudyRead, by_arm: Sequence[Curves], floors: Mapping[str, float], metric: str
) -> Iterator[style.Picture]:
    """The same curves over FLOPs and over seconds, where these are known and can be told apart."""
    if len(by_arm) > style.MOST_NAMED:
        return
    factors = {"FLOPs": {arm: read.study.arms[arm].flops_per_token for arm in read.arms}}
    factors["seconds"] = {arm: 1 / (summary.tokens_per_second or math.inf) for arm, summary in read.arms.items()}
    for unit, per_token in factors.items():
        if all(per_token[curves.arm] for curves in by_arm if curves.points()):
            scaled = [_scaled(curves, per_token[curves.arm]) for curves in by_arm]
            figure = training(scaled, read.styles, floors, metric, f"training {unit}")
            caption = "At the median speed of each arm." if unit == "seconds" else "At the FLOPs per token of each arm."
            yield style.picture(f"training-{unit.lower()}", f"Validation loss against {unit}", caption, figure)


def _scaled(curves: Curves, factor: float) -> Curves:
    """The same curves over tokens x factor: the FLOPs or seconds of a token, which the runs of an arm share."""
    parts = ([([factor * at for at in x], y) for x, y in part] for part in (curves.healthy, curves.failed))
    return Curves(curves.arm, *parts)


def training(
    by_arm: Sequence[Curves], look: Mapping[str, ArmStyle], floors: Mapping[str, float], metric: str,
    x: str = "training tokens",
) -> Figure:  # fmt: skip
    """Loss against tokens or another measure `x`: the whole on the left, the last 30 % of it on the right."""
    points = [xy for c in by_arm for xy in c.points()]
    last = max((float(at.max()) for at, _ in points), default=0.0)
    ends = {c.arm: _since(c.healthy, ZOOM_FROM * last) for c in by_arm if c.healthy}
    zoom = _zoom_limits([y for _, y in ends.values()], floors) if any(len(at) > 1 for at, _ in ends.values()) else None
    figure = style.empty(style.WIDE, 3.9)
    panels: list[Axes] = list(figure.subplots(1, 2 if zoom else 1, squeeze=False)[0])
    for axes in panels:
        for c in by_arm:
            style.draw_curves(axes, c, look[c.arm])
        for value in floors.values():
            axes.axhline(value, color=style.MUTED, linewidth=1, dashes=(3, 2), zorder=1)
        axes.set_xlabel(x)
        axes.xaxis.set_major_formatter(style.thousands)
    low = min([float(y.min()) for _, y in points] + list(floors.values()), default=0.0)
    high = max([float(y[0]) for _, y in points] + list(floors.values()), default=1.0)  # not of a loss that blows up
    margin = 0.05 * (high - low) or 0.5
    panels[0].set_ylabel(metric)
    panels[0].set_ylim(low - margin, high + margin)
    for floor, value in floors.items():
        style.note(panels[0], f"{floor} {value:.2f}", (1, value), (-2, 2), "fd", ha="right", va="bottom")
    if zoom:
        panels[0].axvspan(ZOOM_FROM * last, last, color=style.BAND, linewidth=0, zorder=0)
        panels[1].set_xlim(ZOOM_FROM * last, last * 1.005)
        panels[1].set_ylim(*zoom)
        style.title(panels[1], "the last 30 %")
    style.label_ends(panels[-1], {arm: float(y[-1]) for arm, (_, y) in ends.items() if y.size}, look)
    return figure


def _since(curves: Sequence[Curve], start: float) -> tuple[style.Array, style.Array]:
    """The mean curve from `start` on."""
    x, losses = style.stack(curves)
    return (x[x >= start], losses.mean(0)[x >= start]) if x.size else (x, x)


def _zoom_limits(ends: Sequence[style.Array], floors: Mapping[str, float]) -> tuple[float, float]:
    """The window's own range, without arms that learned next to nothing unless there is nothing else."""
    present = [y for y in ends if y.size]
    learned = [y for y in present if y[-1] < failure_ceiling_of(floors)] or present
    low, high = min(float(y.min()) for y in learned), max(float(y.max()) for y in learned)
    margin = 0.08 * (high - low) or 0.05
    return low - margin, high + margin


@section(order=10.2, title="Every seed")
def every_seed(read: StudyRead) -> Section | None:
    runs = by_arm(read.runs)
    finals = {arm: [run.value for run in runs.get(arm, ()) if run.value is not None] for arm in read.styles}
    if not any(math.isfinite(value) for values in finals.values() for value in values):
        return None
    figure = seeds(finals, read.styles, failure_ceiling(read.study), f"{read.measured}, {read.unit}")
    caption = "Final loss of each run; its height within the row means nothing."
    return Section(front=[style.picture("seeds", "Every seed", caption, figure, "half")])


def seeds(finals: Mapping[str, Sequence[float]], look: Mapping[str, ArmStyle], ceiling: float, metric: str) -> Figure:
    """Every seed's final loss, one row per arm; failed runs (NaN, or not below `ceiling`) are counted at the side."""
    figure, axes = style.panel(style.HALF, style.half_height(len(finals)), f"{metric} (bar: mean)")
    for row, (arm, values) in enumerate(finals.items()):
        healthy = [value for value in values if math.isfinite(value) and value < ceiling]
        if healthy:
            # equal losses must not hide each other
            heights = [row + 0.16 * (i % 3 - 1) if len(healthy) > 1 else row for i in range(len(healthy))]
            marker, colour = look[arm].marker, look[arm].colour
            axes.plot(healthy, heights, marker, color=colour, markersize=5.5, alpha=0.75, zorder=3)
            axes.plot([np.mean(healthy)] * 2, [row - 0.32, row + 0.32], color=style.INK, linewidth=1.3, zorder=2)
        failed = len(values) - len(healthy)
        remark = f"× {failed} failed" if failed else "" if values else "no value"
        style.note(axes, remark, (1, row), (4, 0), "fd", va="center")
    style.rows(axes, list(finals))
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    return figure


@section(order=11, title="Beyond the training context")
def over_contexts(read: StudyRead) -> Section | None:
    """Every arm at every longer context against itself at the training one, and the figure of all lengths."""
    rows = contexts_of(read.study, read.usable)
    if len({multiple for _, _, multiple, _, _ in rows}) < 2:
        return None
    losses: dict[str, dict[float, list[float]]] = {}
    for arm, _, _, length, loss in rows:
        losses.setdefault(arm, {}).setdefault(float(length), []).append(float(loss))
    present = {arm: losses[arm] for arm in read.styles if arm in losses}
    block, judged = read.study.evaluation.block_size or 1, read.once(at_contexts)
    figure = contexts(present, read.styles, block, read.metric)

    def cells(row: AtContext) -> dict[str, Cell | str]:
        own, c = losses.get(row.arm, {}).get(float(block)), row.contrast
        return {
            "Arm": Cell(row.arm, f"{row.multiple:g} x the training context"),
            "Tokens:number": str(row.length),
            "Loss:number": number(row.loss if c else None),
            f"At {block}:number": number(float(np.mean(own)) if own else None),
            "Difference:number": difference_cell(c.difference, c.low, c.high) if c else DASH,
            "Holm p:number": p_text(c.p_holm, c.alpha) if c else DASH,
            "Verdict:words": verdict_cell(c) if c else Cell("no positions", "its encoding ends before", "grey"),
        }

    table = tabulate(judged, cells, lambda row: read.arms[row.arm].look)
    data = {"contexts": [vars(row) | {"contrast": row.contrast and asdict(row.contrast)} for row in judged]}
    front = [style.picture("contexts", "Loss against context length", CONTEXTS, figure)]
    return Section(table=table, note=BEYOND if table else "", front=front, data=data)


def at_contexts(read: StudyRead) -> list[AtContext]:
    """See `judge_contexts`."""
    return judge_contexts(read.study, read.runs)


def holding(read: StudyRead) -> str:
    """Which arms hold beyond the training context, in one sentence; "" where none was scored there."""
    arms: dict[str, list[AtContext]] = {}
    for row in read.once(at_contexts):
        arms.setdefault(row.arm, []).append(row)
    if not arms:
        return ""
    claims: dict[str, list[str]] = {}
    for arm, lengths in arms.items():
        claims.setdefault(_claim(lengths, read.unit), []).append(arm)
    said = "; ".join(f"{listed(names)}: {claim}" for claim, names in claims.items())
    exploratory = next(
        (c.reason for row in read.once(at_contexts) if (c := row.contrast) and c.word == "exploratory"), ""
    )
    note = f" Exploratory: {exploratory}." if exploratory else ""
    return f"Beyond the training context of {read.study.evaluation.block_size} tokens, {said}.{note}"


def _claim(lengths: Sequence[AtContext], unit: str) -> str:
    """`holds at 256, loses 0.31 nats at 512`"""
    parts: dict[str, list[str]] = {}
    for row in lengths:
        c, size = row.contrast, ""
        if c is None:
            verb = "cannot be evaluated"
        elif c.word.startswith(("no difference", "better")) or "(smaller" in c.word:
            verb = "holds"
        else:
            verb = VERBS.get(c.word.partition(":")[0], c.word)
            change = signed(c.difference, decimals((c.high - c.low) / 2, c.difference))
            size = f"{change.lstrip('+') if verb == 'loses' else change} {unit} "
        parts.setdefault(verb, []).append(f"{size}at {row.length}")
    return ", ".join(f"{verb} {listed(at)}" for verb, at in parts.items()).replace(" and at ", " and ")


def contexts(losses: style.Measured, look: Mapping[str, ArmStyle], block_size: int, metric: str) -> Figure:
    """Loss against evaluated context length in tokens."""
    figure, axes = style.panel(style.WIDE, 3.5, "context length, tokens", f"{metric}, nats per token")
    lengths = sorted({length for by_length in losses.values() for length in by_length} | {block_size})
    ends = style.draw_measured(axes, losses, look, {length: f"{length:g}" for length in lengths})
    for arm, end in ends.items():
        if end[0] != lengths[-1]:
            style.note(axes, f"{shorten(arm)} ends here", end, (6, -5), "dd", va="top", color=style.INK)
    axes.axvline(block_size, color=style.MUTED, linewidth=1, dashes=(3, 2), zorder=1)
    style.note(axes, "training length", (block_size, 1), (3, -3), "df", va="top")
    style.label_ends(axes, {arm: loss for arm, (length, loss) in ends.items() if length == lengths[-1]}, look)
    return figure
