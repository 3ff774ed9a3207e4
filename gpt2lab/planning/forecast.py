"""What a plan will be able to say, before anything runs: the smallest difference it sees, and what X would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpt2lab.analysis import planning
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.runs import is_finished, tokens_of
from gpt2lab.planning.scope import Scope, family, level_of, makespan, needed, sizes, study_seconds
from gpt2lab.store import Store

INFINITY = float("inf")


@dataclass(frozen=True)
class Forecast:
    """By the noise floor of the scale, in nats, for the contrast that is known worst."""

    seeds: int
    sd: float
    detectable: float
    """true difference found with 80 % power"""
    detectable_upper: float
    """the same with the sd at its upper 80 % limit"""
    needed: int
    """seeds per arm that find X with 80 % power, with the sd at its upper limit"""
    seconds_needed: float
    """what a study of that many seeds would take here, from its start"""
    level: float
    """of each contrast"""


def forecast(plan: Plan) -> Forecast | None:
    """None without a measured floor."""
    floor, ablation = plan.floor, plan.ablation
    if floor is None or not floor.sd > 0:
        return None
    level, n = level_of(ablation), len(plan.seeds)
    base = max(n, ablation.baseline_seeds or 0)
    least = max(
        planning.detectable(sizes(c, n, base, ablation.baseline), tuple(c.weights.values()), alpha=level)
        for c in family(ablation)
    )
    upper, enough = float(planning.sd_upper(floor.sd, floor.df)), needed(ablation, floor)
    return Forecast(n, floor.sd, least * floor.sd, least * upper, enough, _study_seconds(plan, enough), level)


def _study_seconds(plan: Plan, n: int) -> float:
    """What the plan's study would take here with n seeds per arm."""
    seeds, more = tuple(range(n)), tuple(range(max(n, plan.ablation.baseline_seeds or 0)))
    seconds = {name: arm.seconds for name, arm in plan.arms.items()}
    return study_seconds(plan.ablation, Scope(tuple(plan.arms), seeds, more), seconds, plan.machine.jobs)


def seconds_left(plan: Plan, store: Store) -> float:
    """Estimated time until all is done that the plan knows of, on this machine; runs at other budgets count by theirs,
    and where settings are still to be found, so do the runs that come after."""
    trials: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, arm in plan.arms.items():
        rates = arm.tuning.runs if arm.tuning else ()
        for waiting, runs in ((trials, [rates]), (others, [arm.runs, arm.shared, *arm.curve.values()])):
            for run in (run for some in runs for run in some if not is_finished(run, store)):
                waiting[run.id] = arm.seconds * tokens_of(run.config) / arm.tokens
        search = arm.tuning.search if arm.tuning else None
        if arm.tuning and search and arm.tuning.open:  # then `runs` are those at the settings as written
            trials |= {f"{name} {turn}": arm.seconds for turn in range(arm.tuning.left * search.settings.seeds)}
            others |= {f"{name} {run.seed} again": arm.seconds for run in arm.runs}
    jobs = plan.machine.jobs
    return makespan(trials.values(), jobs) + makespan(others.values(), jobs)


def lines(plan: Plan) -> list[str]:
    """The forecast in sentences, for the plan and the start of a run."""
    scale, found, floor = plan.ablation.scale, forecast(plan), plan.floor
    told = [f"left out to fit the budget: {'; '.join(plan.left_out)}"] if plan.left_out else []
    if found is None or floor is None:
        how = plan.why_no_floor or "its runs do not differ"
        return [
            *told,
            f"no noise floor for {scale} ({how}), so power is unknown; `{plan.ablation.noise_command}` measures one",
        ]
    told.append(
        f"noise floor: sd {floor.sd:.2g} nats [{floor.low:.2g}, {floor.high:.2g}] of {len(floor.values)} repeats, "
        f"{floor.age}"
    )
    if found.detectable < INFINITY:
        told.append(
            f"with {_seeds(found.seeds)} a difference of {found.detectable:.2g} nats is found four times out of five "
            f"({found.detectable_upper:.2g} if the noise is at its upper 80 % limit)"
        )
    told.append(_what_x_takes(plan, found))
    if plan.ablation.tune:
        told.append("intervals will be wider by what the search of rates leaves open, known once its trials are there")
    return told


def _what_x_takes(plan: Plan, found: Forecast) -> str:
    effect = f"{plan.ablation.smallest_effect:g} nats, the smallest effect of interest"
    if found.needed <= found.seeds:
        return f"that is enough for {effect}: {_seeds(found.needed)} would do"
    return f"for {effect}, it takes {_seeds(found.needed)}: about {clock(found.seconds_needed)}"


def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n > 1 else ''} per arm"


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
    least = (found.detectable, found.detectable_upper) if found.detectable < INFINITY else (None, None)  # JSON has none
    return {
        "noise_sd": found.sd, "detectable": least[0], "detectable_upper": least[1],
        "seeds_for_smallest_effect": found.needed, "seconds_for_smallest_effect": found.seconds_needed,
    }  # fmt: skip
