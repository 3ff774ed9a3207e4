"""Fair tuning: every arm searches its own settings in the same way, and is judged at the best of them on fresh seeds.

One shared rate can mislead by ten times: at nano, post-LN was 0.96 nats worse at pre-LN's rate and 0.10 at its own.

Two ways: a grid of learning rates with one seed each, which the study trains beside its own runs (`lr_bracket`), and a
search of any settings that Optuna drives (`tune`). Both say the same things about an arm, as a `Tuning`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpt2lab import records
from gpt2lab.analysis.tuning import OPEN, RESULTS, Chosen, chosen
from gpt2lab.config.fitting import Complaint
from gpt2lab.config.source import Key
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.planning.arms import BRACKET_SEED, SHARED, Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import Run, final_loss, make_run
from gpt2lab.planning.samplers import Tune
from gpt2lab.planning.search import Search, check_search, make_search
from gpt2lab.planning.space import value_at
from gpt2lab.store import Store

EXTENSIONS = 3
"""How often a grid of rates is widened, by a doubling or a halving, when the best rate lies at its edge."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How one arm's settings are searched for, and what came of it so far. `around`: the arm as its file has it."""

    around: Arm
    open: bool
    """whether trials are still to come"""

    @property
    def search(self) -> Search | None:
        """The search that Optuna drives, if one does."""
        return None

    @property
    def runs(self) -> tuple[Run, ...]:
        """Trials that the study trains beside its own runs."""
        return ()

    @property
    def labels(self) -> Mapping[str, str]:
        """Run id of each of them -> what it tries."""
        return {}

    @property
    def left(self) -> int:
        """Trials of the search that are still to come."""
        return 0

    @property
    def settings(self) -> dict[str, Any] | None:
        """The best settings by dotted key; None while they are not known."""
        return None

    @property
    def found_nothing(self) -> bool:
        """Whether it is over without a setting to judge the arm at."""
        return False

    @property
    def reason(self) -> str | None:
        """Why the arm cannot be compared, or None."""
        raise NotImplementedError

    def arm(self) -> Arm:
        """The arm at what was found; as it was where nothing was found so far."""
        raise NotImplementedError

    def as_written(self) -> dict[str, Any]:
        """What the arm as written has in the place of what is searched."""
        return {}

    def bracket_record(self) -> records.Bracket | None:
        """The grid of rates as the study's record has it."""
        return None

    def tuned_record(self) -> records.Tuned | None:
        """The search as the study's record has it."""
        return None


@dataclass(frozen=True, kw_only=True)
class RateGrid(Tuning):
    """Multiples of an arm's own learning rate, one run each."""

    trials: Mapping[float, Run]
    best: float | None = None
    """the multiple with the lowest loss, once all trials are done"""
    at_edge: bool = False
    """whether it is the first or last one although the grid was widened as far as it may be"""

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(self.trials.values())

    @property
    def labels(self) -> Mapping[str, str]:
        return {run.id: f"lr x{factor:g}" for factor, run in self.trials.items()}

    @property
    def reason(self) -> str | None:
        if not self.at_edge:
            return None
        return f"its best learning rate lies at the edge of the bracket (x{self.best:g})"

    def arm(self) -> Arm:
        return self.around if self.best is None else at_rate(self.around, self.best)

    def bracket_record(self) -> records.Bracket:
        trials = [
            records.RateTrial(factor=factor, lr=run.config.optim.lr, run=run.id, seed=run.seed)
            for factor, run in self.trials.items()
        ]
        return records.Bracket(trials=trials, best=self.best, at_edge=self.at_edge)


def rate_grid(arm: Arm, factors: Sequence[float], data: Prepared, machine: Machine, store: Store) -> RateGrid:
    """How far the grid is, by what the store holds: the trials that are done or due, and the best rate once found."""
    seed = arm.first_seed + BRACKET_SEED
    factors = sorted(factors)
    for extension in range(EXTENSIONS + 1):
        trials = {factor: make_run(at_rate(arm, factor), seed, data, machine) for factor in factors}
        known = {factor: final_loss(run, store, data.floors) for factor, run in trials.items()}
        losses = {factor: loss for factor, loss in known.items() if loss is not None}
        if len(losses) < len(trials):
            return RateGrid(around=arm, open=True, trials=trials)
        best = min(factors, key=lambda factor: (losses[factor], abs(factor - 1)))
        if factors[0] < best < factors[-1]:
            return RateGrid(around=arm, open=False, trials=trials, best=best)
        if extension < EXTENSIONS:
            factors = sorted([*factors, best / 2 if best == factors[0] else best * 2])
    return RateGrid(around=arm, open=False, trials=trials, best=best, at_edge=True)


def at_rate(arm: Arm, factor: float) -> Arm:
    """The arm with its learning rate multiplied."""
    if factor == 1:
        return arm
    rate = arm.config.optim.lr * factor
    return replace(arm, config=arm.config.with_changes({"optim.lr": repr(rate)}, f"arm {arm.name}, lr x{factor:g}"))


@dataclass(frozen=True, kw_only=True)
class Searched(Tuning):
    """A search of one arm, as far as the store's record of it says. `name`: of the sweep record that it stands in."""

    name: str
    over: Search
    counts: Mapping[str, int] = field(default_factory=dict)
    """outcome -> how many trials ended so"""
    found: Chosen | None = None
    """once it is over"""
    refused: str | None = None
    """why the arm cannot be compared although something was found: it had another budget than others"""

    @property
    def search(self) -> Search:
        return self.over

    @property
    def settings(self) -> dict[str, Any] | None:
        return dict(self.found.settings) if self.found and self.found.settings is not None else None

    @property
    def reason(self) -> str | None:
        if self.found and self.found.settings is None:
            ends = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
            return f"no trial of its search finished ({ends})"
        return (self.found.reason if self.found else None) or self.refused

    @property
    def ended(self) -> int:
        """Trials that told something of their settings."""
        return sum(self.counts.get(outcome, 0) for outcome in RESULTS)

    @property
    def found_nothing(self) -> bool:
        return not self.open and self.settings is None

    @property
    def left(self) -> int:
        return max(0, self.search.trials - sum(self.counts.values())) if self.open else 0

    def arm(self) -> Arm:
        return self.search.arm_at(self.settings or {})

    def as_written(self) -> dict[str, Any]:
        """What the arm as written has in the place of what is searched."""
        return {dim.name: value_at(self.around.config, dim.name) for dim in self.over.space.dimensions}

    def tuned_record(self) -> records.Tuned:
        return records.Tuned(
            sweep=self.name,
            label=self.around.name,
            study=self.over.study,
            over=not self.open,
            settings=self.settings,
            value=self.found.value if self.found else None,
            edge=dict(self.found.edge) if self.found else {},
            trials=sum(self.counts.values()),
            **{outcome: self.counts.get(outcome, 0) for outcome in ("finished", "pruned", "diverged", "failed")},
        )


def tune_problems(tune: Tune, arms: Mapping[str, Arm], at: Mapping[str, Key], axis: str) -> Iterator[Complaint]:
    """What is wrong with a tuning at these arms, the controls among them. `at`: where each stands in the file."""
    refused = dict(_shared_keys(tune, axis))
    yield from refused.values()
    if refused:
        return
    for name, arm in arms.items():
        for key in () if arm.control else tune.space:
            if _sets(arm.changes, key):
                yield Complaint(f"sets {key}, which `tune` is to find; drop one of the two", (at[name],))
    told: dict[tuple[str, str], list[str]] = {}
    for name, arm in arms.items():
        try:
            check_search(tune.of(name), arm)
        except ConfigError as error:
            for problem in error.problems:
                told.setdefault((problem.where, problem.what), []).append(name)
    for (where, what), names in told.items():
        alike = len(names) == len(arms)
        of = "" if alike else f"at arm{'s' if len(names) > 1 else ''} {', '.join(names)}: "
        within: Key = ("tune", "space", where) if where in tune.space else ("tune", "space")
        if where.startswith("enqueue"):
            within, of = ("tune", "enqueue"), of + where.removeprefix("enqueue").lstrip(": ") + ": "
        yield Complaint(f"{of}{what}", (within,))


def _shared_keys(tune: Tune, axis: str) -> Iterator[tuple[str, Complaint]]:
    """Dimensions that would make arms differ in what they have to share."""
    for key in tune.space:
        why = next((why for shared, why in SHARED.items() if f"{key}.".startswith(f"{shared}.")), None)
        if key == "training.steps":
            why = "arms train on as many tokens, whatever is tried"
        elif axis != "tokens" and not key.startswith("optim."):
            why = f"it could change what `equalise: {axis}` makes equal"
        if why is not None:
            yield key, Complaint(f"no arm may change this: {why}", (("tune", "space", key),))


def _sets(changes: Mapping[str, Any], key: str) -> bool:
    """Whether an arm's changes say what `key` is."""
    for changed, value in changes.items():
        if f"{changed}.".startswith(f"{key}."):
            return True
        inner: Any = value
        rest = key.removeprefix(f"{changed}.")
        if rest == key:
            continue
        for step in rest.split("."):
            inner = inner.get(step) if isinstance(inner, Mapping) else None
        if inner is not None:
            return True
    return False


def searches_of(
    name: str, tune: Tune, arms: Mapping[str, Arm], data: Prepared, machine: Machine, store: Store
) -> dict[str, Searched]:
    """Every arm's search, and how far it has come by the record `name` of the store. Raises ConfigError.

    What was tried by other code, over other data or in another space does not count: such searches have other names.
    """
    try:
        record = store.sweep(name) if name in store.sweeps() else None
    except DataFault:  # it is written anew from where the trials are kept
        record = None
    found = {}
    for label, arm in arms.items():
        search = make_search(name, label, arm, tune.of(label), data, machine)
        kept = record.searches.get(label) if record else None
        found[label] = _so_far(name, search, kept if kept and kept.study == search.study else None)
    return _with_equal_budgets(found)


def _so_far(name: str, search: Search, kept: records.SearchRecord | None) -> Searched:
    """How far a search has come: `kept`, as its record has it, up to the trials that are asked for now."""
    trials = [trial for trial in kept.trials if trial.index < search.trials] if kept else []
    counts = Counter[str](trial.outcome for trial in trials if trial.outcome not in OPEN)
    gave_up = counts.get("failed", 0) > search.settings.max_failures
    if kept is None or (sum(counts.values()) < search.trials and not gave_up):
        return Searched(name=name, around=search.arm, over=search, open=True, counts=counts)
    found = chosen(kept.with_(trials=trials).plain(), slots=sum(counts.values()))
    return Searched(name=name, around=search.arm, over=search, open=False, counts=counts, found=found)


def _with_equal_budgets(found: Mapping[str, Searched]) -> dict[str, Searched]:
    """Arms that had fewer trials than others cannot be compared with them."""
    most = max((one.ended for one in found.values() if not one.open), default=0)
    told = dict(found)
    for label, one in found.items():
        if not one.open and one.ended < most:
            failed = one.counts.get("failed", 0)
            why = f", since {failed} of them failed" if failed else ""
            told[label] = replace(one, refused=f"it was tuned by {one.ended} trials, others by {most}{why}")
    return told
