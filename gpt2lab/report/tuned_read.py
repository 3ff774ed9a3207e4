"""What a report says of arms that were tuned: the searches they made, and the study at its settings as written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpt2lab.analysis import Verdicts
from gpt2lab.analysis.tuning import sensitivity
from gpt2lab.errors import Gpt2labError
from gpt2lab.report.sweep.axes import DIVERGED, Axis
from gpt2lab.report.sweep.read import ReadSweep, Search, read_record
from gpt2lab.results import RATE, Study, StudyRun, as_written, collect, judge_runs, searched
from gpt2lab.store import Store


@dataclass(frozen=True, kw_only=True)
class Tunings:
    """See the module; empty for a study that tuned nothing."""

    searches: Mapping[str, Search] = field(default_factory=dict)
    """arm -> its search, of those whose record is at hand"""
    sweep: ReadSweep | None = None
    """the record that they stand in"""
    problem: str = ""
    """why there is no such record"""
    written: Verdicts | None = None
    """the contrasts on the runs at the settings as written; None before there are any"""
    runs: Sequence[StudyRun] = ()
    """those runs, without those that are the study's own"""

    def axis(self, name: str) -> Axis | None:
        """A dimension over the spaces of all arms; None where it is no number."""
        axes = [search.axes[name] for search in self.searches.values() if name in search.axes]
        if not axes or axes[0].choices:
            return None
        return replace(axes[0], low=min(axis.low for axis in axes), high=max(axis.high for axis in axes))


def tunings(study: Study, store: Store) -> Tunings:
    """From the study's record, the runs and the record of the searches."""
    if not searched(study):
        return Tunings()
    twin = as_written(study)
    runs = collect(twin, store)
    written = judge_runs(twin, runs, store, sensitivity=False) if any(run.value is not None for run in runs) else None
    own = {run for entry in study["arms"].values() for run in entry["runs"].values()}
    others = [run for run in runs if run.id not in own]
    try:
        sweep = read_record(_of_this_study(study, store), store)
    except (Gpt2labError, KeyError) as error:
        return Tunings(problem=f"the record of its searches cannot be read: {error}", written=written, runs=others)
    return Tunings(searches=sweep.searches, sweep=sweep, written=written, runs=others)


def _of_this_study(study: Study, store: Store) -> dict[str, Any]:
    """The record of the arms' searches, with those alone that the study's runs rest on: a later command, of other code
    or with other arms, may have written it anew. Raises ConfigError, DataFault."""
    tuned = {arm: entry["tuned"] for arm, entry in study["arms"].items() if entry.get("tuned")}
    record = store.sweep(next(iter(tuned.values()))["sweep"])
    kept = {
        arm: record["searches"][one["label"]]
        for arm, one in tuned.items()
        if record["searches"].get(one["label"], {}).get("study") == one["study"]
    }
    return {**record, "searches": kept}


def rate_sensitivity(search: Search) -> float | None:
    """What is lost on average over the rates of its space against the best of them (Wortsman et al. 2023); None where
    something else was searched as well, and where no first loss is known."""
    axis = search.axes.get(RATE)
    if axis is None or len(search.axes) > 1:
        return None
    start = next((p.curve[1][0] for p in search.points if p.curve[0] and not p.curve[0][0]), None)
    if start is None:
        return None
    tried = [
        (float(p.settings[RATE]), p.value if p.finished else float("inf"))
        for p in search.points
        if p.finished or p.outcome == DIVERGED
    ]
    return sensitivity(tried, axis.low, axis.high, start)
