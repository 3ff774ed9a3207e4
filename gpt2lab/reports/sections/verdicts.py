"""The verdicts: a table with a row for every contrast, and the figure of their differences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from gpt2lab.analysis import Contrast
from gpt2lab.analysis.wording import listed
from gpt2lab.reports import style, tables
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead, Summary
from gpt2lab.reports.sections.worth import worth
from gpt2lab.reports.tables import Cell, Row, Table, columns, difference_cell, is_pair, p_cell, verdict_cell, worth_cell
from gpt2lab.results import LOSS, Study
from gpt2lab.text import DASH, change, number, plural, quantity, shorten


@section(order=0, title="Verdicts")
def verdicts(read: StudyRead) -> Section:
    return Section(table=verdict_table(read), note=_note(read), front=_forest(read))


def verdict_table(read: StudyRead) -> Table:
    """One row for the baseline, one per contrast, one for every arm that no contrast names. What differences are worth
    in compute, and what was expected, have columns where the study has them."""
    titles = columns("Arm", "Mean:number", "n:number", "Difference:number", "Holm p:number", "Verdict:words",
                     "Worth:number", "Cost:number", "Expected:words")  # fmt: skip
    found = [_arm_row(read, read.baseline, Cell("baseline", chip="grey"))]
    found += [_contrast_row(read, contrast) for contrast in read.verdicts.contrasts]
    judged = {read.baseline, *(contrast.arm for contrast in read.verdicts.contrasts)}
    chip = Cell("part of effects" if read.study.factors else "not judged", chip="grey")
    found += [_arm_row(read, name, chip) for name in read.arms if name not in judged]
    kept = [
        i
        for i, title in enumerate(titles)
        if title.title not in ("Worth", "Expected") or any(row.cells[i].text for row in found)
    ]
    return Table([titles[i] for i in kept], [replace(row, cells=[row.cells[i] for i in kept]) for row in found])


def _contrast_row(read: StudyRead, contrast: Contrast) -> Row:
    """A pair shows its arm; an effect of a factorial design has no arm of its own, only the cells it is made from."""
    study = read.study
    numbers = (
        difference_cell(contrast.difference, contrast.low, contrast.high),
        Cell(p_cell(contrast.p_holm, contrast.alpha)),
        verdict_cell(contrast),
    )
    arm = read.arms.get(contrast.arm) if is_pair(contrast) else None
    if arm is None:
        counts = f"{contrast.n_arm} + {contrast.n_against}"
        name = Cell(contrast.arm, f"against {contrast.against}, over {len(contrast.weights)} cells")
        expected = Cell((study.expected or {}).get(contrast.arm) or "")
        return Row((name, Cell(), Cell(counts), *numbers, Cell(), Cell(), expected))
    to_baseline = contrast.against == read.baseline
    name = Cell(arm.arm, ("" if to_baseline else f"against {contrast.against}; ") + changes(study, arm.arm))
    cells = (name, *_statistics(arm, contrast.n_arm), *numbers,
             worth_cell(read.once(worth).multipliers.get(arm.arm)) if to_baseline else Cell(),
             _cost_cell(read, arm.arm), Cell(study.arms[arm.arm].expected or ""))  # fmt: skip
    return Row(cells, look=arm.look)


def _arm_row(read: StudyRead, name: str, verdict: Cell) -> Row:
    arm, expected = read.arms[name], Cell(read.study.arms[name].expected or "")
    cells = (Cell(name, changes(read.study, name)), *_statistics(arm), Cell(), Cell(), verdict, Cell())
    return Row((*cells, _cost_cell(read, name), expected), arm.look, name == read.baseline)


def _statistics(arm: Summary, judged: int | None = None) -> tuple[Cell, Cell]:
    """Mean and n; `judged` is told where it is fewer, for seeds beyond a look do not count."""
    counts = [(arm.failed, "failed"), (arm.missing, "missing")]
    counts += [(judged, "judged")] if judged is not None and judged < arm.n else []
    remarks = [f"{count} {what}" for count, what in counts if count]
    spread = f"sd {number(arm.sd)}" if arm.sd is not None else ""
    return Cell(number(arm.mean), spread), Cell(str(arm.n), ", ".join(remarks))


def _cost_cell(read: StudyRead, name: str) -> Cell:
    """FLOPs of a run against the baseline's, and below it the speed."""
    own, base = read.study.arms[name], read.study.arms[read.baseline]
    speed, reference = read.arms[name].tokens_per_second, read.arms[read.baseline].tokens_per_second
    if name == read.baseline:
        return Cell(f"{quantity(own.flops_per_token * own.tokens)}FLOP", f"{quantity(speed)} tokens/s")
    ratio = change(own.flops_per_token * own.tokens, base.flops_per_token * base.tokens)
    faster = change(speed, reference)
    return Cell(f"{ratio} FLOPs" if ratio else DASH, f"{faster} speed" if faster else "")


def changes(study: Study, arm: str) -> str:
    """What sets an arm apart from the base, as `model.norm = rmsnorm`."""
    entry = study.arms[arm]
    if not entry.changes:
        return "control: changes nothing" if entry.control else "nothing changed"
    return "; ".join(f"{key} = {_shown(value)}" for key, value in entry.changes.items())


def _shown(value: Any) -> str:
    """A value as people say it: `rotary`, `plain(qk_norm=true)`, `rotary, none`."""
    if isinstance(value, Mapping):
        options = ", ".join(f"{key}={_shown(inner)}" for key, inner in value.items() if key != "name")
        return f"{value['name']}({options})" if "name" in value else options
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _note(read: StudyRead) -> str:
    found, small = read.verdicts, f"{read.verdicts.smallest_effect:g} {read.unit}"
    known = [c for c in found.contrasts if math.isfinite(c.low)]
    rescued = [c for c in known if (c.low, c.high) != (c.joint_low, c.joint_high)]
    together = "these intervals hold together"
    if rescued:
        arms = listed(f"{c.arm} against {c.against}" for c in rescued)
        together = (
            f"these intervals hold together, but for {arms}: decided at a later step of Holm's method, each holds by "
            "itself, and those that hold together are in the CSV and JSON as joint_low and joint_high"
        )
    return (
        f"Difference: arm minus baseline in final {read.metric}, {read.unit}; lower is better. Below it the "
        f"{tables.confidence(found)} interval (Welch), adjusted for the family of {plural(found.members, 'contrast')}, "
        f"as p is by Holm's method: {together}. A difference below {small} was declared too "
        "small to matter. Cost: FLOPs of a whole run, and training speed, against the baseline's."
    )


EFFECT = style.Look(style.ARMS[0], "D", "solid")
"""How an effect is drawn that belongs to no single arm."""


def _forest(read: StudyRead) -> list[style.Picture]:
    found, members = read.verdicts, plural(read.verdicts.members, "contrast")
    if not found.contrasts:
        return []
    effects = []
    for c in found.contrasts:
        label = c.arm if c.against == read.baseline or not is_pair(c) else f"{c.arm} − {c.against}"
        words = "   ".join((difference_cell(c.difference, c.low, c.high).text, verdict_cell(c).text))
        look = read.looks.get(c.arm, EFFECT)
        effects.append(style.Interval(label, c.difference, c.low, c.high, words, look.colour, look.marker))
    caption = (
        f"Bars: {tables.confidence(found)} intervals adjusted for the family of {members}; a hollow mark has no "
        "interval, an arrow an end outside the frame. Shaded: differences below "
        f"{found.smallest_effect:g} {read.unit}, declared too small to matter."
    )
    noise = read.study.noise.sd if read.study.noise and read.metric == LOSS else None
    if noise:
        caption += f" Dotted: one sd of the noise floor, {number(noise, 3)}, to either side."
    of_factors = bool(read.study.factors)
    to = "" if of_factors else f" to {shorten(read.baseline)}"
    title = "Effects of the factors" if of_factors else "Difference to the baseline"
    return [style.picture("differences", title, caption, forest(effects, found.smallest_effect, to, noise))]


def forest(effects: Sequence[style.Interval], smallest_effect: float, to: str, noise: float | None = None) -> Figure:
    """Differences with their family-adjusted intervals, over the band of effects too small to matter; dotted lines one
    sd of the noise floor away from nothing. `to`: what the differences are to, as ` to learned`."""
    figure, axes = style.panel(style.WIDE, 1.1 + 0.4 * max(2, len(effects)))
    points = [e.difference for e in effects if math.isfinite(e.difference)] or [0.0]
    ends = [end for e in effects for end in (e.low, e.high)]
    widest = 3 * max(*(abs(p) for p in points), 2 * smallest_effect)
    low, high = style.intervals_within([*points, -1.6 * smallest_effect, 1.6 * smallest_effect], ends, widest)
    margin = 0.04 * (high - low) or 1.0
    axes.axvspan(-smallest_effect, smallest_effect, color=style.BAND, linewidth=0, zorder=0)
    axes.axvline(0, color=style.MUTED, linewidth=1, zorder=1)
    for side in (-noise, noise) if noise else ():
        axes.axvline(side, color=style.MUTED, linewidth=1, dashes=(1, 2), zorder=1)
    style.draw_intervals(axes, effects, (low - margin, high + margin), ("lower loss", "higher loss"))
    axes.set_xlabel(f"difference in final loss{to}, nats (shaded: ±{smallest_effect:g})")
    return figure
