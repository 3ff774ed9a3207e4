"""What differences are worth in compute, by runs at other budgets; and how early the order of arms shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from gpt2lab.analysis.results import Study, StudyRun, budget_losses, usable_values
from gpt2lab.analysis.scaling import (
    FRACTIONS,
    Agreement,
    Reach,
    agreement,
    multiplier_text,
    reach,
)
from gpt2lab.analysis.verdicts import as_json
from gpt2lab.basics.text import DASH, number, plural, quantity
from gpt2lab.reports import style
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead, Summary
from gpt2lab.reports.sections.curves import curves
from gpt2lab.reports.tables import Cell, Table, worth_cell
from gpt2lab.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCREENS = (0.25, 0.5)
"""Shares of training at which verdicts.json has the differences."""

NEAR = 0.02
"""Share of training by which an evaluation may lie away from the fraction that it is used for."""

NOTE = (
    "Mean final losses of runs that each finished their own schedule. A multiplier is the compute (or the tokens) "
    "that the baseline needs for an arm's loss, divided by what the arm used. The 95 % interval assumes only "
    "that the loss falls ever more slowly with the logarithm of the budget; it is not adjusted for the number of arms."
)
CAPTION = (
    "Every dot is a run that finished its own schedule; lines join the means. The horizontal distance from an arm's "
    "dots to the baseline's curve shows what its difference is worth."
)

Budgets = Mapping[str, Mapping[float, Sequence[float]]]
"""Arm -> tokens -> final losses, each at the end of its own schedule, for arms that have other budgets."""


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Empty where no other budgets were declared."""

    budgets: Budgets = field(default_factory=dict)
    multipliers: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the compute that the baseline needs for the arm's loss, as a multiple of the arm's own"""
    in_tokens: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the same in tokens"""
    shares: Mapping[str, Reach] = field(default_factory=dict)
    """arm -> the tokens that it needs for the baseline's loss, as a share of the baseline's"""


def worth(read: StudyRead) -> Worth:
    """By the runs of every arm at other budgets."""
    study, runs, base = read.study, read.runs, read.baseline
    budgets = _budgets(study, runs, read.store)
    finals = usable_values(study, runs, base)
    shares = {
        arm: reach(_scaled(budgets[arm], 1 / study.arms[base].tokens), finals)
        for arm in study.arms
        if finals and arm != base and arm in budgets
    }
    return Worth(
        budgets=budgets,
        multipliers=_multipliers(study, runs, budgets, lambda arm: _flops_ratio(study, arm)),
        in_tokens=_multipliers(study, runs, budgets, lambda arm: 1 / study.arms[arm].tokens),
        shares=shares,
    )


def _budgets(study: Study, runs: Sequence[StudyRun], store: Store) -> Budgets:
    return {arm: losses for arm in study.arms if len(losses := budget_losses(study, runs, store, arm)) > 1}


def _multipliers(
    study: Study, runs: Sequence[StudyRun], budgets: Budgets, scale: Callable[[str], float]
) -> dict[str, Reach]:
    """Arm -> what of the baseline's budget its final losses are worth; `scale` brings tokens to the arm's own unit."""
    base = study.baseline
    if base not in budgets:
        return {}
    finals = {arm: usable_values(study, runs, arm) for arm in study.arms if arm != base}
    return {arm: reach(_scaled(budgets[base], scale(arm)), values) for arm, values in finals.items() if values}


def _flops_ratio(study: Study, arm: str) -> float:
    """What a token of the baseline costs in FLOPs, as a share of all that the arm's run costs."""
    entry, base = study.arms[arm], study.arms[study.baseline]
    return base.flops_per_token / (entry.flops_per_token * entry.tokens)


def _scaled(curve: Mapping[float, Sequence[float]], factor: float) -> dict[float, Sequence[float]]:
    return {budget * factor: values for budget, values in curve.items()}


def worth_sentence(read: StudyRead) -> str:
    """What the judged differences are worth, for the head of the page; "" without a curve to read it from."""
    parts = [
        f"{c.arm}: {multiplier_text(reach)}"
        for c in read.verdicts.contrasts
        if c.word.startswith(("better", "worse", "likely")) and (reach := read.once(worth).multipliers.get(c.arm))
    ]
    return f"In the baseline's own terms, {'; '.join(parts)}." if parts else ""


@section(order=70, title="What differences are worth")
def differences_worth(read: StudyRead) -> Section:
    values = read.once(worth)
    reaches = {"multipliers": values.multipliers, "in_tokens": values.in_tokens, "shares": values.shares}
    data = as_json({key: {arm: asdict(reach) for arm, reach in by_arm.items()} for key, by_arm in reaches.items()})
    if not values.budgets:
        return Section(data=data)
    figure = _drawn(values.budgets, read.styles, f"{read.measured}, {read.unit}")
    front = [style.picture("budgets", "Final loss against training tokens", CAPTION, figure)]
    return Section(table=_table(read, values), note=NOTE, front=front, data=data)


def _table(read: StudyRead, found: Worth) -> Table | None:
    """Final losses at other budgets, each at the end of its own schedule, and what differences are worth by them."""
    budgets = sorted({tokens for curve in found.budgets.values() for tokens in curve})

    def cells(arm: Summary) -> dict[str, Cell]:
        tokens = float(read.study.arms[arm.arm].tokens)
        only: Mapping[float, Sequence[float]] = {} if arm.mean is None else {tokens: [arm.mean]}
        curve = found.budgets.get(arm.arm)
        return {
            **{f"{quantity(tokens)} tokens:number": _losses_cell((curve or only).get(tokens, ()), counted=bool(curve))
               for tokens in budgets},
            "Worth, compute:number": worth_cell(found.multipliers.get(arm.arm)),
            "Worth, tokens:number": worth_cell(found.in_tokens.get(arm.arm)),
            "Tokens to baseline:number": _share_cell(found.shares.get(arm.arm)),
        }  # fmt: skip

    return read.arm_table(cells)


def _losses_cell(losses: Sequence[float], *, counted: bool) -> Cell:
    if not losses:
        return Cell()
    return Cell(number(sum(losses) / len(losses)), plural(len(losses), "seed") if counted else "")


def _share_cell(share: Reach | None) -> Cell:
    if share is None:
        return Cell()
    low = f"{100 * share.low:.0f}" if share.low > 0 else "less"
    high = f"{100 * share.high:.0f}" if math.isfinite(share.high) else "more"
    return Cell(f"{100 * share.value:.0f} %" if math.isfinite(share.value) else DASH, f"[{low}, {high}]")


def _drawn(finals: Budgets, look: Mapping[str, style.ArmStyle], metric: str) -> Figure:
    """Final loss against training tokens."""
    x, y = "training tokens, on a schedule of their own", metric
    figure, axes = style.panel(style.WIDE, 3.5, x, y)
    ticks = sorted({tokens for by_tokens in finals.values() for tokens in by_tokens})
    ends = style.draw_measured(axes, finals, look, {tokens: quantity(tokens) for tokens in ticks})
    style.label_ends(axes, {arm: loss for arm, (_, loss) in ends.items()}, look)
    return figure


@section(order=100)
def order_of_arms(read: StudyRead) -> Section:
    """For verdicts.json alone: how early the order of arms is that of the end."""
    return Section(data=as_json({"horizon": [asdict(agreed) for agreed in horizon(read)]}))


def horizon(read: StudyRead) -> list[Agreement]:
    """How well the order of arms at fractions of training agrees with that of their final losses."""
    drawn = read.once(curves)
    final = _by_arm(read.usable, {run.id: run.value for run in read.usable})
    agreements = []
    for fraction in FRACTIONS:
        early = {run.id: loss_at(drawn[run.id], fraction) for run in read.usable}
        agreements.append(agreement(_by_arm(read.usable, early), final, fraction))
    return [agreed for agreed in agreements if agreed is not None]


def early_differences(read: StudyRead, weights: Mapping[str, float]) -> dict[str, float]:
    """Share of training -> the difference of a contrast there, in nats, from the means of its arms; shares at which an
    arm was not evaluated are left out."""
    drawn, differences = read.once(curves), {}
    runs = [run for run in read.usable if run.arm in weights]
    for fraction in SCREENS:
        early = {run.id: loss_at(drawn[run.id], fraction) for run in runs}
        losses = _by_arm(runs, early)
        if all(losses.get(arm) for arm in weights):
            means = {arm: fmean(losses[arm].values()) for arm in weights}
            differences[f"{fraction:g}"] = sum(weight * means[arm] for arm, weight in weights.items())
    return differences


def _by_arm(runs: Sequence[StudyRun], values: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    by_arm: dict[str, dict[str, float]] = {run.arm: {} for run in runs}
    for run in runs:
        if (value := values.get(run.id)) is not None:
            by_arm[run.arm][str(run.seed)] = value
    return by_arm


def loss_at(curve: style.Curve, fraction: float) -> float | None:
    """The loss after a fraction of training, if it was evaluated there."""
    tokens, losses = curve
    if not tokens or not tokens[-1]:
        return None
    gap, nearest = min((abs(t / tokens[-1] - fraction), i) for i, t in enumerate(tokens))
    return losses[nearest] if gap <= NEAR and math.isfinite(losses[nearest]) else None
