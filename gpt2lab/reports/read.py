"""All that pages are made from: a study or a sweep, read from the run store once."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from gpt2lab.analysis import Verdicts
from gpt2lab.analysis.campaigns import Standing, standing_of
from gpt2lab.analysis.metric_names import BITS, LOSS, reading, target_of
from gpt2lab.analysis.results import Study, StudyRun, by_arm, cleaned, collect, usable_runs
from gpt2lab.analysis.studies import judge_runs, text_noise
from gpt2lab.analysis.tuning import Optimum, chosen
from gpt2lab.analysis.verdicts import TextNoise
from gpt2lab.basics.text import change, clean, setting
from gpt2lab.errors import DataFault
from gpt2lab.records import DimensionRecord, SearchRecord, SweepRecord, TrialRecord, best_trial, ranked_trials
from gpt2lab.reports.inputs import sum_of_store
from gpt2lab.reports.style import ARMS, ArmStyle, styles_of
from gpt2lab.reports.tables import Cell, Table, tabulate
from gpt2lab.store import Store

Result = TypeVar("Result")
FINISHED, PRUNED, DIVERGED, FAILED = "finished", "pruned", "diverged", "failed"
WAITING, RUNNING = "waiting", "running"
OUTCOMES = (FINISHED, PRUNED, DIVERGED, FAILED, RUNNING, WAITING)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One arm in numbers; `n`, `mean` and `sd` are over the runs that did not fail. look: its colour, by number."""

    arm: str
    look: int
    n: int
    failed: int
    missing: int
    mean: float | None
    sd: float | None
    tokens_per_second: float | None
    speeds: Sequence[float]
    """tokens per second of each run"""
    peak_memory_bytes: int | None
    mfu: float | None = None
    bits_per_byte: float = math.nan
    """mean over the runs that did not fail; NaN where they were not measured beside the loss"""
    span: tuple[float, float] | None = None
    """when its first run began and its last one ended, in seconds of Unix time"""


@dataclass(frozen=True, kw_only=True)
class StudyRead:
    """A study, its runs and its verdicts. forced: refusals were turned into numbers."""

    study: Study
    runs: Sequence[StudyRun]
    verdicts: Verdicts
    text: Mapping[tuple[str, str], TextNoise]
    """of every declared pair of arms, as far as it is known"""
    store: Store
    arms: Mapping[str, Summary]
    """the baseline first"""
    forced: bool = False
    made_from: str = ""
    """the sum of the store's files before they were read; "" where that is not known"""
    conclusion: str = ""
    """of its author"""
    standing: Standing | None = None
    """where it stands in its campaign; None where the ledger does not have it"""

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def baseline(self) -> str:
        return self.study.baseline

    @property
    def metric(self) -> str:
        return self.study.metric

    @property
    def unit(self) -> str:
        return reading(self.study.metric).unit

    @property
    def measured(self) -> str:
        """The primary metric in words: `final val/loss`, `tokens to val/loss 3.2`."""
        return self.metric if target_of(self.metric) else f"final {self.metric}"

    @property
    def styles(self) -> dict[str, ArmStyle]:
        """How every arm is drawn."""
        return styles_of(list(self.study.arms), self.baseline)

    @cached_property
    def usable(self) -> list[StudyRun]:
        """The runs that have a final value and did not fail."""
        return usable_runs(self.study, self.runs)

    @cached_property
    def _shared(self) -> dict[Callable[[StudyRead], Any], Any]:
        return {}

    def once(self, compute: Callable[[StudyRead], Result]) -> Result:
        """`compute(self)`, computed at the first call for all sections that need it."""
        if compute not in self._shared:
            self._shared[compute] = compute(self)
        return cast(Result, self._shared[compute])

    def arm_table(
        self, cells: Callable[[Summary], Mapping[str, Cell | str | None]], arms: Collection[str] | None = None
    ) -> Table | None:
        """One row per arm, or per arm of `arms`, with its name and colour; see `tabulate`."""
        shown = [arm for name, arm in self.arms.items() if arms is None or name in arms]
        return tabulate(
            shown,
            lambda arm: {"Arm": arm.arm, **cells(arm)},
            lambda arm: arm.look,
            lambda arm: arm.arm == self.baseline,
        )


def read_study(name: str, root: str | Path, *, force_exploratory: bool = False) -> StudyRead:
    """A study from the store. Raises ConfigError for an unknown study, DataFault for a damaged record."""
    store = Store(root)
    made_from = sum_of_store(store)
    study = cleaned(store.study(name))
    _check_name(study.name, [*store.studies(), *store.earlier()], "study", name)
    runs = collect(study, store)
    text = text_noise(study, runs, store)
    verdicts = judge_runs(study, runs, store, force_exploratory=force_exploratory, text=text)
    arms = summaries(study, runs, verdicts)
    return StudyRead(
        study=study, runs=runs, verdicts=verdicts, text=text, store=store, arms=arms, forced=force_exploratory,
        made_from=made_from, conclusion=clean(store.conclusion(study)), standing=standing_of(study, store),
    )  # fmt: skip


def _check_name(written: object, known: Collection[str], kind: str, name: str) -> None:
    """A record's own name becomes the name of a folder. Raises DataFault for one that is not recorded."""
    if written not in known:
        raise DataFault(f"the record calls itself '{written}', which is no recorded {kind}", where=name)


def summaries(study: Study, runs: Sequence[StudyRun], verdicts: Verdicts) -> dict[str, Summary]:
    """Every arm of the study, the baseline first."""
    judged = {arm.name: arm for arm in verdicts.arms}
    names = [study.baseline, *(arm for arm in study.arms if arm != study.baseline)]
    every, usable = by_arm(runs), by_arm(usable_runs(study, runs) if study.metric == LOSS else ())
    arms = {}
    for place, name in enumerate(names):
        arm, results = judged[name], [run.result for run in every.get(name, ())]
        speeds = [speed for result in results if (speed := result.get("tokens_per_second"))]
        peaks = [peak for result in results if (peak := result.get("peak_memory_bytes"))]
        shares = [share for result in results if isinstance(share := result.get("mfu"), float)]
        bits = [run.evaluation["metrics"].get(BITS, math.nan) for run in usable.get(name, ())]
        arms[name] = Summary(
            arm=name, look=look_of(place), n=arm.n, failed=arm.failed, missing=arm.missing,
            mean=arm.mean if arm.n else None, sd=arm.sd if arm.n > 1 else None,
            tokens_per_second=statistics.median(speeds) if speeds else None, speeds=speeds,
            peak_memory_bytes=max(peaks, default=None), mfu=statistics.median(shares) if shares else None,
            bits_per_byte=statistics.fmean(bits) if bits else math.nan, span=_span(results),
        )  # fmt: skip
    return arms


def _span(results: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """From the first beginning to the last end of runs; None where no result has a time."""
    ends = [
        (datetime.fromisoformat(result["finished_at"]).timestamp(), float(result.get("seconds") or 0.0))
        for result in results
        if result.get("finished_at")
    ]
    return (min(end - seconds for end, seconds in ends), max(end for end, _ in ends)) if ends else None


def speed_change(arm: Summary, reference: Summary) -> str:
    """`+8.1 %`: the median speed against that of `reference`; "" for the same arm, where the speeds of their runs
    overlap, and where one arm was trained after the other, when the machine may have been more or less busy."""
    if arm is reference or not arm.speeds or not reference.speeds:
        return ""
    if arm.span and reference.span and (arm.span[0] > reference.span[1] or reference.span[0] > arm.span[1]):
        return ""
    apart = max(arm.speeds) < min(reference.speeds) or min(arm.speeds) > max(reference.speeds)
    return change(arm.tokens_per_second, reference.tokens_per_second) if apart else ""


def look_of(place: int) -> int:
    """The colour of an arm or a search in the figures, by its place."""
    return (place - 1) % len(ARMS) + 1 if place else 0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A dimension of the space as it is drawn. `choices`: names in the place of numbers."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: Sequence[str] = ()

    @property
    def range(self) -> str:
        """`0.0002 to 0.2`, or the choices."""
        return ", ".join(self.choices) or f"{setting(self.low)} to {setting(self.high)}"

    def place(self, trial: TrialRecord) -> float:
        """Where a trial lies on the axis, in the unit of its setting; NaN where it has none."""
        if self.name not in trial.settings:
            return math.nan
        value = trial.settings[self.name]
        if self.choices:
            return float(self.choices.index(str(value))) if str(value) in self.choices else math.nan
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def last_value(trial: TrialRecord) -> float:
    """The value of a finished trial, or the last one of a pruned trial; NaN where there is none."""
    seen = [value for *_, value in trial.curve if value is not None] if trial.outcome == PRUNED else []
    return seen[-1] if seen and trial.value is None else trial.result


@dataclass(frozen=True, kw_only=True)
class SearchRead:
    """One search of a sweep. `optima`: what the trials say of each numeric setting."""

    label: str
    record: SearchRecord
    axes: Mapping[str, Axis]
    optima: Mapping[str, Optimum]
    direction: str

    @property
    def trials(self) -> Sequence[TrialRecord]:
        return self.record.trials

    @property
    def ranked(self) -> Sequence[TrialRecord]:
        """The finished trials, the best value first."""
        return ranked_trials(self.trials, self.direction)

    @property
    def best(self) -> TrialRecord | None:
        """The finished trial with the best value."""
        return best_trial(self.trials, self.direction)

    @property
    def seeds(self) -> Sequence[int]:
        """Tuning seeds of every trial."""
        return self.record.seeds or [100]

    @property
    def counts(self) -> Counter[str]:
        """Trials by outcome."""
        return Counter(trial.outcome for trial in self.trials)

    @property
    def importance(self) -> Mapping[str, float | None]:
        """Setting -> the share of the variation between trials that it explains, as far as it is known."""
        return self.record.importance.values if self.record.importance else {}

    @property
    def alone(self) -> str | None:
        """The only setting that was searched, if it is a number: a curve can be fitted to it."""
        return next(iter(self.optima)) if len(self.axes) == 1 and self.optima else None

    def fitted(self, name: str) -> Optimum | None:
        """What is drawn of a setting's optimum: nothing where other settings differ between the trials."""
        return self.optima.get(name) if name == self.alone else None


@dataclass(frozen=True, kw_only=True)
class SweepRead:
    """A sweep at one scale."""

    record: SweepRecord
    searches: Mapping[str, SearchRead]
    store: Store
    made_from: str = ""
    """as of a study"""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def metric(self) -> str:
        return self.record.metric

    @property
    def unit(self) -> str:
        return reading(self.record.metric).unit

    @property
    def single(self) -> SearchRead | None:
        """The search, where there is only one."""
        return next(iter(self.searches.values())) if len(self.searches) == 1 else None

    @property
    def counts(self) -> Counter[str]:
        """Trials by outcome, over all searches."""
        return sum((search.counts for search in self.searches.values()), Counter())

    @property
    def slots(self) -> int:
        """Trials in all, as they were declared."""
        return sum(search.record.count or self.record.trials for search in self.searches.values())

    @property
    def seeds(self) -> int:
        """Tuning seeds of a trial."""
        return max((len(search.seeds) for search in self.searches.values()), default=1)

    @property
    def open(self) -> int:
        """Trials that were declared and have no outcome yet."""
        return max(0, self.slots - sum(self.counts[outcome] for outcome in (FINISHED, PRUNED, DIVERGED, FAILED)))

    @property
    def trials(self) -> list[tuple[SearchRead, TrialRecord]]:
        """Every trial of every search."""
        return [(search, trial) for search in self.searches.values() for trial in search.trials]

    def titled(self, search: SearchRead, title: str) -> str:
        """A heading that names the search where there are several."""
        return title if self.single else f"{title}: {search.label}"


def read_sweep(name: str, root: str | Path) -> SweepRead:
    """A sweep from the store. Raises ConfigError for an unknown name, DataFault for a damaged record."""
    store = Store(root)
    made_from = sum_of_store(store)
    record = store.sweep(name)
    _check_name(record.name, [*store.sweeps(), *store.earlier(kind="sweep")], "sweep", name)
    return read_record(record, store, made_from)


def read_record(record: SweepRecord, store: Store, made_from: str = "") -> SweepRead:
    """A sweep from its record. Raises DataFault for a space or for trials that cannot be."""
    record = cleaned(record)
    try:
        searches = {label: _search(label, search, record) for label, search in record.searches.items()}
    except (KeyError, TypeError) as error:
        raise DataFault(f"the record of the sweep is damaged: {error}", where=record.name) from error
    return SweepRead(record=record, searches=searches, store=store, made_from=made_from)


def _search(label: str, search: SearchRecord, record: SweepRecord) -> SearchRead:
    found = chosen(
        search, record.direction, count=search.count, effect=record.smallest_effect,
        noise_sd=record.noise.sd if record.noise and record.metric == LOSS else None, unit=reading(record.metric).unit,
    )  # fmt: skip
    return SearchRead(
        label=label,
        record=search,
        axes={axis.name: axis for axis in map(_axis, search.space)},
        optima=found.optima,
        direction=record.direction,
    )


def _axis(dimension: DimensionRecord) -> Axis:
    if dimension.choices:
        return Axis(name=dimension.name, choices=tuple(map(str, dimension.choices)))
    return Axis(name=dimension.name, low=dimension.low or 0.0, high=dimension.high or 0.0, log=dimension.log)
