"""Tuning that is fair to every arm: each searches the same space around its own settings, with the same budget.

Layer: plan. What may be wrong with `tune:` at the arms of an ablation, and what the searches have found so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gpt2lab.analysis.searches import OPEN, RESULTS, Chosen, chosen
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.planning.arms import SHARED, Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import Run
from gpt2lab.planning.samplers import Tune
from gpt2lab.planning.search import Search, check_search, make_search
from gpt2lab.planning.space import value_at
from gpt2lab.reading.fitting import Complaint
from gpt2lab.reading.source import Key
from gpt2lab.store import Store


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The search of one arm, and what came of it by what the store holds. `name`: of the sweep record it stands in."""

    name: str
    search: Search
    open: bool
    """whether trials are still to come"""
    counts: Mapping[str, int] = field(default_factory=dict)
    """outcome -> how many trials ended so"""
    found: Chosen | None = None
    """once it is over"""
    refused: str | None = None
    """why the arm cannot be compared although something was found: it had another budget than others"""

    @property
    def settings(self) -> dict[str, Any] | None:
        """The best ones, by dotted key; None while the search is open, and where no trial finished."""
        return dict(self.found.settings) if self.found and self.found.settings is not None else None

    @property
    def reason(self) -> str | None:
        """Why the arm cannot be compared, or None."""
        if self.found and self.found.settings is None:
            ends = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
            return f"no trial of its search finished ({ends})"
        return (self.found.reason if self.found else None) or self.refused

    @property
    def ended(self) -> int:
        """Trials that told something of their settings."""
        return sum(self.counts.get(outcome, 0) for outcome in RESULTS)

    @property
    def left(self) -> int:
        """Trials that are still to come."""
        return max(0, self.search.trials - sum(self.counts.values())) if self.open else 0

    @property
    def runs(self) -> tuple[Run, ...]:
        """None that a study trains beside its own: a search is driven by itself."""
        return ()

    def arm(self) -> Arm:
        """The arm at what was found; as it was where nothing was."""
        return self.search.arm_at(self.settings or {})

    def own(self) -> dict[str, Any]:
        """What the arm as written has in the place of what is searched."""
        return {one.name: value_at(self.search.arm.config, one.name) for one in self.search.space.dimensions}


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
) -> dict[str, Tuned]:
    """Every arm's search, and how far it has come by the record `name` of the store. Raises ConfigError.

    What was tried by other code, over other data or in another space does not count: such searches have other names.
    """
    try:
        record: Mapping[str, Any] = store.sweep(name) if name in store.sweeps() else {}
    except DataFault:  # it is written anew from where the trials are kept
        record = {}
    found = {}
    for label, arm in arms.items():
        search = make_search(name, label, arm, tune.of(label), data, machine)
        kept = (record.get("searches") or {}).get(label) or {}
        found[label] = _so_far(name, search, kept if kept.get("study") == search.study else {}, record)
    return _with_equal_budgets(found)


def _so_far(name: str, search: Search, kept: Mapping[str, Any], record: Mapping[str, Any]) -> Tuned:
    """How far a search has come: `kept`, as its record has it, up to the trials that are asked for now."""
    trials = [trial for trial in kept.get("trials", ()) if trial["slot"] < search.trials]
    counts: dict[str, int] = {}
    for trial in trials:
        if trial["outcome"] not in OPEN:
            counts[trial["outcome"]] = counts.get(trial["outcome"], 0) + 1
    gave_up = counts.get("failed", 0) > search.settings.max_failures
    if sum(counts.values()) < search.trials and not gave_up:
        return Tuned(name=name, search=search, open=True, counts=counts)
    found = chosen({**kept, "trials": trials}, slots=sum(counts.values()))
    return Tuned(name=name, search=search, open=False, counts=counts, found=found)


def _with_equal_budgets(found: Mapping[str, Tuned]) -> dict[str, Tuned]:
    """Arms that had fewer trials than others cannot be compared with them."""
    most = max((one.ended for one in found.values() if not one.open), default=0)
    told = dict(found)
    for label, one in found.items():
        if not one.open and one.ended < most:
            failed = one.counts.get("failed", 0)
            why = f", since {failed} of them failed" if failed else ""
            told[label] = replace(one, refused=f"it was tuned by {one.ended} trials, others by {most}{why}")
    return told
