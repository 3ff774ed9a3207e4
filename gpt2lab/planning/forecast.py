"""The forecast of a plan before anything runs: the smallest difference that it detects, and its cost."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gpt2lab.analysis import planning
from gpt2lab.basics.text import duration, plural
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.runs import is_finished, repetition, tokens_of
from gpt2lab.planning.scope import StudyScope, family, level_of, makespan, needed, sizes, study_seconds
from gpt2lab.store import Store


@dataclass(frozen=True)
class Forecast:
    """In nats, from the noise floor of the scale, for the contrast with the largest standard error."""

    seeds: int
    sd: float
    detectable: float
    """true difference found with 80 % power"""
    detectable_upper: float
    """the same with the sd at its upper 80 % limit"""
    needed: int
    """seeds per arm that find X with 80 % power, with the sd at its upper limit"""
    seconds_needed: float
    """estimated time of a study with that many seeds on this machine, from its start"""
    level: float
    """of each contrast"""


def forecast(plan: Plan) -> Forecast | None:
    """None without a measured floor."""
    floor, ablation = plan.floor, plan.ablation
    if floor is None or not floor.sd > 0:
        return None
    level, n, more = level_of(ablation), len(plan.seeds), ablation.baseline_seeds or 0
    least = max(
        planning.detectable(sizes(c, n, max(n, more), ablation.baseline), tuple(c.weights.values()), alpha=level)
        for c in family(ablation)
    )
    upper, enough = float(planning.sd_upper(floor.sd, floor.df)), needed(ablation, floor)
    scope = StudyScope(tuple(plan.arms), tuple(range(enough)), tuple(range(max(enough, more))))
    seconds = study_seconds(ablation, scope, {name: arm.seconds for name, arm in plan.arms.items()}, plan.machine.jobs)
    return Forecast(n, floor.sd, least * floor.sd, least * upper, enough, seconds, level)


@dataclass(frozen=True)
class DeviceHours:
    """What the unfinished runs of a plan occupy. `device`: GPU, or core. `price`: of a GPU hour."""

    device: str
    hours: float
    price: float | None
    seconds_with: dict[int, float]
    """number of devices -> time of all runs, up to the number from which more do not help"""
    longest: float
    """seconds of the longest run, of a trial and of a run after it where arms are tuned"""

    @property
    def cost(self) -> float | None:
        """In the unit of the price; None without one, or without GPUs."""
        return None if self.price is None or self.device != "GPU" else self.hours * self.price

    def as_record(self) -> dict[str, Any]:
        """Plain data."""
        return {f"{self.device.lower()}_hours": self.hours, "cost": self.cost, "seconds_with": self.seconds_with}

    def lines(self) -> list[str]:
        """In sentences."""
        if not self.hours:
            return []
        cost = f", {self.cost:,.2f} at {self.price:g} an hour" if self.cost is not None else ""
        without = "; a price is of GPU hours, and no GPU is planned for" if self.price and self.cost is None else ""
        times = ", ".join(f"{n}: {duration(seconds)}" for n, seconds in self.seconds_with.items())
        limit = f"from {max(self.seconds_with)} on, the longest run ({duration(self.longest)}) is the limit"
        return [
            f"{self.hours:,.3g} {self.device} hours{cost}{without}",
            f"time by {self.device}s at that speed: {times}; {limit}",
        ]


def device_hours(plan: Plan, store: Store, price: float | None = None) -> DeviceHours:
    """GPU hours, or core hours on CPUs, of the unfinished runs, and their time on other numbers of devices. price: of a
    GPU hour."""
    machine, stages = plan.machine, [list(stage) for stage in pending_seconds(plan, store) if stage]
    devices = machine.ranks * (1 if machine.gpus else machine.threads)  # of a run
    packed = max(1, machine.jobs // machine.gpus) if machine.gpus and machine.ranks == 1 else 1 / devices
    longest, seconds = sum(map(max, stages)), dict[int, float]()
    n = devices
    while stages:
        seconds[n] = sum(makespan(stage, max(1, int(n * packed))) for stage in stages)
        if seconds[n] <= longest * 1.001:
            break
        n *= 2
    hours = sum(map(sum, stages)) / packed / 3600
    return DeviceHours("GPU" if machine.gpus else "core", hours, price, seconds, longest)


def seconds_left(plan: Plan, store: Store) -> float:
    """Estimated time of all unfinished runs on this machine."""
    return sum(makespan(stage, plan.machine.jobs) for stage in pending_seconds(plan, store))


def pending_seconds(plan: Plan, store: Store) -> tuple[Collection[float], Collection[float]]:
    """Estimated seconds of every unfinished run, in proportion to its tokens: of trials, and of the runs that are
    judged; while arms are being tuned, those that follow are included."""
    trials: dict[str, float] = {}
    final: dict[str, float] = {}
    for name, arm in plan.arms.items():
        tuning = arm.tuning
        judged = [*arm.runs, *arm.shared, *(run for runs in arm.curve.values() for run in runs)]
        for pending, runs in ((trials, tuning.runs if tuning else ()), (final, judged)):
            for run in runs:
                if not is_finished(run, store):
                    pending[run.id] = arm.seconds * tokens_of(run.config) / arm.tokens
        if tuning and tuning.search and tuning.open:  # then `runs` are those at the settings as written
            trials |= {f"{name} {i}": arm.seconds for i in range(tuning.left * tuning.search.settings.seeds)}
            final |= {f"{name} {run.seed} again": arm.seconds for run in arm.runs}
    return trials.values(), final.values()


def lines(plan: Plan) -> list[str]:
    """The forecast in sentences, for the plan and the start of a run."""
    ablation, result, floor = plan.ablation, forecast(plan), plan.floor
    sentences = [f"left out to fit the budget: {'; '.join(plan.left_out)}"] if plan.left_out else []
    often = max(plan.arms, key=lambda name: tokens_of(plan.arms[name].arm.config) / len(plan.data_of(name).train))
    sentences += repetition(tokens_of(plan.arms[often].arm.config), plan.data_of(often))
    if result is None or floor is None:
        why = plan.why_no_floor or "its runs do not differ"
        unknown = f"no noise floor for {ablation.scale} ({why}), so power is unknown"
        return [*sentences, f"{unknown}; `{ablation.noise_command}` measures one"]
    sentences.append(
        f"noise floor: sd {floor.sd:.2g} nats [{floor.low:.2g}, {floor.high:.2g}] of {len(floor.values)} repeats, "
        f"{floor.age}"
    )
    seeds, enough = (f"{plural(n, 'seed')} per arm" for n in (result.seeds, result.needed))
    if result.detectable < math.inf:
        sentences.append(
            f"with {seeds} a difference of {result.detectable:.2g} nats is found four times out of five "
            f"({result.detectable_upper:.2g} if the noise is at its upper 80 % limit)"
        )
    effect = f"{ablation.smallest_effect:g} nats, the smallest effect of interest"
    sentences.append(
        f"that is enough for {effect}: {enough} would do"
        if result.needed <= result.seeds
        else f"for {effect}, it takes {enough}: about {clock(result.seconds_needed)}"
    )
    if ablation.tune:
        sentences.append(
            "intervals will be wider by what the search of rates leaves open, known once its trials are there"
        )
    return sentences


def clock(seconds: float) -> str:
    """`40 s`, `12 minutes`, `3.4 hours` here."""
    if seconds < 90:
        return f"{seconds:.0f} s here"
    return f"{seconds / 60:.0f} minutes here" if seconds < 5400 else f"{seconds / 3600:.1f} hours here"


def as_record(plan: Plan) -> dict[str, Any] | None:
    """The forecast as plain data; differences are infinite with too few seeds to find any."""
    result = forecast(plan)
    if result is None:
        return None
    return {
        "noise_sd": result.sd, "detectable": result.detectable, "detectable_upper": result.detectable_upper,
        "seeds_for_smallest_effect": result.needed, "seconds_for_smallest_effect": result.seconds_needed,
    }  # fmt: skip
