"""Fair tuning: every arm is tuned in the same way, and evaluated at its best settings on new seeds.

A shared rate can mislead by a factor of ten: at nano, post-LN was 0.96 nats worse at pre-LN's rate and 0.10 at its own.

`tune: {grid: ...}` tries multiples of each arm's learning rate with one seed each, as runs of the study; `tune: {space:
...}` is a search that Optuna drives, recorded as a sweep. Both give a `Tuning`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gpt2lab import records
from gpt2lab.analysis.tuning import OPEN, chosen
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import DataFault
from gpt2lab.identity import digest
from gpt2lab.inspection.costs import Costs
from gpt2lab.planning.ablation import TUNING_SEED, Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import Run, final_loss, known_costs, make_run, make_runs, tokens_of
from gpt2lab.planning.space import RATE, SearchSettings, Space, Tune, changes_of, check_search, known_points, plain_at
from gpt2lab.store import Store

EXTENSIONS = 3
"""How often a grid of rates is widened, by a factor of two, when the best rate is at its edge."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search of one arm's settings, on one machine and data set. `study`: the name under which its trials are kept;
    it changes with everything that the trials depend on."""

    label: str
    arm: Arm
    space: Space
    settings: SearchSettings
    data: Prepared
    machine: Machine
    costs: Costs
    study: str

    def arm_at(self, settings: Mapping[str, Any]) -> Arm:
        """The arm with the settings of a trial. Raises ConfigError for an invalid combination."""
        if not settings:
            return self.arm
        written = ", ".join(f"{key}={value}" for key, value in settings.items())
        changes = changes_of(self.space, self.arm.config, settings)
        return replace(self.arm, config=self.arm.config.with_changes(changes, f"trial {written}:"))

    def runs_at(self, settings: Mapping[str, Any]) -> tuple[Run, ...]:
        """The runs of a trial, one per tuning seed. Raises ConfigError."""
        return make_runs(self.arm_at(settings), self.seeds, self.data, self.machine)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Tuning seeds."""
        first = self.arm.first_seed + TUNING_SEED
        return tuple(range(first, first + self.settings.seeds))

    @property
    def as_written(self) -> dict[str, Any]:
        """The arm's own values of the searched settings, by dotted key."""
        return {dimension.name: plain_at(self.arm.config, dimension.name) for dimension in self.space.dimensions}

    @property
    def known_points(self) -> list[dict[str, Any]]:
        """The points that are tried first, completed, as parameters."""
        return known_points(self.settings, self.space, self.arm.config)

    @property
    def trials(self) -> int:
        """Trials in all: as declared, or all points of a grid where those are fewer."""
        if self.settings.sampler.name != "grid":
            return self.settings.trials
        return min(self.settings.trials, len(self.known_points) + self.space.grid_size())

    @property
    def tokens(self) -> int:
        """Training tokens of one run to its end."""
        return tokens_of(self.arm.config)


def make_search(name: str, label: str, arm: Arm, settings: SearchSettings, data: Prepared, machine: Machine) -> Search:
    """The search of one arm. `name`: of the sweep or ablation, at its scale. Raises ConfigError with all problems of
    the space at this arm."""
    space = check_search(settings, arm.config)
    declared = {
        "space": [dimension.as_record() | {"values": list(dimension.values)} for dimension in space.dimensions],
        "sampler": settings.sampler.model_dump(),
        "pruner": settings.pruner.model_dump(),
        "seeds": settings.seeds,
        "metric": [settings.metric, settings.direction],
        "enqueue": [dict(point) for point in settings.enqueue],
        "run": make_run(arm, arm.first_seed + TUNING_SEED, data, machine).identity,
    }
    return Search(
        label=label, arm=arm, space=space, settings=settings, data=data, machine=machine,
        costs=known_costs(arm.config), study=f"{name}/{label}/{digest(declared)[:12]}",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The tuning of one arm, and its result so far."""

    open: bool
    """whether trials are still to come"""
    arm: Arm
    """at the best settings; as written until they are known"""
    labels: Mapping[str, str] = field(default_factory=dict)
    """run id -> label such as `lr x2`, of the trials that are runs of the study"""
    runs: tuple[Run, ...] = ()
    """those trials"""
    search: Search | None = None
    """the search that Optuna drives, if any"""
    left: int = 0
    """trials of that search that are still to come"""
    settings: dict[str, Any] | None = None
    """the best ones that it found, by dotted key"""
    reason: str | None = None
    """why the arm cannot be compared"""
    bracket: records.Bracket | None = None
    tuned: records.Tuned | None = None

    @property
    def found_nothing(self) -> bool:
        """Whether the search ended without a finished trial."""
        return bool(self.search) and not self.open and self.settings is None


def tunings_of(
    name: str, tune: Tune | None, arms: Mapping[str, Arm], data: Prepared, machine: Machine, store: Store
) -> dict[str, Tuning]:
    """Every arm's tuning, with its progress in the store; empty without `tune`. `name`: of the record of its
    searches. Raises ConfigError."""
    if tune is None:
        return {}
    if tune.multiples:
        return {label: rate_grid(arm, tune.multiples, data, machine, store) for label, arm in arms.items()}
    return searches_of(name, tune, arms, data, machine, store)


def rate_grid(arm: Arm, multiples: tuple[float, ...], data: Prepared, machine: Machine, store: Store) -> Tuning:
    """Multiples of an arm's learning rate with one run each, widened while the best lies at the edge."""
    factors = sorted(multiples)
    for extension in range(EXTENSIONS + 1):
        tried = {x: make_run(at_rate(arm, x), arm.first_seed + TUNING_SEED, data, machine) for x in factors}
        floors = (arm.data or data).floors
        losses = {x: loss for x, run in tried.items() if (loss := final_loss(run, store, floors)) is not None}
        best = min(losses, key=lambda x: (losses[x], abs(x - 1))) if len(losses) == len(tried) else None
        if best is None or factors[0] < best < factors[-1] or extension == EXTENSIONS:
            break
        factors = sorted([*factors, best / 2 if best == factors[0] else best * 2])
    at_edge = best in (factors[0], factors[-1])
    trials = [
        records.RateTrial(factor=x, lr=run.config.optim.lr, run=run.id, seed=run.seed) for x, run in tried.items()
    ]
    return Tuning(
        open=best is None,
        arm=arm if best is None else at_rate(arm, best),
        labels={run.id: f"lr x{x:g}" for x, run in tried.items()},
        runs=tuple(tried.values()),
        reason=f"its best learning rate lies at the edge of the bracket (x{best:g})" if at_edge else None,
        bracket=records.Bracket(trials=trials, best=best, at_edge=at_edge),
    )


def at_rate(arm: Arm, factor: float) -> Arm:
    """The arm with its learning rate multiplied."""
    if factor == 1:
        return arm
    rate = arm.config.optim.lr * factor
    return replace(arm, config=arm.config.with_changes({RATE: repr(rate)}, f"arm {arm.name}, lr x{factor:g}"))


def searches_of(
    name: str, tune: Tune, arms: Mapping[str, Arm], data: Prepared, machine: Machine, store: Store
) -> dict[str, Tuning]:
    """Every arm's search, with its progress in the store's sweep record `name`. Arms with fewer trials than others are
    not comparable with them. Raises ConfigError.

    Trials of other code, data or spaces do not count: such searches have other names.
    """
    try:
        record = store.sweep(name) if name in store.sweeps() else None
    except DataFault:  # the record is rebuilt from the trials' own storage
        record = None
    tunings = {}
    for label, arm in arms.items():
        search = make_search(name, label, arm, tune.of(label), data, machine)
        entry = record.searches.get(label) if record else None
        tunings[label] = _so_far(name, search, entry if entry and entry.study == search.study else None)
    over = {label: tuning.tuned for label, tuning in tunings.items() if tuning.tuned and not tuning.open}
    budgets = {label: tuned.trials - tuned.failed for label, tuned in over.items()}
    most = max(budgets.values(), default=0)
    for label, trials in budgets.items():
        if trials < most and tunings[label].reason is None:
            cause = f", since {over[label].failed} of them failed" if over[label].failed else ""
            reason = f"it was tuned by {trials} trials, others by {most}{cause}"
            tunings[label] = replace(tunings[label], reason=reason)
    return tunings


def _so_far(name: str, search: Search, entry: records.SearchRecord | None) -> Tuning:
    """The tuning of a search by its entry in the record, up to the number of trials now declared."""
    trials = [trial for trial in entry.trials if trial.index < search.trials] if entry else []
    counts = Counter[str](trial.outcome for trial in trials if trial.outcome not in OPEN)
    ended = counts.total()
    is_open = ended < search.trials and counts["failed"] <= search.settings.max_failures
    best = None if is_open or entry is None else chosen(entry.with_(trials=trials), count=ended)
    settings = dict(best.best.settings) if best and best.best else None
    reason = best.reason if best else None
    if best and settings is None:
        counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        reason = f"no trial of its search finished ({counted})"
    return Tuning(
        open=is_open,
        arm=search.arm_at(settings or {}),
        search=search,
        left=max(0, search.trials - ended) if is_open else 0,
        settings=settings,
        reason=reason,
        tuned=records.Tuned(
            sweep=name, label=search.arm.name, study=search.study, over=not is_open, settings=settings,
            value=best.best.value if best and best.best else None, edge=dict(best.edge) if best else {}, trials=ended,
            **{outcome: counts[outcome] for outcome in ("finished", "pruned", "diverged", "failed")},
        ),
    )  # fmt: skip
