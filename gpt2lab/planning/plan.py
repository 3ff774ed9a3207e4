"""Resolves an ablation into runs with their estimated costs, before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpt2lab.analysis.metric_names import LOSS
from gpt2lab.data.curricula import batches_of
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.inspection.costs import Costs
from gpt2lab.planning.ablation import Arm, LoadedAblation
from gpt2lab.planning.equalise import Adjustment, at_budget, equal_arms, with_tokens
from gpt2lab.planning.machine import Machine, estimate_memory
from gpt2lab.planning.noise import Floor, find_floor
from gpt2lab.planning.runs import Run, known_costs, make_runs, tokens_left, tokens_of
from gpt2lab.planning.scope import fit
from gpt2lab.planning.tuning import Search, Tuning, tunings_of
from gpt2lab.store import Store


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """One arm's runs and costs. `arm`: as it is trained: equalised, and at its tuned settings."""

    arm: Arm
    runs: tuple[Run, ...]
    """one per seed that is due"""
    costs: Costs
    seconds: float
    """estimated training time of one run"""
    memory: int
    """estimated bytes of one run"""
    adjustment: Adjustment | None = None
    tuning: Tuning | None = None
    """the search of its settings, and the result"""
    shared: tuple[Run, ...] = ()
    """after a search: the same seeds at the settings as written; equal to `runs` where those are best"""
    curve: Mapping[float, tuple[Run, ...]] = field(default_factory=dict)
    """runs at other budgets, by multiple of the tokens"""

    @property
    def tokens(self) -> int:
        """Training tokens of one run."""
        return tokens_of(self.arm.config)

    def all_runs(self) -> Iterator[Run]:
        """Every run that is due, those of a grid of rates first. Trials of a search are not included."""
        yield from self.tuning.runs if self.tuning else ()
        if self.tuning is None or not self.tuning.open:
            for pair in itertools.zip_longest(self.runs, self.shared):
                yield from (run for run in pair if run is not None)
            for runs in self.curve.values():
                yield from runs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arms of an ablation with their runs, on one machine and one data set.

    A plan is a function of the ablation and of the finished runs: while grids of rates are open, `runs` holds their
    trials; the plan after them holds the runs at the best rates. While searches are open, it has searches and no runs.
    """

    ablation: LoadedAblation
    arms: dict[str, ArmPlan]
    machine: Machine
    data: Prepared
    seeds: tuple[int, ...]
    """of every arm, at the last look"""
    look: int | None
    """seeds per arm at the next look, where looks are declared"""
    floor: Floor | None
    """the measured noise of this scale"""
    why_no_floor: str = ""
    left_out: tuple[str, ...] = ()
    """descriptions of what the budget excluded"""

    @property
    def tuning(self) -> bool:
        """Whether any arm is still being tuned."""
        return any(arm.tuning is not None and arm.tuning.open for arm in self.arms.values())

    @property
    def searches(self) -> dict[str, Search]:
        """Arm -> its search, of all arms as long as one of them is open: they share the machine."""
        arms = self.arms.items() if self.tuning else ()
        return {name: arm.tuning.search for name, arm in arms if arm.tuning and arm.tuning.search}

    def runs(self) -> list[Run]:
        """Every run that is due now, each once; seed-major, so that all arms have their first seed early."""
        if self.tuning:
            return _in_turn([arm.tuning.runs for arm in self.arms.values() if arm.tuning])
        return _in_turn([list(arm.all_runs()) for arm in self.arms.values()])

    def data_of(self, arm: str) -> Prepared:
        """The data of an arm."""
        return self.arms[arm].arm.data or self.data

    @property
    def baseline(self) -> ArmPlan:
        return self.arms[self.ablation.baseline]


def _in_turn(lists: Sequence[Sequence[Run]]) -> list[Run]:
    """The first of each, then the second of each, ...; every run once."""
    rounds = itertools.zip_longest(*lists)
    return list({run.id: run for row in rounds for run in row if run is not None}.values())


def make_plan(
    ablation: LoadedAblation,
    data: Prepared,
    store: Store,
    machine: Machine,
    *,
    seeds_now: Mapping[str, int] | None = None,
    seconds: float | None = None,
) -> Plan:
    """Resolve every run of `ablation` on `machine`, given the finished runs in `store`. Raises ConfigError when the
    data or machine does not fit.

    seeds_now: how many seeds of each arm are due, where looks are declared; those of the first look by default.
    seconds: a budget; arms and seeds are chosen to fit into it.
    """
    reference = known_costs(ablation.arms[ablation.baseline].config)
    arms_made, adjustments = equal_arms(with_tokens(ablation), store, machine)
    for arm in arms_made.values():
        check_data(arm, arm.data or data, machine.ranks)
    costs = {name: known_costs(arm.config) for name, arm in arms_made.items()}
    base = arms_made[ablation.baseline].config
    floor: Floor | None = None
    no_floor = f"it would be of {LOSS}, and arms are judged by {ablation.metric}"
    if ablation.metric == LOSS:
        floor, no_floor = find_floor(store, ablation.scale, base, data, machine, reference)
    run_seconds = {
        n: costs[n].flops_per_token * tokens_left(arm.config) / machine.run_speed for n, arm in arms_made.items()
    }
    scope = fit(ablation, floor, run_seconds, seconds=seconds, jobs=machine.jobs, why_no_floor=no_floor)
    in_scope = {name: arms_made[name] for name in scope.arms}
    tunings = tunings_of(f"{ablation.name}@{ablation.scale}", ablation.tune, in_scope, data, machine, store)
    arms = {}
    for name in scope.arms:
        tuning, count = tunings.get(name), None
        arm = tuning.arm if tuning else arms_made[name]
        if ablation.looks:
            count = (seeds_now or {}).get(name, ablation.looks[0])
        arm_seeds = scope.baseline_seeds if name == ablation.baseline else scope.seeds
        seeds = [arm.first_seed + seed for seed in (arm.seeds or arm_seeds)[:count]]
        budgets = ablation.budgets if name in ablation.budget_arms else ()
        if tuning and tuning.found_nothing:
            seeds, budgets = [], ()  # the search found no setting to train at
        arms[name] = ArmPlan(
            arm=arm,
            runs=make_runs(arm, seeds, data, machine),
            shared=make_runs(arms_made[name], seeds, data, machine) if tuning and tuning.search else (),
            costs=costs[name] if arm is arms_made[name] else known_costs(arm.config),
            seconds=run_seconds[name],
            memory=estimate_memory(arm.config, costs[name], machine),
            adjustment=adjustments.get(name),
            tuning=tuning,
            curve={b: make_runs(at_budget(arm, b), seeds, data, machine) for b in budgets if b != 1},
        )
    look = max((seeds_now or {}).values(), default=ablation.looks[0]) if ablation.looks else None
    planned = replace(
        ablation,
        contrasts=tuple(c for c in ablation.contrasts if c.weights.keys() <= arms.keys()),
        looks=tuple(n for n in ablation.looks if n <= len(scope.seeds)),
        baseline_seeds=ablation.baseline_seeds and min(ablation.baseline_seeds, len(scope.baseline_seeds)),
    )
    return Plan(
        ablation=planned, arms=arms, machine=machine, data=data, seeds=scope.seeds, look=look, floor=floor,
        why_no_floor=no_floor, left_out=scope.left_out,
    )  # fmt: skip


def check_data(arm: Arm, data: Prepared, ranks: int = 1) -> None:
    """Raises ConfigError with every setting of an arm that does not fit the prepared data, or so many ranks."""
    model, evaluation = arm.config.model, arm.config.evaluation
    lengths = {"training": len(data.train), "validation": len(data.validation)}
    misfits: list[tuple[str, int, str]] = []  # (key, a value that fits, why)
    for split, n in lengths.items():
        if n <= model.block_size:
            problem = f"the {split} split needs {model.block_size + 1} tokens, has {n}"
            misfits.append(("model.block_size", min(lengths.values()) - 1, problem))
    if data.vocab_size > model.vocab_size:
        problem = f"the tokenizer has {data.vocab_size} tokens, the model rows for {model.vocab_size}"
        misfits.append(("model.vocab_size", data.vocab_size, problem))
    total = evaluation.total(data.validation)
    if lengths["validation"] <= total:
        problem = f"the validation split needs {total + 1} tokens, has {lengths['validation']}"
        misfits.append(("evaluation.tokens", lengths["validation"] - 1, problem))
    if not misfits:
        batches_of(arm.config, data, world=ranks)  # raises where its parts do not fit
    if misfits:
        problems = [Problem(f"arm {arm.name}: {key}", problem) for key, _, problem in misfits]
        raise ConfigError(problems, hint=" ".join(dict.fromkeys(f"--set {key}={value}" for key, value, _ in misfits)))
