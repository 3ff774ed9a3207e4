"""Drives searches: claims what waits, trains it, tells what was found, until every slot has come to its end.

Any number of these may be at the same searches, in one process each; whoever claims a trial trains its runs. Optuna
lives here alone, never in a process that trains, so all ranks of a run have the same settings and end at the same step
when it is pruned. Journals are read in the order of their rows: what pruning decides never depends on how fast a run
was looked at.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, LockHeld
from gpt2lab.events import Listener, Message, Progress, RunProgress
from gpt2lab.executors import Ending
from gpt2lab.executors.driver import executor_for
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.planning.runs import is_finished
from gpt2lab.planning.search import Search
from gpt2lab.runner import Job
from gpt2lab.runner.job import job_for
from gpt2lab.store import RunFolder, Store
from gpt2lab.sweep.record import search_entry, write_record
from gpt2lab.sweep.slots import Slots, Turn
from gpt2lab.sweep.trial import Trial
from gpt2lab.text import number
from gpt2lab.tracking.follower import Follower, as_study
from gpt2lab.tracking.journal import Tail

LOOK_SECONDS = 2.0
"""Between looks at the storage for what others have done, and between records that are written."""


@dataclass
class Drive:
    """Searches and what they need: see `searching.run_searches`."""

    searches: Mapping[str, Search]
    slots: Mapping[str, Slots]
    head: dict[str, Any]
    store: Store
    on_event: Listener
    follower: Follower
    ranks: int
    deadline: float
    stays: bool
    scheduler: Scheduler = field(init=False)
    trials: list[Trial] = field(default_factory=list, init=False)
    """at work here"""
    views: dict[str, list[RunProgress]] = field(default_factory=dict, init=False)
    stopped: dict[str, str] = field(default_factory=dict, init=False)
    """label -> why no more of its trials are begun"""
    best: dict[str, float] = field(default_factory=dict, init=False)
    looked: float = field(default=-math.inf, init=False)
    changed: bool = field(default=True, init=False)
    idle_until: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        self.machine = next(iter(self.searches.values())).machine
        self.title = f"{self.head['name']}: {self.head['question']}"
        self.scheduler = Scheduler(executor_for(self.machine, self.ranks), self.tick, self._is_done)

    def say(self, text: str) -> None:
        self.on_event(Message(text))

    def run(self) -> dict[str, Any]:
        """Work until nothing is left; -> the last record."""
        try:
            self.look()
            self.scheduler.run(self.jobs(), self.ended)
        finally:  # give back what is at work here, for whoever comes next: after a stop, or an error of ours
            for trial in list(self.trials):
                trial.slots.release(trial.turn)
                self._over(trial, "stopped")
            record = self.write(importance=True)
        return record

    def _is_done(self, run_id: str) -> bool:
        return any(one.run.id == run_id and is_finished(one.run, self.store) for one in self.trials)

    # --- what is to be done ---

    def jobs(self) -> Iterator[Job | None]:
        """One run after another, as places become free; None while there is nothing to do but wait."""
        while True:
            job = self._next()
            if job is None and not self.trials and not (self.stays and self._anything_left()):
                return
            yield job

    def _next(self) -> Job | None:
        for under_way in [one for one in self.trials if not one.begun]:
            job = self._start(under_way)
            if job is not None:
                return job
        if time.monotonic() < self.idle_until:
            return None
        for label in self._in_turn():
            while (turn := self._claim(label)) is not None:
                trial = self._begin(label, turn)
                job = self._start(trial) if trial else None
                if job is not None:
                    return job
        self.idle_until = time.monotonic() + LOOK_SECONDS  # nothing waits, until a trial of somebody's is lost
        return None

    def _in_turn(self) -> list[str]:
        """Searches, that with the fewest trials so far first, so that all of them come on alike."""
        return sorted(self.searches, key=lambda label: len(self.views.get(label, ())))

    def _claim(self, label: str) -> Turn | None:
        if label in self.stopped:
            return None
        if time.monotonic() > self.deadline:
            self._stop(label, "the time budget is used up")
            return None
        return self.slots[label].claim()

    def _begin(self, label: str, turn: Turn) -> Trial | None:
        """A claimed trial; None when its settings make no config."""
        search, slots = self.searches[label], self.slots[label]
        settings = search.space.settings(turn.params)
        self.changed = True
        try:
            runs = search.runs_at(settings)
        except ConfigError as error:
            self._failed(label, turn, f"these settings cannot be combined: {error.problems[0].what}")
            return None
        slots.note(turn, settings=settings, runs={str(run.seed): run.id for run in runs})
        told = ", ".join(f"{_short(key)} {value}" for key, value in settings.items())
        name = f"{label} {turn.slot}" if len(self.searches) > 1 else f"trial {turn.slot}"
        views = [RunProgress(f"{name}: {told}", str(run.seed), run.id, run.config.training.steps) for run in runs]
        self.views.setdefault(label, []).extend(views)
        trial = Trial(label, search, slots, turn, settings, runs, views, Tail(self.store.run(runs[0].id).metrics))
        self.trials.append(trial)
        return trial

    def _start(self, trial: Trial) -> Job | None:
        """The job of the trial's next run that is not finished; None when all are, or while another trial is at it."""
        while is_finished(trial.run, self.store):
            self._read(trial)  # the others are compared with its curve; it has its result, whatever pruning says
            if not self._account(trial):
                return None
        if any(one.begun and one.run.id == trial.run.id for one in self.trials):
            return None  # equal settings were drawn twice: what that one finds is found for this one as well
        trial.begun = True
        search = trial.search
        return job_for(
            trial.run, self.store, search.data,
            flops_per_token=search.costs.flops_per_token, threads=search.machine.threads,
        )  # fmt: skip

    def _anything_left(self) -> bool:
        """Whether slots are open that may yet need us: those of others who may die."""
        return any(label not in self.stopped and slots.unfinished() for label, slots in self.slots.items())

    def _stop(self, label: str, why: str) -> None:
        if label not in self.stopped:
            self.stopped[label] = why
            named = f"{label}: " if len(self.searches) > 1 else ""
            self.say(f"{named}{why}; no more trials are begun")

    # --- while runs train ---

    def tick(self) -> None:
        """Several times a second: read journals, prune, show, say that we live."""
        for trial in [one for one in self.trials if one.begun]:
            self._read(trial)
            if trial.cut is not None or trial.lost:
                self.scheduler.cancel(trial.run.id)
            status = self.store.run(trial.run.id).status()
            trial.views[trial.at].status = "running" if status == "running" else "waiting"
        self.follower.poll()
        runs = [view for views in self.views.values() for view in views]
        self.on_event(Progress.of(self.title, runs, self.machine.jobs))
        if time.monotonic() - self.looked > LOOK_SECONDS:
            self.look()

    def look(self) -> None:
        """What others have done, and what became of them; the record anew if anything has changed."""
        self.looked = time.monotonic()
        for slots in self.slots.values():
            slots.beat()
            for told in slots.repair():
                self.say(told)
                self.changed = True
        if self.changed:
            self.changed = False
            self.write()

    def write(self, *, importance: bool = False) -> dict[str, Any]:
        """Make the record anew, as the storage has things now, write it, and have the mirror follow it. importance:
        with what decides among several dimensions."""
        entries = {}
        for label, search in self.searches.items():
            slots, several = self.slots[label], len(search.space.dimensions) > 1
            found = slots.importance() if importance and several else None
            entries[label] = search_entry(search, slots.trials(), found, slots.best(), str(self.head["scale"]))
        stopped = "; ".join(dict.fromkeys(self.stopped.values())) or None
        record = {**self.head, "stopped": stopped, "searches": entries}
        with contextlib.suppress(
            EnvironmentFault
        ):  # a full disk is told by the run that meets it, and is no reason to end
            record = write_record(record, self.store)
        self.follower.update(as_study(record))
        self.follower.poll()
        return record

    def _read(self, trial: Trial) -> None:
        """New rows of the run at work; of the first run, what pruning is told."""
        try:
            rows = trial.tail.new_rows()
        except (DataFault, OSError):
            return  # the run itself will meet it, and say so
        trial.views[trial.at].take(rows)
        metric, steps = trial.search.settings.metric, trial.run.config.training.steps
        for row in rows:
            value = row["metrics"].get(metric)
            if trial.at or trial.cut is not None or value is None or not 0 < row["step"] < steps:
                continue
            if not math.isfinite(value):
                continue  # the numerics watch ends the run
            if trial.slots.report(trial.turn, row["step"], row["tokens"], value):
                trial.lost = trial.slots.lost(trial.turn)
                if trial.lost:
                    return
                if not self.head.get("audit_pruning"):
                    trial.cut = row["step"]
                elif trial.would_cut is None:
                    trial.would_cut = row["step"]

    # --- when a run has ended ---

    def ended(self, run_id: str, ending: Ending) -> None:
        """One run has ended: go on with its trial, or tell what it found."""
        trial = next(one for one in self.trials if one.begun and one.run.id == run_id)
        trial.begun, trial.trained = False, trial.trained or ending != "found"
        self._read(trial)
        folder = self.store.run(run_id)
        if trial.lost:
            self._over(trial, "lost")
        elif trial.cut is not None and ending in ("preempted", "done"):
            self._pruned(trial, folder)
        elif ending in ("done", "found"):
            self._account(trial)
        elif ending == "preempted":
            trial.slots.release(trial.turn)
            self._over(trial, "stopped")
        else:
            self._over(trial, "failed")
            self._failed(trial.label, trial.turn, str((folder.failure() or {}).get("reason") or "its worker failed"))

    def _over(self, trial: Trial, status: str) -> None:
        """The trial is no longer at work here."""
        trial.views[trial.at].status = status
        self.trials.remove(trial)
        self.changed = True

    def _account(self, trial: Trial) -> bool:
        """Take the value of the present run, which is finished; -> whether the trial has another one."""
        run, metric = trial.run, trial.search.settings.metric
        result = self.store.run(run.id).result() or {}
        value = ((self.store.run(run.id).evaluation(run.evaluation_key) or {}).get("metrics") or {}).get(metric)
        if result.get("status") == "diverged" or (value is not None and not math.isfinite(value)):
            trial.slots.diverge(trial.turn, str(result.get("reason") or "the loss is not finite"), **self._facts(trial))
            self._over(trial, "diverged")
            self._tell(trial, "diverged")
        elif value is None:
            self._over(trial, "failed")
            self._failed(trial.label, trial.turn, f"its final evaluation has no {metric}")
        else:
            trial.values[str(run.seed)] = trial.views[trial.at].val_loss = float(value)
            if trial.at + 1 < len(trial.runs):
                trial.views[trial.at].status = "finished"
                trial.at += 1
                trial.tail = Tail(self.store.run(trial.run.id).metrics)
                return True
            mean = sum(trial.values.values()) / len(trial.values)
            trial.slots.finish(trial.turn, mean, **self._facts(trial))
            self._over(trial, "finished")
            self._tell(trial, number(mean), mean)
        return False

    def _pruned(self, trial: Trial, folder: RunFolder) -> None:
        assert trial.cut is not None
        if not trial.search.settings.pruner.keep_checkpoints and folder.result() is None:
            with contextlib.suppress(LockHeld, OSError), folder.lock():  # somebody else may want the run to its end
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
        trial.slots.prune(trial.turn, trial.cut, **self._facts(trial))
        self._over(trial, "pruned")
        self._tell(trial, f"pruned at step {trial.cut}")

    def _facts(self, trial: Trial) -> dict[str, Any]:
        """What is kept with a trial's end: the value of each seed, and the tokens that its runs trained on."""
        last = [self.store.run(run.id).rows()[-1:] for run in trial.runs[: trial.at + 1]]
        tokens = sum(int(row["tokens"]) for rows in last for row in rows)
        return {"values": dict(trial.values), "tokens": tokens, "found": not trial.trained}

    def _failed(self, label: str, turn: Turn, reason: str) -> None:
        slots, search = self.slots[label], self.searches[label]
        slots.fail(turn, reason)
        self.say(f"{label}: trial {turn.slot} failed: {reason}")
        if slots.failures() > search.settings.max_failures:
            self._stop(
                label, f"{slots.failures()} trials failed, more than max_failures: {search.settings.max_failures}"
            )

    def _tell(self, trial: Trial, what: str, value: float | None = None) -> None:
        """One line that stays."""
        if value is not None:
            sign = 1.0 if trial.search.settings.direction == "minimize" else -1.0
            if sign * value < self.best.get(trial.label, math.inf):
                self.best[trial.label] = sign * value
                what += ", the best so far"
        self.say(f"{trial.views[0].arm}: {what}")


def _short(key: str) -> str:
    return key.rpartition(".")[2]
