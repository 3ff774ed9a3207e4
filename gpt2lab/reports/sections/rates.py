"""How each arm's learning rate was found, where the study bracketed it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.tables import Cell, Row, Table, columns, difference_cell
from gpt2lab.results import trial_loss
from gpt2lab.text import DASH, number, signed

NOTE = (
    "Final loss of one run for each multiple of the arm's own rate, on a seed that serves nothing else. The verdict "
    "rests on fresh seeds at each arm's best rate; a best rate at the edge, after the bracket was widened three times, "
    "makes an arm not comparable."
)


@dataclass(frozen=True)
class Trial:
    """One learning rate that was tried, as a multiple of the arm's own. `loss`: infinity when it failed, None when it
    is not finished."""

    factor: float
    loss: float | None


@section(order=80, title="How each arm's learning rate was found")
def rates(read: StudyRead) -> Section | None:
    """Every learning rate that was tried, with one seed each, and what that does to the difference."""
    found = {
        arm: [Trial(one.factor, trial_loss(read.study, read.store, arm, one)) for one in bracket.trials]
        for arm, entry in read.study.arms.items()
        if (bracket := entry.bracket) and bracket.trials
    }
    if not found:
        return None
    factors = sorted({trial.factor for tried in found.values() for trial in tried})
    titles = columns("Arm", *(f"x{factor:g}:number" for factor in factors), "Best rate:number",
                     "At the shared rate:number", "Each at its best:number")  # fmt: skip
    judged = {c.arm: c for c in read.verdicts.contrasts if c.against == read.baseline}
    base = _at_shared(found.get(read.baseline, ()))
    rows = []
    for name, tried in found.items():
        by_factor = {trial.factor: trial for trial in tried}
        bracket, lr = read.study.arms[name].bracket, read.study.arms[name].lr
        assert bracket is not None
        best = "" if bracket.best is None else "at the edge" if bracket.at_edge else f"x{bracket.best:g}"
        own, tuned = _at_shared(tried), judged.get(name)
        shared = "" if own is None or base is None or name == read.baseline else signed(own - base, 3)
        cells = (
            Cell(name),
            *(_trial_cell(by_factor.get(factor), bracket.best) for factor in factors),
            Cell(f"{lr:.3g}" if best else DASH, best),
            Cell(shared, "one seed" if shared else ""),
            difference_cell(tuned.difference, tuned.low, tuned.high) if tuned else Cell(),
        )
        rows.append(Row(cells, read.arms[name].look, name == read.baseline))
    return Section(table=Table(titles, rows), note=NOTE)


def _at_shared(tried: Sequence[Trial]) -> float | None:
    """The loss at the arm's own rate as it was declared."""
    losses = [trial.loss for trial in tried if trial.factor == 1 and trial.loss is not None]
    return losses[0] if losses and math.isfinite(losses[0]) else None


def _trial_cell(trial: Trial | None, best: float | None) -> Cell:
    if trial is None:
        return Cell()
    if trial.loss is None:
        return Cell(DASH, "not finished")
    if not math.isfinite(trial.loss):
        return Cell(DASH, "failed")
    return Cell(number(trial.loss), "best" if trial.factor == best else "")
