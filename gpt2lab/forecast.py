"""What a plan will be able to say, before anything runs: the smallest difference it sees, and what X would take.

Layer: above the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpt2lab.analysis import planning
from gpt2lab.analysis.looks import look_alpha
from gpt2lab.plan import Plan
from gpt2lab.store import Store


@dataclass(frozen=True)
class Forecast:
    """By the noise floor of the scale, all in the metric's unit."""

    seeds: int
    sd: float
    detectable: float
    """true difference found with 80 % power"""
    detectable_upper: float
    """the same with the sd at its upper 80 % limit"""
    needed: int
    """seeds per arm that find X with 80 % power, with the sd at its upper limit"""
    seconds_needed: float
    """what that many seeds would take here"""
    level: float
    """of each contrast"""


def forecast(plan: Plan) -> Forecast | None:
    """None without a measured floor."""
    floor, ablation = plan.floor, plan.ablation
    if floor is None or not floor.sd > 0:
        return None
    alpha = look_alpha(ablation.looks, ablation.alpha) if ablation.looks else ablation.alpha
    level = alpha / max(1, len(ablation.contrasts))
    n, base = len(plan.seeds), max(len(plan.seeds), ablation.baseline_seeds or 0)
    upper = float(planning.sd_upper(floor.sd, floor.df))
    least = planning.detectable(n, base, alpha=level) if n > 1 else float("inf")
    needed = planning.seeds_for_power(ablation.smallest_effect / upper, alpha=level)
    one_each = sum(arm.seconds for arm in plan.arms.values()) / plan.machine.jobs
    return Forecast(n, floor.sd, least * floor.sd, least * upper, needed, needed * one_each, level)


def seconds_left(plan: Plan, store: Store) -> float:
    """Estimated time until all is done that the plan knows of, on this machine; runs at other budgets count by theirs,
    and where rates are still to be found, so do the runs that come after."""
    from gpt2lab.runs import is_finished, tokens_of

    waiting: dict[str, float] = {}
    for arm in plan.arms.values():
        per_token = arm.seconds / arm.tokens
        trials = list(arm.tuning.trials.values()) if arm.tuning else []
        for run in [*trials, *arm.runs, *(run for runs in arm.curve.values() for run in runs)]:
            if not is_finished(run, store):
                waiting[run.id] = per_token * tokens_of(run.config)
    return sum(waiting.values()) / plan.machine.jobs


def lines(plan: Plan) -> list[str]:
    """The forecast in sentences, for the plan and the start of a run."""
    ablation, found = plan.ablation, forecast(plan)
    effect, unit = f"{ablation.smallest_effect:g}", "nats"
    told = [f"left out to fit the budget: {'; '.join(plan.left_out)}"] if plan.left_out else []
    if found is None:
        how = plan.why_no_floor or "its runs do not differ"
        told.append(
            f"no noise floor for {ablation.scale} ({how}), so power is unknown; `gpt2lab noise {ablation.scale}` "
            "measures one"
        )
        return told
    floor = plan.floor
    assert floor
    seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''} per arm"
    told.append(
        f"noise floor: sd {floor.sd:.2g} {unit} [{floor.low:.2g}, {floor.high:.2g}] of {len(floor.values)} repeats, "
        f"{floor.age}"
    )
    if found.detectable < float("inf"):
        told.append(
            f"with {seeds} the smallest difference seen four times out of five is {found.detectable:.2g} {unit} "
            f"(up to {found.detectable_upper:.2g} if the noise is at its upper 80 % limit)"
        )
    if found.needed > found.seeds:
        cost = clock(found.seconds_needed)
        told.append(f"to see {effect} {unit} it takes {found.needed} seeds per arm, about {cost}")
    if 3 * floor.sd > ablation.smallest_effect:
        told.append(f"three sds are more than {effect}, the smallest effect of interest: few seeds cannot resolve it")
    return told


def clock(seconds: float) -> str:
    """`40 s`, `12 minutes`, `3.4 hours` here."""
    if seconds < 90:
        return f"{seconds:.0f} s here"
    return f"{seconds / 60:.0f} minutes here" if seconds < 5400 else f"{seconds / 3600:.1f} hours here"


def as_record(plan: Plan) -> dict[str, Any] | None:
    """The forecast as plain data."""
    found = forecast(plan)
    if found is None:
        return None
    return {
        "noise_sd": found.sd, "detectable": found.detectable, "detectable_upper": found.detectable_upper,
        "seeds_for_smallest_effect": found.needed, "seconds_for_smallest_effect": found.seconds_needed,
    }  # fmt: skip
