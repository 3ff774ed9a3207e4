"""Works on searches from start to end: claims trials, trains their runs, and records what was found.

Any number of processes may do this with the same searches; whichever claims a trial trains its runs. Only these
processes use Optuna, never one that trains, so all ranks of a run have the same settings and end at the same step when
it is pruned. Journals are read in the order of their rows: pruning never depends on how soon a row was read.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.basics.progress import Listener, Message, Progress, RunProgress
from gpt2lab.basics.redaction import shown
from gpt2lab.basics.text import number, plural
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, LockHeld
from gpt2lab.executors import Ending, Executor, is_loss
from gpt2lab.executors.driver import CLOSE_SECONDS, TrackerFactory, executor_for
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.planning.record import components_of
from gpt2lab.planning.runs import Run, is_finished
from gpt2lab.planning.tuning import Search
from gpt2lab.records import DimensionRecord, SearchRecord, SweepRecord, best_trial
from gpt2lab.runner import Job
from gpt2lab.runner.job import job_for
from gpt2lab.store import Store, file_lock, now
from gpt2lab.sweep.storage import default_address, open_storage
from gpt2lab.sweep.trials import Attempt, End, Trials, worker_id
from gpt2lab.tracking.follower import Follower, as_study
from gpt2lab.tracking.journal import Tail

LOOK_SECONDS = 2.0
"""Between looks at the storage for what others have done, and between records that are written."""
LOCK_PATIENCE_SECONDS = 60.0


def run_searches(
    searches: Mapping[str, Search], record: SweepRecord, store: Store, *, on_event: Listener,
    tracker: TrackerFactory | None, storage: str | None = None, stays: bool = True,
    executor: Executor | None = None,
) -> SweepRecord:  # fmt: skip
    """Work on all searches until every trial has come to its end; -> the record, which is also in the store.

    record:  what was declared, without its searches; no trial is begun after its `time_budget`, in seconds.
    storage: where the trials are kept; beside the runs unless given.
    stays:   whether to wait while other workers are at the last trials, in case they die.
    executor: where runs execute, as many at a time as the machine of the searches says; processes of this machine by
             default.
    Raises Preempted when stopped, with everything saved; ConfigError, EnvironmentFault, DataFault of the storage.
    """

    def say(text: str) -> None:
        on_event(Message(text))

    address = storage or default_address(store.root)
    opened, worker = open_storage(address, say), worker_id()
    trials = {
        label: Trials(
            opened, search.study, space=search.space, settings=search.settings, count=search.trials,
            tokens=search.tokens, points=search.known_points, worker=worker, say=say,
        )
        for label, search in searches.items()
    }  # fmt: skip
    for text in started_anew(searches, store, record.name):
        say(text)
    record = record.with_(storage=shown(address))
    follower = Follower(store, as_study(record), tracker, say)
    deadline = time.monotonic() + record.time_budget if record.time_budget else math.inf
    try:
        return Drive(searches, trials, record, store, on_event, follower, deadline, stays, executor).run()
    finally:
        follower.close(timeout=CLOSE_SECONDS)


def started_anew(searches: Mapping[str, Search], store: Store, name: str) -> Iterator[str]:
    """A sentence for each search that was declared otherwise when the sweep's record was written."""
    before = store.sweep(name).searches if name in store.sweeps() else {}
    for label, search in searches.items():
        entry = before.get(label)
        if entry is not None and entry.study != search.study and entry.trials:
            earlier = plural(len(entry.trials), "earlier trial")
            yield f"{label}: its space, settings or base are not those of its {earlier}, so the search starts anew"


@dataclass
class Active:
    """A trial that is at work in this process: its runs one after another. Pruning looks at the first."""

    label: str
    search: Search
    attempt: Attempt
    runs: tuple[Run, ...]
    views: list[RunProgress]
    tail: Tail
    at: int = 0
    """index of the run at work, or next"""
    values: dict[str, float] = field(default_factory=dict)
    cut: int | None = None
    """step at which pruning ended it"""
    submitted: bool = False
    """whether the scheduler has its run"""
    trained: bool = False
    """whether anything was trained for it here"""

    @property
    def run(self) -> Run:
        return self.runs[self.at]

    @property
    def view(self) -> RunProgress:
        return self.views[self.at]


@dataclass
class Drive:
    """Searches and what they need: see `run_searches`."""

    searches: Mapping[str, Search]
    trials: Mapping[str, Trials]
    record: SweepRecord
    store: Store
    on_event: Listener
    follower: Follower
    deadline: float
    stays: bool
    executor: Executor | None
    active: list[Active] = field(default_factory=list, init=False)
    views: dict[str, list[RunProgress]] = field(default_factory=dict, init=False)
    stopped: dict[str, str] = field(default_factory=dict, init=False)
    """label -> why no more of its trials are begun"""
    looked: float = field(default=-math.inf, init=False)
    changed: bool = field(default=True, init=False)
    idle_until: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        self.machine = next(iter(self.searches.values())).machine
        self.title = f"{self.record.name}: {self.record.question}"
        executor = self.executor or executor_for(self.machine)
        most = self.machine.jobs if self.executor else None
        self.scheduler = Scheduler(executor, self.tick, self._is_done, most=most)

    def say(self, text: str) -> None:
        self.on_event(Message(text))

    def run(self) -> SweepRecord:
        """Work until nothing is left; -> the last record."""
        try:
            self.look()
            self.scheduler.run(self.jobs(), self.ended)
        finally:  # give back what is at work here, for whoever comes next: after a stop, or an error of ours
            for trial in list(self.active):
                self._end(trial, "stopped")
            record = self.write(importance=True)
        return record

    def _is_done(self, run_id: str) -> bool:
        return any(trial.run.id == run_id and is_finished(trial.run, self.store) for trial in self.active)

    # What is to be done

    def jobs(self) -> Iterator[Job | None]:
        """One run after another, as there is room; None while there is nothing to do but wait."""
        while True:
            job = self._next()
            if job is None and not self.active and not (self.stays and self._anything_left()):
                return
            yield job

    def _next(self) -> Job | None:
        for trial in [trial for trial in self.active if not trial.submitted]:
            if job := self._start(trial):
                return job
        if time.monotonic() < self.idle_until:
            return None
        # searches with the fewest trials first, so that all of them come on alike
        for label in sorted(self.searches, key=lambda label: len(self.views.get(label, ()))):
            while attempt := self._claim(label):
                begun = self._begin(label, attempt)
                if begun and (job := self._start(begun)):
                    return job
        self.idle_until = time.monotonic() + LOOK_SECONDS  # nothing waits, until a trial of another worker is lost
        return None

    def _claim(self, label: str) -> Attempt | None:
        if label not in self.stopped and time.monotonic() > self.deadline:
            self._stop(label, "the time budget is used up")
        return None if label in self.stopped else self.trials[label].claim()

    def _begin(self, label: str, attempt: Attempt) -> Active | None:
        """A claimed trial; None when its settings make no config."""
        search = self.searches[label]
        settings = search.space.settings(attempt.params)
        self.changed = True
        try:
            runs = search.runs_at(settings)
        except ConfigError as error:
            reason = f"these settings cannot be combined: {error.problems[0].what}"
            self.trials[label].end(attempt, "failed", reason=reason)
            self._failed(label, attempt, reason)
            return None
        done = sum(self.store.run(run.id).saved_step() for run in runs)
        self.trials[label].note(attempt, settings=settings, runs={str(run.seed): run.id for run in runs}, done=done)
        chosen = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())
        name = f"{label} {attempt.index}" if len(self.searches) > 1 else f"trial {attempt.index}"
        views = [RunProgress(f"{name}: {chosen}", str(run.seed), run.id, run.config.training.steps) for run in runs]
        self.views.setdefault(label, []).extend(views)
        trial = Active(label, search, attempt, runs, views, Tail(self.store.run(runs[0].id).metrics))
        self.active.append(trial)
        return trial

    def _start(self, trial: Active) -> Job | None:
        """The job of the trial's next run that is not finished; None when all are, or while another trial is at it."""
        while is_finished(trial.run, self.store):
            self._read(trial)  # other trials are compared with its curve, whether or not it would be pruned
            if not self._account(trial):
                return None
        if any(other.submitted and other.run.id == trial.run.id for other in self.active):
            return None  # equal settings were drawn twice: what that trial finds is found for this one as well
        trial.submitted = True
        search = trial.search
        return job_for(
            trial.run, self.store, search.arm.data or search.data,
            flops_per_token=search.costs.flops_per_token, threads=search.machine.threads,
        )  # fmt: skip

    def _anything_left(self) -> bool:
        """Whether trials are open that may yet need this worker: those of others who may die."""
        return any(label not in self.stopped and trials.unfinished() for label, trials in self.trials.items())

    def _stop(self, label: str, why: str) -> None:
        if label not in self.stopped:
            self.stopped[label] = why
            self.say(f"{f'{label}: ' if len(self.searches) > 1 else ''}{why}; no more trials are begun")

    # While runs train

    def tick(self) -> None:
        """Several times a second: read journals, prune, send events and heartbeats."""
        for trial in [trial for trial in self.active if trial.submitted]:
            self._read(trial)
            if trial.cut is not None or trial.attempt.lost:
                self.scheduler.cancel(trial.run.id)
            trial.view.status = "running" if self.store.run(trial.run.id).status() == "running" else "waiting"
        self.follower.poll()
        runs = [view for views in self.views.values() for view in views]
        self.on_event(Progress.of(self.title, runs, self.machine.jobs))
        if time.monotonic() - self.looked > LOOK_SECONDS:
            self.look()

    def look(self) -> None:
        """What others have done, and what became of them; the record anew if anything has changed."""
        self.looked = time.monotonic()
        for trials in self.trials.values():
            for message in trials.take_back():
                self.say(message)
                self.changed = True
        if self.changed:
            self.changed = False
            self.write()

    def write(self, *, importance: bool = False) -> SweepRecord:
        """Make the record anew, as the storage has things now, write it, and have the tracker follow it. importance:
        with what decides among several dimensions."""
        searches = {}
        for label, search in self.searches.items():
            entry = search_record(search, self.trials[label], self.record.scale)
            several = importance and len(entry.space) > 1
            searches[label] = entry.with_(importance=self.trials[label].importance() if several else None)
        stopped = "; ".join(dict.fromkeys(self.stopped.values())) or None
        record = self.record.with_(stopped=stopped, searches=searches)
        with contextlib.suppress(EnvironmentFault):  # a full disk is reported by the run that meets it
            record = write_record(record, self.store)
        self.follower.update(as_study(record))
        self.follower.poll()
        return record

    def _read(self, trial: Active) -> None:
        """Read new rows of the run at work; those of the first run decide on pruning."""
        try:
            rows = trial.tail.new_rows()
        except (DataFault, OSError):
            return  # the run itself will meet it, and report it
        trial.view.take(rows)
        metric, steps = trial.search.settings.metric, trial.run.config.training.steps
        for row in rows if trial.at == 0 and trial.cut is None else ():
            value = row["metrics"].get(metric)
            if value is None or not math.isfinite(value) or not 0 < row["step"] < steps:
                continue  # where it is not finite, the numerics watch ends the run
            stop = self.trials[trial.label].report(trial.attempt, row["step"], row["tokens"], value)
            if trial.attempt.lost:
                return
            if stop:
                trial.cut = row["step"]
                return

    # When a run has ended

    def ended(self, run_id: str, ending: Ending) -> None:
        """Go on with the trial of a run that has ended, or record what it found."""
        trial = next(trial for trial in self.active if trial.submitted and trial.run.id == run_id)
        trial.submitted, trial.trained = False, trial.trained or ending != "found"
        self._read(trial)
        if trial.attempt.lost:
            self._end(trial, "stopped", "lost")
        elif trial.cut is not None and ending in ("preempted", "done"):
            self._pruned(trial)
        elif ending in ("done", "found"):
            self._account(trial)
        elif ending == "preempted":
            self._end(trial, "stopped")
        else:
            failure = self.store.run(run_id).failure() or {}
            reason = str(failure.get("reason") or "its worker failed")
            self._end(trial, "lost" if is_loss(failure) else "failed", reason=reason)
            self._failed(trial.label, trial.attempt, reason)

    def _end(
        self, trial: Active, outcome: End, status: str | None = None, value: float | None = None, **more: Any
    ) -> None:
        """Record how a trial ended; it is no longer at work here."""
        trial.view.status = status or outcome
        self.active.remove(trial)
        self.changed = True
        if outcome in ("finished", "pruned", "diverged"):
            last = [self.store.run(run.id).rows()[-1:] for run in trial.runs[: trial.at + 1]]
            tokens = sum(int(row["tokens"]) for rows in last for row in rows)
            more |= {"values": dict(trial.values), "tokens": tokens, "found": not trial.trained}
        self.trials[trial.label].end(trial.attempt, outcome, value, **more)

    def _account(self, trial: Active) -> bool:
        """Take the value of the present run, which is finished; -> whether the trial has another one."""
        run, metric = trial.run, trial.search.settings.metric
        folder = self.store.run(run.id)
        result = folder.result() or {}
        value = ((folder.evaluation(run.evaluation_key) or {}).get("metrics") or {}).get(metric)
        if result.get("status") == "diverged" or (value is not None and not math.isfinite(value)):
            self._end(trial, "diverged", reason=str(result.get("reason") or "the loss is not finite"))
            self._say(trial, "diverged")
        elif value is None:
            reason = f"its final evaluation has no {metric}"
            self._end(trial, "failed", reason=reason)
            self._failed(trial.label, trial.attempt, reason)
        else:
            trial.values[str(run.seed)] = trial.view.val_loss = float(value)
            if trial.at + 1 < len(trial.runs):
                trial.view.status = "finished"
                trial.at += 1
                trial.tail = Tail(self.store.run(trial.run.id).metrics)
                return True
            mean = sum(trial.values.values()) / len(trial.values)
            self._end(trial, "finished", value=mean)
            best = best_trial(self.trials[trial.label].records(), trial.search.settings.direction)
            is_best = best is not None and best.index == trial.attempt.index
            self._say(trial, f"{number(mean)}{', the best so far' if is_best else ''}")
        return False

    def _pruned(self, trial: Active) -> None:
        folder = self.store.run(trial.run.id)
        if not trial.search.settings.pruner.keep_checkpoints and folder.result() is None:
            with contextlib.suppress(LockHeld, OSError), folder.lock():  # another process may want it to its end
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
        self._end(trial, "pruned", step=trial.cut)
        self._say(trial, f"pruned at step {trial.cut}")

    def _failed(self, label: str, attempt: Attempt, reason: str) -> None:
        """A message on a trial that failed or was lost; no more are begun when too many have failed."""
        trials, most = self.trials[label], self.searches[label].settings.max_failures
        if not trials.has_failed(attempt.index):
            self.say(f"{label}: trial {attempt.index} was lost: {reason}; it is tried again")
            return
        self.say(f"{label}: trial {attempt.index} failed: {reason}")
        if (failures := trials.failures()) > most:
            self._stop(label, f"{failures} trials failed, more than max_failures: {most}")

    def _say(self, trial: Active, what: str) -> None:
        """A message on how a trial ended."""
        self.say(f"{trial.views[0].arm}: {what}")


# The record


def search_record(search: Search, trials: Trials, scale: str) -> SearchRecord:
    """One search with its trials, and the best one's config, ready to run."""
    config, records = search.arm.config, trials.records()
    best = best_trial(records, search.settings.direction)
    return SearchRecord(
        study=search.study,
        changes=dict(search.arm.changes),
        base=search.as_written,
        seeds=list(search.seeds),
        count=search.trials,
        parameters=search.costs.parameters,
        non_embedding_parameters=search.costs.non_embedding_parameters,
        flops_per_token=search.costs.flops_per_token,
        tokens=search.tokens,
        steps=config.training.steps,
        components=components_of(config),
        optimizer=config.optim.optimizer.name,
        space=[DimensionRecord(**dimension.as_record()) for dimension in search.space.dimensions],
        best_config=search.arm_at(best.settings).config.over_preset(scale) if best else None,
        trials=records,
    )


def write_record(record: SweepRecord, store: Store) -> SweepRecord:
    """Write it as the sweep's record; a sweep keeps the date on which it was declared first."""
    with file_lock(store.folder("sweeps") / f".{record.name}.lock", LOCK_PATIENCE_SECONDS):
        before = store.sweep(record.name) if record.name in store.sweeps() else None
        created = before.created if before and before.hash == record.hash else ""
        record = record.with_(created=created or now(), updated=now())
        store.write_sweep(record)
    return record
