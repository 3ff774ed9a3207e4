"""A ladder: the same ablation at several sizes, trained for the same tokens per parameter. Does a difference grow?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt2lab.analysis import wording
from gpt2lab.analysis.scaling import Reach, difference_trend, trend
from gpt2lab.errors import DataFault
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.sections.worth import all_budgets, flops_ratio, multipliers
from gpt2lab.results import Study, cleaned, collect, unit, usable_values
from gpt2lab.store import Store
from gpt2lab.text import quantity

ENOUGH = 3
"""Sizes from which on a line is more than the two points it goes through."""


@section(order=90, title="Over size")
def over_size(read: StudyRead) -> Section | None:
    found = trends(read.study, read.store)
    if not found:
        return None
    note = (
        f"The same ablation at {len(found[0].sizes)} sizes, each trained for {read.study.tokens_per_parameter:g} "
        "tokens per parameter: the least-squares slope over the logarithm of the parameters, with the noise of every "
        "size (95 % interval, not adjusted for the number of arms). Sizes beyond those that were run may differ."
    )
    return Section(points=[str(one) for one in found], note=note)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One size: final losses by arm, runs that failed left out, and what differences are worth there."""

    parameters: float
    losses: Mapping[str, Sequence[float]]
    multipliers: Mapping[str, Reach]


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How one arm's difference to the baseline changes with every tenfold of parameters."""

    arm: str
    sizes: Sequence[float]
    differences: Sequence[float]
    change: float
    """in the metric's unit; negative: the arm gains with size"""
    low: float
    high: float
    multiplier: tuple[float, float, float]
    """factor by which the compute multiplier changes, and its interval; NaN without budget curves"""
    unit: str

    def __str__(self) -> str:
        """`rotary: -0.250 at 842 k, -0.210 at 3.2 M parameters; with every tenfold ...`, and how surely."""
        digits = wording.decimals((self.high - self.low) / 2, self.change)
        pairs = zip(self.differences, self.sizes, strict=True)
        steps = ", ".join(f"{d:+.{digits}f} at {quantity(size)}" for d, size in pairs)
        told = f"{self.arm}: {steps} parameters; with every tenfold of size the difference changes by "
        told += wording.effect(self.change, self.low, self.high, self.unit)
        open_ = self.low <= 0 <= self.high
        told += ", so whether it grows or shrinks is open" if open_ else ", so it does change with size"
        factor, low, high = self.multiplier
        if math.isfinite(factor):
            spans = low <= 1 <= high
            told += f"; its compute multiplier changes {factor:.2f}-fold [{low:.2f}, {high:.2f}]"
            told += ": the interval spans 1, so nothing is known of its trend" if spans else ""
        few = f"; {len(self.sizes)} sizes, the least that a line needs" if len(self.sizes) < ENOUGH else ""
        return told + few + "."


def rungs(study: Study, store: Store) -> list[Rung]:
    """Every size at which the study's ablation was run with the same baseline and the same tokens per parameter, the
    smallest first; none unless it was declared so."""
    if not study.tokens_per_parameter:
        return []
    found = []
    for name in store.studies():
        if name.partition("@")[0] != study.name.partition("@")[0]:
            continue
        try:
            other = cleaned(store.study(name))
            if all(
                getattr(other, key) == getattr(study, key) for key in ("tokens_per_parameter", "baseline", "metric")
            ):
                found.append(_rung(other, store))
        except (DataFault, KeyError, TypeError):
            continue
    return sorted(found, key=lambda rung: rung.parameters)


def _rung(study: Study, store: Store) -> Rung:
    runs = collect(study, store)
    budgets = all_budgets(study, runs, store)
    return Rung(
        parameters=float(study.scope.parameters or 0),
        losses={arm: usable_values(study, runs, arm) for arm in study.arms},
        multipliers=multipliers(study, runs, budgets, lambda arm: flops_ratio(study, arm)),
    )


def trends(study: Study, store: Store) -> list[Trend]:
    """One for every arm that at least two sizes have two usable runs of, as of the baseline."""
    ladder, base = rungs(study, store), study.baseline
    found = []
    for arm in study.arms:
        having = [r for r in ladder if min(len(r.losses.get(arm, ())), len(r.losses.get(base, ()))) > 1]
        if arm == base or len({r.parameters for r in having}) < 2:
            continue
        sizes = [rung.parameters for rung in having]
        pairs = [(rung.losses[arm], rung.losses[base]) for rung in having]
        moved = difference_trend(sizes, pairs, alpha=study.alpha)
        known = [(rung.parameters, rung.multipliers[arm]) for rung in having if arm in rung.multipliers]
        found.append(
            Trend(
                arm=arm, sizes=sizes, differences=[sum(a) / len(a) - sum(b) / len(b) for a, b in pairs],
                change=float(moved.difference), low=float(moved.low), high=float(moved.high),
                multiplier=trend([size for size, _ in known], [reach for _, reach in known]), unit=unit(study),
            )
        )  # fmt: skip
    return found
