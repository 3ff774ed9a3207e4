"""The trials of one search in an Optuna storage, and how any number of workers share them.

A trial is one of Optuna's, from its first attempt to its end: its number is its place in the search. A worker creates
the next one as running, or takes one that waits; a trial whose worker or process is gone waits again, with the same
parameters. The storage gives a waiting trial to one worker only, and what has ended stays as it is, so every trial has
one result. Should two workers ever be at one trial, the run store's locks let one of them train, and the other finds
what it trained. Everything else is read from what is stored: a worker may die at any moment, and any other continues.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import psutil
from optuna import create_study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from gpt2lab.records import Importance, TrialRecord
from gpt2lab.store import now
from gpt2lab.sweep.sampling import REPORTS, STATES, distribution, draw, importance, outcome_of, pruned

if TYPE_CHECKING:
    from gpt2lab.planning.space import SearchSettings, Space

End = Literal["finished", "pruned", "diverged", "failed", "stopped", "lost"]
FORMAT = "2"
"""Follows the name of a study in the storage: in format 1, a trial of Optuna's was one attempt at a trial."""
MOST_LOSSES = 4
"""A trial that was lost so often without progress has failed: what kills its processes would kill the next."""
BEAT_SECONDS = 10.0
"""Between two heartbeats of a worker; well below the grace period, of which a locked storage may take a minute."""
GRACE_SECONDS = 120.0
"""A worker elsewhere whose heartbeat has stood still for so long is taken to be gone."""


@dataclass
class Attempt:
    """A trial that this worker has claimed."""

    index: int
    trial_id: int
    params: dict[str, Any]
    reports: dict[str, Any]
    """what is stored of them: see sampling.REPORTS"""
    lost: bool = False
    """whether another worker brought the trial to its end"""


class Trials:
    """The trials of one search, for one worker. From one thread only, and one object per search and process.

    count: how many there are in all. points: complete points that are tried first. tokens: of one whole run.
    say: takes messages for the user. Raises what the storage does.
    """

    def __init__(
        self, storage: BaseStorage, study: str, *, space: Space, settings: SearchSettings, count: int, tokens: int,
        points: Sequence[Mapping[str, Any]] = (), worker: str | None = None,
        say: Callable[[str], None] = lambda text: None, grace_seconds: float = GRACE_SECONDS,
    ) -> None:  # fmt: skip
        self.space, self.settings, self.count, self.worker = space, settings, count, worker or worker_id()
        self._storage, self._study, self._tokens, self._say = storage, study, tokens, say
        self._points, self._watch = len(points), WorkerWatch(grace_seconds)
        sampler, rest = settings.sampler, max(0, count - len(points))
        drawn = space.points(sampler.name, sampler.seed, rest) if sampler.name != "tpe" and rest else []
        self._fixed = [*points, *drawn]  # parameters of the first trials, which need no results of others
        self._held: dict[int, Attempt] = {}
        self._beat_at = -math.inf
        self._id = create_study(
            storage=storage, study_name=f"{study}/{FORMAT}", direction=settings.direction, load_if_exists=True
        )._study_id

    def stored(self) -> list[FrozenTrial]:
        """Every trial that was ever begun, as it is now, by its number."""
        return self._storage.get_all_trials(self._id, deepcopy=False)

    def unfinished(self) -> int:
        """Trials that have not ended: they wait, or a worker is at them."""
        return self.count - sum(trial.state.is_finished() for trial in self.stored()[: self.count])

    def failures(self) -> int:
        """Trials that failed."""
        return sum(trial.state == TrialState.FAIL for trial in self.stored())

    # Claiming, and what comes of it

    def claim(self) -> Attempt | None:
        """A trial that waits, or the next one; None if there is none."""
        while True:
            stored = self.stored()
            waiting = next((trial for trial in stored[: self.count] if trial.state == TrialState.WAITING), None)
            if waiting:
                trial_id = waiting._trial_id
                if not self._changed(trial_id, TrialState.RUNNING):
                    continue
            elif len(stored) < self.count:
                trial_id = self._storage.create_new_trial(self._id, _running(self.worker))
            else:
                return None
            trial = self._storage.get_trial(trial_id)
            if trial.number >= self.count:  # others created the last ones meanwhile: it waits for a larger total
                self._changed(trial_id, TrialState.WAITING)
                continue
            try:
                self._storage.set_trial_user_attr(trial_id, "worker", self.worker)
                params = self._params_of(trial)
            except UpdateFinishedTrialError:  # still in the name of a worker that is gone, it was given to another
                continue
            attempt = Attempt(trial.number, trial_id, params, _reports(trial))
            self._held[trial.number] = attempt
            self.beat()
            return attempt

    def _params_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """Those that it has, or new ones, which are stored."""
        params: dict[str, Any] | None = trial.user_attrs.get("params")
        if params is None and trial.number < len(self._fixed):
            params = dict(self._fixed[trial.number])
        if params is None:
            params = draw(
                self.space, self.settings.sampler, index=trial.number, trials=self.count, known=self.stored(),
                direction=self.settings.direction,
            )  # fmt: skip
        self._storage.set_trial_user_attr(trial._trial_id, "params", params)  # all of them at once
        for dimension in self.space.dimensions:
            if dimension.name in params and dimension.name not in trial.params:
                kind = distribution(dimension)
                value = kind.to_internal_repr(params[dimension.name])
                self._storage.set_trial_param(trial._trial_id, dimension.name, value, kind)
        return params

    def _changed(self, trial_id: int, state: TrialState, values: list[float] | None = None) -> bool:
        """Change the state of a trial; False where it has ended, or another worker took it."""
        try:
            return bool(self._storage.set_trial_state_values(trial_id, state, values))
        except UpdateFinishedTrialError:
            return False

    def note(self, attempt: Attempt, *, settings: Mapping[str, Any], runs: Mapping[str, str], done: int) -> None:
        """Keep what a trial trains. done: steps of its runs that are saved; more of them than at any earlier attempt
        are progress, after which losses are counted anew."""
        try:
            attrs = self._storage.get_trial(attempt.trial_id).user_attrs
            for name, value in (("settings", settings), ("runs", runs)):
                self._storage.set_trial_user_attr(attempt.trial_id, name, value)
            if done > attrs.get("done", 0):
                self._storage.set_trial_user_attr(attempt.trial_id, "lost", {**_losses(attrs), "count": 0})
                self._storage.set_trial_user_attr(attempt.trial_id, "done", done)
        except UpdateFinishedTrialError:
            attempt.lost = True

    def report(self, attempt: Attempt, step: int, tokens: int, value: float) -> bool:
        """Keep an intermediate value; -> whether the trial should be stopped, by this report or an earlier one, or
        because the trial has ended elsewhere. A step counts once."""
        reports = attempt.reports
        if not attempt.lost and all(step != earlier for earlier, *_ in reports["curve"]):
            percent = round(100 * tokens / self._tokens)
            reports = {**reports, "curve": [*reports["curve"], (step, tokens, value)]}
            try:
                self._storage.set_trial_intermediate_value(attempt.trial_id, percent, value)
                if reports["stop_at"] is None and self.settings.pruner.name != "none":
                    pruner, direction = self.settings.pruner, self.settings.direction
                    stop, rungs = pruned(pruner, self.stored(), attempt.index, direction, self._study)
                    reports |= {"rungs": rungs, "stop_at": step if stop else None}
                self._storage.set_trial_user_attr(attempt.trial_id, REPORTS, reports)
                attempt.reports = reports
            except UpdateFinishedTrialError:
                attempt.lost = True
            self.beat()
        return attempt.lost or (reports["stop_at"] is not None and step >= reports["stop_at"])

    def end(
        self, attempt: Attempt, outcome: End, value: float | None = None, *, reason: str | None = None,
        step: int | None = None, **facts: Any,
    ) -> bool:  # fmt: skip
        """End an attempt; False if the trial had ended elsewhere, so that this does not count. A trial that is
        "stopped" or "lost" waits again; a "failed" one does not. `step`: at which it was pruned."""
        del self._held[attempt.index]
        try:
            if outcome == "stopped" or outcome == "lost":
                trial = self._storage.get_trial(attempt.trial_id)
                return self._give_back(trial, reason if outcome == "lost" else None)
            ending = {"outcome": outcome, "reason": reason, "step": step, "facts": facts}
            self._storage.set_trial_user_attr(attempt.trial_id, "end", ending)
            values = None if value is None else [value]
            accepted = bool(self._storage.set_trial_state_values(attempt.trial_id, STATES[outcome], values))
        except UpdateFinishedTrialError:  # or this worker did it, and the answer to it was lost on the way
            trial = self._storage.get_trial(attempt.trial_id)
            accepted = outcome_of(trial) == outcome and trial.user_attrs["worker"] == self.worker
        if not accepted:
            self._say(
                f"trial {attempt.index} had been given to another worker, because this one was thought to be gone: its "
                "result is not counted"
            )
        return accepted

    def _give_back(self, trial: FrozenTrial, why: str | None) -> bool:
        """Let a trial wait again, or fail after too many losses. `why` it was lost; None when it was stopped."""
        trial_id = trial._trial_id
        if why is not None:
            losses = _losses(trial.user_attrs)  # as it was seen: of several workers that see it, all write the same
            count = losses["count"] + 1
            lost = {"count": count, "all": losses["all"] + 1, "why": why, "by": self.worker, "at": now()}
            self._storage.set_trial_user_attr(trial_id, "lost", lost)
            if count >= MOST_LOSSES:
                ending = {"outcome": "failed", "reason": f"lost {MOST_LOSSES} times, at last because {why}"}
                self._storage.set_trial_user_attr(trial_id, "end", ending)
                return self._changed(trial_id, TrialState.FAIL)
        return self._changed(trial_id, TrialState.WAITING)

    # Workers that are gone

    def beat(self) -> None:
        """Send this worker's heartbeat, if that is due. Cheap: to be called often."""
        if self._held and time.monotonic() - self._beat_at >= BEAT_SECONDS:
            self._storage.set_study_user_attr(self._id, f"beat:{self.worker}", now())
            self._beat_at = time.monotonic()

    def take_back(self) -> list[str]:
        """Let the trials of workers that are gone wait again; -> messages. Every worker calls it now and then."""
        self.beat()
        running = [trial for trial in self.stored() if trial.state == TrialState.RUNNING]
        others = [trial for trial in running if trial.number not in self._held]
        beats = self._storage.get_study_user_attrs(self._id) if others else {}
        messages = []
        for trial in others:
            worker = trial.user_attrs["worker"]
            if worker != self.worker and not self._watch.gone(worker, beats.get(f"beat:{worker}")):
                continue
            why = f"its worker {shown(worker)} is gone"
            trial = self._storage.get_trial(trial._trial_id)
            if trial.state != TrialState.RUNNING or trial.user_attrs["worker"] != worker:
                continue  # another worker was faster
            try:
                if self._give_back(trial, why) and trial.number < self.count:
                    fate = "it has failed" if self.has_failed(trial.number) else "it is tried again"
                    messages.append(f"trial {trial.number} was lost: {why}; {fate}")
            except UpdateFinishedTrialError:  # the worker that was missed is back
                continue
        return messages

    def has_failed(self, index: int) -> bool:
        """Whether a trial gets no further attempt."""
        return self.stored()[index].state == TrialState.FAIL

    # What came of it all

    def importance(self) -> Importance | None:
        """How much each dimension mattered; None where too few trials were finished."""
        return importance(self.space, self.stored(), self.settings.direction)

    def records(self) -> list[TrialRecord]:
        """Every trial, as the record of the sweep has it; those above `count` that were begun when there were more."""
        stored = self.stored()
        begun = [trial for trial in stored if trial.number < self.count or trial.state != TrialState.WAITING]
        rest = range(len(stored), self.count)
        return [self._record(trial) for trial in begun] + [self._waiting_record(index) for index in rest]

    def _waiting_record(self, index: int) -> TrialRecord:
        params = self._fixed[index] if index < len(self._fixed) else {}
        settings = self.space.settings(params)
        return TrialRecord(index=index, outcome="waiting", settings=settings, enqueued=index < self._points)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        attrs, outcome, index = trial.user_attrs, outcome_of(trial), trial.number
        end = attrs.get("end") or {}
        facts = attrs | end.get("facts", {})
        losses = _losses(attrs)
        reason = end.get("reason") or (losses.get("why") if outcome == "waiting" else None)
        return TrialRecord(
            index=index,
            number=index,
            outcome=outcome,
            reason=reason or ("it was marked as failed from outside" if outcome == "failed" else None),
            settings=attrs.get("settings") or self.space.settings(attrs.get("params") or {}),
            value=trial.value if outcome == "finished" else None,
            **{name: facts[name] for name in ("values", "runs", "tokens", "found") if name in facts},
            curve=_reports(trial)["curve"],
            stopped_at=end.get("step") if outcome == "pruned" else None,
            enqueued=index < self._points,
            retries=losses["all"] - (outcome == "failed" and losses["count"] >= MOST_LOSSES),
            worker=shown(attrs["worker"]),
            started=iso(trial.datetime_start),
            ended=iso(trial.datetime_complete),
        )


def _running(worker: str) -> FrozenTrial:
    """A trial for a storage, which numbers it."""
    return FrozenTrial(
        number=-1, trial_id=-1, state=TrialState.RUNNING, value=None, params={}, distributions={},
        user_attrs={"worker": worker}, system_attrs={}, intermediate_values={}, datetime_start=datetime.now(),
        datetime_complete=None,
    )  # fmt: skip


def _reports(trial: FrozenTrial) -> dict[str, Any]:
    return dict(trial.user_attrs.get(REPORTS) or {"curve": [], "rungs": {}, "stop_at": None})


def _losses(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """How often a trial was lost: in all, and since it made progress."""
    return dict(attrs.get("lost") or {"count": 0, "all": 0})


def iso(when: datetime | None) -> str | None:
    """A time of Optuna's, which is local without a zone, as records hold it."""
    return None if when is None else when.astimezone(UTC).isoformat(timespec="seconds")


# Which workers live


CLOCK_SECONDS = 60.0
"""By which the time when a process began may seem to move, as clocks are set."""


def worker_id() -> str:
    """`host:pid:start` of this process. Process ids are used again; with the start they name one process."""
    return f"{socket.gethostname()}:{os.getpid()}:{round(psutil.Process().create_time())}"


def shown(worker: str) -> str:
    """A worker as people read it: `host:pid`."""
    return worker.rpartition(":")[0] or worker


class WorkerWatch:
    """Which other workers are gone: known at once on this machine, by a silent heartbeat elsewhere. A heartbeat is
    compared with what it was, by the clock of this machine: clocks of others may be wrong. A worker that is taken to be
    gone and is not does no harm: see above."""

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self._seen: dict[str, tuple[object, float]] = {}

    def gone(self, worker: str, beat: object) -> bool:
        """Whether a worker is gone. `beat`: its heartbeat, anything that changes."""
        host, pid, began = worker.rsplit(":", 2) if worker.count(":") == 2 else (worker, "", "")
        if host == socket.gethostname():
            try:
                process = psutil.Process(int(pid))
                is_it = abs(process.create_time() - float(began)) < CLOCK_SECONDS
                return not is_it or process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True
        before, since = self._seen.setdefault(worker, (beat, time.monotonic()))
        if before != beat:
            self._seen[worker] = (beat, time.monotonic())
            return False
        return time.monotonic() - since >= self.grace_seconds
