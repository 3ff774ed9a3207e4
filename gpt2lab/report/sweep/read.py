"""All that the page of a sweep is made from: its record, the curves of its runs, what the analysis says of each
setting, and the same sweep at other scales."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2lab.analysis.tuning import Optimum
from gpt2lab.errors import DataFault, Gpt2labError
from gpt2lab.report.marks import Curve
from gpt2lab.report.sweep.across import Across, Record, across, read_chosen
from gpt2lab.report.sweep.axes import DIVERGED, FAILED, FINISHED, PRUNED, Axis, Fitted, Point, best_of
from gpt2lab.results import cleaned, unit
from gpt2lab.store import Store

WAITING, RUNNING = "waiting", "running"
OUTCOMES = (FINISHED, PRUNED, DIVERGED, FAILED, RUNNING, WAITING)
RATE = "optim.lr"


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search of a sweep. `optima`: what the trials say of each numeric setting."""

    label: str
    record: Record
    axes: Mapping[str, Axis]
    points: Sequence[Point]
    optima: Mapping[str, Optimum]
    maximize: bool

    @property
    def trials(self) -> Sequence[Record]:
        trials: Sequence[Record] = self.record["trials"]
        return trials

    @property
    def best(self) -> Record | None:
        """The finished trial with the best value."""
        best = best_of(self.points, maximize=self.maximize)
        return None if best is None else next(trial for trial in self.trials if trial["slot"] == best.slot)

    @property
    def seeds(self) -> Sequence[int]:
        """Tuning seeds of every trial."""
        seeds: Sequence[int] = self.record.get("seeds") or (100,)
        return seeds

    @property
    def counts(self) -> Counter[str]:
        """Trials by outcome."""
        return Counter(str(trial["outcome"]) for trial in self.trials)

    @property
    def alone(self) -> str | None:
        """The only setting that was searched, if it is a number: a curve can be fitted to it."""
        return next(iter(self.optima)) if len(self.axes) == 1 and self.optima else None

    def fitted(self, name: str) -> Fitted:
        """What is drawn of a setting's optimum: nothing where other settings differ between the trials."""
        found = self.optima.get(name)
        if found is None or name != self.alone:
            return Fitted()
        line = found.line()
        nothing = (math.nan, math.nan)
        low, high = found.interval or nothing
        flat_low, flat_high = found.flat or nothing
        drawn: Curve = ((), ()) if line is None else (line[0].tolist(), line[1].tolist())
        at = math.nan if found.vertex is None else found.vertex
        return Fitted(line=drawn, at=at, low=low, high=high, flat_low=flat_low, flat_high=flat_high)


@dataclass(frozen=True, kw_only=True)
class ReadSweep:
    """A sweep at one scale."""

    record: Record
    searches: Mapping[str, Search]
    across: Mapping[str, Across] = field(default_factory=dict)
    """search -> itself over all scales at which the store has this sweep"""

    @property
    def single(self) -> Search | None:
        """The search, where there is only one."""
        return next(iter(self.searches.values())) if len(self.searches) == 1 else None

    @property
    def counts(self) -> Counter[str]:
        """Trials by outcome, over all searches."""
        return sum((search.counts for search in self.searches.values()), Counter())

    @property
    def slots(self) -> int:
        """Trials in all, as they were declared."""
        return sum(int(search.record.get("slots") or self.record["trials"]) for search in self.searches.values())

    @property
    def open(self) -> int:
        """Trials that were declared and have no outcome yet."""
        return max(0, self.slots - sum(self.counts[outcome] for outcome in (FINISHED, PRUNED, DIVERGED, FAILED)))

    @property
    def unit(self) -> str:
        return unit(self.record)


def read_sweep(name: str, root: str | Path) -> ReadSweep:
    """A sweep from the store. Raises ConfigError for an unknown name, DataFault for a damaged record."""
    store = Store(root)
    record = store.sweep(name)
    if record.get("name") not in store.sweeps():  # it becomes a folder's name
        raise DataFault(f"the record calls itself '{record.get('name')}', which is no recorded sweep", where=name)
    return read_record(record, store)


def read_record(record: Record, store: Store) -> ReadSweep:
    """A sweep from its record. Raises DataFault for a record that lacks what it must have."""
    record = cleaned(record)
    try:
        searches = {label: _search(label, one, record, store) for label, one in record["searches"].items()}
        scales = across([record, *_others(record, store)])
        return ReadSweep(record=record, searches=searches, across=scales)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataFault(f"the record of the sweep is damaged: {what}", where=str(record.get("name"))) from error


def _search(label: str, one: Record, record: Record, store: Store) -> Search:
    maximize = record.get("direction") == "maximize"
    points = [_point(trial, record, store) for trial in one["trials"]]
    axes = {axis.name: axis for axis in map(_axis, one["space"])}
    optima = read_chosen(one, record).optima
    return Search(label=label, record=one, axes=axes, points=points, optima=optima, maximize=maximize)


def _axis(dimension: Record) -> Axis:
    if dimension.get("choices"):
        return Axis(name=dimension["name"], choices=tuple(map(str, dimension["choices"])))
    return Axis(name=dimension["name"], low=dimension["low"], high=dimension["high"], log=bool(dimension.get("log")))


def _point(trial: Record, record: Record, store: Store) -> Point:
    """A trial as it is drawn; a pruned one stands at its last value."""
    seen = [(float(tokens), float(value)) for _, tokens, value in trial.get("curve") or () if value is not None]
    value = trial.get("value")
    if value is None:
        value = seen[-1][1] if seen and trial["outcome"] == PRUNED else math.nan
    curve = _journal(trial, record, store) or seen
    drawn: Curve = ([tokens for tokens, _ in curve], [value for _, value in curve])
    settings = {name: _kept(one) for name, one in trial["settings"].items()}
    return Point(slot=trial["slot"], settings=settings, outcome=trial["outcome"], value=float(value), curve=drawn)


def _kept(value: Any) -> Any:
    return str(value) if isinstance(value, bool) or not isinstance(value, (int, float)) else value


def _journal(trial: Record, record: Record, store: Store) -> list[tuple[float, float]]:
    """(tokens, value) of the trial's first run up to where the trial ended; nothing if the run lies elsewhere."""
    runs = trial.get("runs") or {}
    if not runs:
        return []
    last = trial.get("stopped_at") or math.inf
    try:
        rows = store.run(str(next(iter(runs.values())))).rows()
    except Gpt2labError:  # a damaged journal, or an id of another time: the record's own curve will do
        return []
    metric = record["metric"]
    return [(float(r["tokens"]), float(r["metrics"][metric])) for r in rows
            if metric in r["metrics"] and r["step"] <= last]  # fmt: skip


def _others(record: Record, store: Store) -> list[Record]:
    """The same sweep at other scales; records that cannot be read are left out."""
    found: list[Record] = []
    for name in store.sweeps():
        if name == record["name"]:
            continue
        try:
            other = cleaned(store.sweep(name))
            if other["sweep"] == record["sweep"] and bool(other.get("part_of")) == bool(record.get("part_of")):
                across([other])
                found.append(other)
        except (Gpt2labError, KeyError, TypeError, AttributeError):
            continue
    return found
