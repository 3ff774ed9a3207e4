"""What differences are worth: the compute that the baseline needs for an arm's loss, and how few tokens reach the
baseline's, by runs that finished schedules of other lengths; and how early the order of arms shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from matplotlib.figure import Figure

from gpt2lab.analysis.scaling import FRACTIONS, Agreement, Reach, agreement, multiplier_text, reach, share_text
from gpt2lab.analysis.verdicts import as_json
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.sections.curves import curves
from gpt2lab.reports.tables import Cell, Row, Table, columns, worth_cell
from gpt2lab.results import Study, StudyRun, budget_losses, usable_values
from gpt2lab.store import Store
from gpt2lab.text import DASH, interval, number, quantity, signed

NEAR = 0.02
"""Share of training by which an evaluation may lie away from the fraction that it stands for."""

NOTE = (
    "Mean final losses of runs that each finished a schedule of their own. A multiplier is the compute (or the tokens) "
    "that the baseline needs for an arm's loss, divided by what the arm took. The 95 % interval takes for granted only "
    "that the loss falls ever more slowly with the logarithm of the budget; it is not adjusted for the number of arms."
)
CAPTION = (
    "Every dot is a run that finished a schedule of its own; lines join the means. Where an arm meets the baseline's "
    "curve, to the left or right of its own dots, is what its difference is worth."
)
HORIZON = (
    "Rank agreement of the arms' mean losses during training with those at the end: 1 is the same order, 0 none, -1 "
    "the reverse. These runs were on the way to the end of a long schedule; a screen on a short schedule of its own "
    "can do worse."
)


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Empty where no other budgets were declared."""

    budgets: Mapping[str, Mapping[float, Sequence[float]]] = field(default_factory=dict)
    """arm -> tokens -> final losses, each at the end of its own schedule, for arms that have other budgets"""
    multipliers: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the compute that the baseline needs for the arm's loss, as a multiple of the arm's own"""
    in_tokens: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the same in tokens"""
    shares: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the tokens that it needs for the baseline's loss, as a share of the baseline's"""


def worth(read: StudyRead) -> Worth:
    """By the runs of every arm at other budgets."""
    study, runs, base = read.study, read.runs, read.baseline
    budgets = all_budgets(study, runs, read.store)
    finals = usable_values(study, runs, base)
    shares = {
        arm: reach(_scaled(budgets[arm], 1 / study.arms[base].tokens), finals)
        for arm in study.arms
        if finals and arm != base and arm in budgets
    }
    return Worth(
        budgets=budgets,
        multipliers=multipliers(study, runs, budgets, lambda arm: flops_ratio(study, arm)),
        in_tokens=multipliers(study, runs, budgets, lambda arm: 1 / study.arms[arm].tokens),
        shares=shares,
    )


def all_budgets(study: Study, runs: Sequence[StudyRun], store: Store) -> dict[str, dict[float, list[float]]]:
    """Arm -> tokens -> final losses, for arms that were trained at other budgets too."""
    return {arm: found for arm in study.arms if len(found := budget_losses(study, runs, store, arm)) > 1}


def multipliers(
    study: Study,
    runs: Sequence[StudyRun],
    budgets: Mapping[str, Mapping[float, Sequence[float]]],
    scale: Callable[[str], float],
) -> dict[str, Reach]:
    """Arm -> what of the baseline's budget its final losses are worth; `scale` brings tokens to the arm's own unit."""
    base = study.baseline
    if base not in budgets:
        return {}
    finals = {arm: usable_values(study, runs, arm) for arm in study.arms if arm != base}
    return {arm: reach(_scaled(budgets[base], scale(arm)), values) for arm, values in finals.items() if values}


def flops_ratio(study: Study, arm: str) -> float:
    """What a token of the baseline costs in FLOPs, as a share of all that the arm's run costs."""
    own, base = study.arms[arm], study.arms[study.baseline]
    return float(base.flops_per_token / (own.flops_per_token * own.tokens))


def _scaled(curve: Mapping[float, Sequence[float]], factor: float) -> dict[float, Sequence[float]]:
    return {budget * factor: values for budget, values in curve.items()}


def worth_sentence(read: StudyRead) -> str:
    """What the judged differences are worth, for the head of the page; "" where no curve tells."""
    told = [
        f"{c.arm}: {multiplier_text(reach)}"
        for c in read.verdicts.contrasts
        if c.word.startswith(("better", "worse", "likely")) and (reach := read.once(worth).multipliers.get(c.arm))
    ]
    return f"In the baseline's own terms, {'; '.join(told)}." if told else ""


@section(order=70, title="What differences are worth")
def differences_worth(read: StudyRead) -> Section:
    found = read.once(worth)
    reaches = {"multipliers": found.multipliers, "in_tokens": found.in_tokens, "shares": found.shares}
    data = as_json({key: {arm: asdict(one) for arm, one in reach.items()} for key, reach in reaches.items()})
    if not found.budgets:
        return Section(data=data)
    points = [f"{arm}: {multiplier_text(reach)}." for arm, reach in found.multipliers.items()]
    points += [f"{arm} {share_text(reach, read.baseline)}." for arm, reach in found.shares.items()]
    figure = style.picture(
        "budgets", "Final loss against training tokens", CAPTION, _drawn(found.budgets, read.looks, read.metric)
    )
    return Section(table=_table(read, found), note=NOTE, points=points, front=[figure], data=data)


def _table(read: StudyRead, found: Worth) -> Table:
    """Final losses at other budgets, each at the end of its own schedule, and what differences are worth by them."""
    budgets = sorted({tokens for curve in found.budgets.values() for tokens in curve})
    titles = columns("Arm", *(f"{quantity(tokens)} tokens:number" for tokens in budgets), "Worth, compute:number",
                     "Worth, tokens:number", "Tokens to baseline:number")  # fmt: skip
    rows = []
    for name, arm in read.arms.items():
        own = float(read.study.arms[name].tokens)
        curve = found.budgets.get(name, {own: ()})
        cells = [_losses_cell(curve.get(tokens, ())) for tokens in budgets]
        if not any(cell.text for cell in cells) and arm.mean is not None:
            cells[budgets.index(own)] = Cell(number(arm.mean))
        shown = (*(worth_cell(kind.get(name)) for kind in (found.multipliers, found.in_tokens)),
                 _share_cell(found.shares.get(name)))  # fmt: skip
        rows.append(Row((Cell(name), *cells, *shown), arm.look, name == read.baseline))
    return Table(titles, rows)


def _losses_cell(losses: Sequence[float]) -> Cell:
    if not losses:
        return Cell()
    return Cell(number(sum(losses) / len(losses)), f"{len(losses)} seeds" if len(losses) > 1 else "1 seed")


def _share_cell(found: Reach | None) -> Cell:
    if found is None:
        return Cell()
    low = f"{100 * found.low:.0f}" if found.low > 0 else "less"
    high = f"{100 * found.high:.0f}" if math.isfinite(found.high) else "more"
    return Cell(f"{100 * found.value:.0f} %" if math.isfinite(found.value) else DASH, f"[{low}, {high}]")


def _drawn(finals: style.Measured, look: Mapping[str, style.Look], metric: str) -> Figure:
    """Final loss against training tokens."""
    figure, axes = style.panel(style.WIDE, 3.5)
    ticks = sorted({tokens for by_tokens in finals.values() for tokens in by_tokens})
    style.draw_measured(axes, finals, look, {tokens: quantity(tokens) for tokens in ticks})
    axes.set_xlabel("training tokens, on a schedule of their own")
    axes.set_ylabel(f"final {metric}, nats per token")
    ends = {arm: style.mean_of(by_tokens[max(by_tokens)]) for arm, by_tokens in finals.items()}
    style.label_ends(axes, ends, look)
    return figure


@section(order=100, title="How early the order of arms shows")
def order_of_arms(read: StudyRead) -> Section:
    found = horizon(read)
    data = as_json({"horizon": [asdict(one) for one in found]})
    if not found:
        return Section(data=data)
    rows = []
    for one in found:
        inside = interval(one.low, one.high, 2) if math.isfinite(one.low) else ""
        tau = Cell(signed(one.tau, 2), inside)
        rows.append(Row((Cell(f"{100 * one.fraction:g} %"), tau, Cell(str(one.arms)), Cell(str(one.seeds)))))
    titles = columns("Share of training", "Kendall's tau:number", "Arms:number", "Seeds:number")
    return Section(table=Table(titles, rows), note=HORIZON, data=data)


def horizon(read: StudyRead) -> list[Agreement]:
    """How well the order of arms at fractions of training agrees with that of their final losses."""
    drawn = read.once(curves).drawn
    final = _by_arm(read.usable, {run.id: run.value for run in read.usable if run.value is not None})
    found = []
    for fraction in FRACTIONS:
        early = {run.id: loss_at(drawn.get(run.id, ((), ())), fraction) for run in read.usable}
        agreed = agreement(_by_arm(read.usable, early), final, fraction)
        found += [agreed] if agreed is not None else []
    return found


def _by_arm(runs: Sequence[StudyRun], values: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {run.arm: {} for run in runs}
    for run in runs:
        value = values.get(run.id)
        if value is not None:
            found[run.arm][str(run.seed)] = value
    return found


def loss_at(curve: style.Curve, fraction: float) -> float | None:
    """The loss after a fraction of training, if it was evaluated there."""
    tokens, losses = curve
    if not tokens or not tokens[-1]:
        return None
    gaps = [abs(t / tokens[-1] - fraction) for t in tokens]
    nearest = min(range(len(gaps)), key=gaps.__getitem__)
    value = losses[nearest]
    return value if gaps[nearest] <= NEAR and math.isfinite(value) else None
