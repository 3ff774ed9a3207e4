"""The trials of one search in an Optuna storage, and how any number of workers share them.

A trial of a search is named by its index. Each attempt at it is one trial of Optuna, created as running by the worker
that claims it, complete with parameters and worker in a single write. Where two workers claim the same attempt, the one
with the lower number has it. An attempt whose worker or process is gone is marked as lost, and the next attempt has the
same parameters. What has ended stays as it is, so of two workers with a result for one attempt the second is refused.
Everything else is read from what is stored: a worker may die at any moment, and any other continues from there.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from optuna import create_study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from gpt2lab.records import Importance, TrialRecord
from gpt2lab.store import now
from gpt2lab.sweep.sampling import Trial, draw, importance, pruned, trial_of

if TYPE_CHECKING:
    from gpt2lab.planning.space import SearchSettings, Space

End = Literal["finished", "pruned", "diverged", "failed", "stopped", "lost"]
STATES: dict[End, TrialState] = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,  # never the best; an infinite value would be complete to Optuna
    "failed": TrialState.FAIL,
    "stopped": TrialState.FAIL,
    "lost": TrialState.FAIL,
}
INDEX, ATTEMPT = "slot", "turn"
"""User attributes of an attempt, under the names that storages and records have had from the start."""
DONE = "done"
"""User attribute: the steps of its runs that were saved when the attempt began."""
TOKENS = "gpt2lab:tokens:{step}"
"""System attribute with the tokens of a report: Optuna keeps its step and value only."""
RUNG = "completed_rung_"
"""System attributes in which Optuna's successive halving keeps what a trial had at each rung."""
MOST_LOSSES = 4
"""A trial that was lost so often without progress has failed: what kills its processes would kill the next."""
BEAT_SECONDS = 10.0
"""Between two heartbeats of a worker; well below the grace period, of which a locked storage may take a minute."""
GRACE_SECONDS = 120.0
"""A worker elsewhere whose heartbeat has stood still for so long is taken to be gone."""


@dataclass(frozen=True, kw_only=True)
class StoredTrial(Trial):
    """A trial with its attempts so far, the first one first."""

    attempts: tuple[FrozenTrial, ...] = ()
    reason: str | None = None
    """why it diverged, failed, or was lost"""

    @classmethod
    def of(cls, index: int, attempts: Sequence[FrozenTrial]) -> StoredTrial:
        """From its attempts, in order."""
        if not attempts:
            return cls(index=index, outcome="waiting")
        last, ending = attempts[-1], ended_as(attempts[-1])
        attrs, losses = last.user_attrs, losses_of(attempts)
        reason = (attrs.get("end") or {}).get("reason")
        if ending == "lost":
            ending, reason = "waiting", str(attrs["lost"].get("why"))
            if losses >= MOST_LOSSES:
                ending, reason = "failed", f"lost {MOST_LOSSES} times, at last because {reason}"
        elif ending == "failed":
            reason = reason or "it was marked as failed from outside"
        tokens = {step: last.system_attrs.get(TOKENS.format(step=step)) for step in sorted(last.intermediate_values)}
        return cls(
            index=index,
            outcome="waiting" if ending == "stopped" else ending,
            params=last.params,
            value=last.value if ending == "finished" else None,
            curve=[(step, int(at), last.intermediate_values[step]) for step, at in tokens.items() if at is not None],
            stop_at=attrs.get("would_stop_at"),
            rungs={name: value for name, value in last.system_attrs.items() if name.startswith(RUNG)},
            attempts=tuple(attempts),
            reason=reason,
        )

    @property
    def open(self) -> bool:
        return self.outcome in ("waiting", "running")

    @property
    def next_attempt(self) -> int:
        return int(self.attempts[-1].user_attrs[ATTEMPT]) + 1 if self.attempts else 0


def ended_as(attempt: FrozenTrial) -> Any:
    """What became of an attempt: an Outcome, "stopped" or "lost". Optuna's state decides; attributes refine it."""
    outcome = (attempt.user_attrs.get("end") or {}).get("outcome")
    if attempt.state == TrialState.FAIL:
        return outcome if outcome in ("failed", "stopped") else "lost" if "lost" in attempt.user_attrs else "failed"
    if attempt.state == TrialState.PRUNED:
        return "diverged" if outcome == "diverged" else "pruned"
    return "finished" if attempt.state == TrialState.COMPLETE else attempt.state.name.lower()  # waiting, running


def losses_of(attempts: Iterable[FrozenTrial]) -> int:
    """How often a trial was lost since it last made progress: began an attempt further than every one before."""
    losses = furthest = 0
    for attempt in attempts:
        done = attempt.user_attrs.get(DONE, 0)
        if done > furthest:
            losses, furthest = 0, done
        losses += ended_as(attempt) == "lost"
    return losses


def by_index(stored: Iterable[FrozenTrial], count: int) -> dict[int, StoredTrial]:
    """Every trial below `count`, and those above that were begun when there were more. Of an attempt that is there
    twice the one with the lower number counts: whoever sees the second sees the first as well."""
    attempts: dict[int, dict[int, FrozenTrial]] = {index: {} for index in range(count)}
    for attempt in sorted(stored, key=lambda attempt: attempt.number):
        index, number = attempt.user_attrs.get(INDEX), attempt.user_attrs.get(ATTEMPT)
        if isinstance(index, int) and isinstance(number, int):  # others in the study are left alone
            attempts.setdefault(index, {}).setdefault(number, attempt)
    trials = {index: StoredTrial.of(index, [of[n] for n in sorted(of)]) for index, of in sorted(attempts.items())}
    return {index: trial for index, trial in trials.items() if index < count or trial.outcome != "waiting"}


@dataclass
class Attempt:
    """An attempt at a trial that this worker has claimed."""

    index: int
    number: int
    trial_id: int
    params: dict[str, Any]
    steps: dict[int, float] = field(default_factory=dict)
    """reported values"""
    stop_at: int | None = None
    lost: bool = False
    """whether another worker was given the trial, because this one was thought to be gone"""


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
        self._points, self._watch = len(points), Watch(grace_seconds)
        sampler, rest = settings.sampler, max(0, count - len(points))
        drawn = space.points(sampler.name, sampler.seed, rest) if sampler.name != "tpe" and rest else []
        self._fixed = [*points, *drawn]  # parameters of the first trials, which need no results of others
        self._held: dict[int, Attempt] = {}
        self._beat_at = -math.inf
        self._id = create_study(
            storage=storage, study_name=study, direction=settings.direction, load_if_exists=True
        )._study_id

    def trials(self) -> dict[int, StoredTrial]:
        """Every trial, as it is stored now."""
        return by_index(self._storage.get_all_trials(self._id, deepcopy=False), self.count)

    def unfinished(self) -> int:
        """Trials that have not ended: they wait, or a worker is at them."""
        return sum(trial.open and trial.index < self.count for trial in self.trials().values())

    def failures(self) -> int:
        """Trials that failed."""
        return sum(trial.outcome == "failed" for trial in self.trials().values())

    # Claiming, and what comes of it

    def claim(self) -> Attempt | None:
        """An attempt at the first trial that waits; None if none does."""
        while True:
            trials = self.trials()
            waiting = (trial for trial in trials.values() if trial.outcome == "waiting" and trial.index < self.count)
            trial = next(waiting, None)
            if trial is None:
                return None
            attempt = self._create(trial, self._params_of(trial, trials.values()))
            if attempt is not None:
                self._held[attempt.number] = attempt
                self.beat()
                return attempt

    def _params_of(self, trial: Trial, trials: Iterable[Trial]) -> dict[str, Any]:
        # an attempt that an earlier version enqueued may lack some
        if trial.params and all(d.name in trial.params or not self.space.active(d, trial.params)
                                for d in self.space.dimensions):  # fmt: skip
            return dict(trial.params)
        if trial.index < len(self._fixed):
            return dict(self._fixed[trial.index])
        return draw(
            self.space, self.settings.sampler, index=trial.index, trials=self.count, known=trials,
            direction=self.settings.direction,
        )  # fmt: skip

    def _create(self, trial: StoredTrial, params: dict[str, Any]) -> Attempt | None:
        """The next attempt at a trial; None where another worker was first."""
        attrs = {INDEX: trial.index, ATTEMPT: trial.next_attempt, "worker": self.worker}
        created = self._storage.create_new_trial(self._id, trial_of(self.space, TrialState.RUNNING, params, user=attrs))
        first = self.trials()[trial.index].attempts[-1]
        if first.user_attrs[ATTEMPT] == trial.next_attempt and first.user_attrs.get("worker") == self.worker:
            return Attempt(trial.index, first.number, first._trial_id, params)
        self._fail(created)
        return None

    def _fail(self, trial_id: int) -> bool:
        try:
            return bool(self._storage.set_trial_state_values(trial_id, TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False

    def note(self, attempt: Attempt, **facts: Any) -> None:
        """Keep facts about an attempt while it runs, as plain data: settings, runs, and the steps that are done."""
        try:
            for name, value in facts.items():
                self._storage.set_trial_user_attr(attempt.trial_id, name, value)
        except UpdateFinishedTrialError:
            attempt.lost = True

    def report(self, attempt: Attempt, step: int, tokens: int, value: float) -> bool:
        """Keep an intermediate value; -> whether the trial should be stopped, by this report or an earlier one, or
        because the attempt is lost. A step counts once."""
        if not attempt.lost and step not in attempt.steps:
            try:
                self._storage.set_trial_system_attr(attempt.trial_id, TOKENS.format(step=step), tokens)
                self._storage.set_trial_intermediate_value(attempt.trial_id, step, value)
                attempt.steps[step] = value
                if attempt.stop_at is None and self.settings.pruner.name != "none" and self._should_stop(attempt):
                    attempt.stop_at = step
                    self._storage.set_trial_user_attr(attempt.trial_id, "would_stop_at", step)
            except UpdateFinishedTrialError:
                attempt.lost = True
            self.beat()
        return attempt.lost or (attempt.stop_at is not None and step >= attempt.stop_at)

    def _should_stop(self, attempt: Attempt) -> bool:
        trials = self.trials()
        before = trials[attempt.index]
        if before.outcome in ("waiting", "failed") or not before.curve:  # it was just given to another worker
            return False
        stop, rungs = pruned(
            self.settings.pruner, self.space, index=attempt.index, known=trials.values(), tokens=self._tokens,
            direction=self.settings.direction, name=self._study,
        )  # fmt: skip
        for name in rungs.keys() - before.rungs.keys():
            self._storage.set_trial_system_attr(attempt.trial_id, name, rungs[name])
        return stop

    def end(
        self, attempt: Attempt, outcome: End, value: float | None = None, *, reason: str | None = None,
        step: int | None = None, **facts: Any,
    ) -> bool:  # fmt: skip
        """End an attempt; False if it was lost by then and does not count. A trial that is "stopped" or "lost" waits
        for its next attempt; a "failed" one gets none. `step`: at which it was pruned."""
        if outcome == "pruned" and attempt.steps:
            value = attempt.steps[max(attempt.steps)]
        ending = {"outcome": outcome, "reason": reason, "step": step, "facts": facts}
        name, attr = ("lost", self._loss(str(reason))) if outcome == "lost" else ("end", ending)
        try:
            self._storage.set_trial_user_attr(attempt.trial_id, name, attr)
            values = None if value is None else [value]
            accepted = bool(self._storage.set_trial_state_values(attempt.trial_id, STATES[outcome], values))
        except UpdateFinishedTrialError:  # or this worker did it, and the answer to it was lost on the way
            accepted = ended_as(self._storage.get_trial(attempt.trial_id)) == outcome
        del self._held[attempt.number]
        if not accepted:
            self._say(
                f"trial {attempt.index} had been given to another worker, because this one was thought to be gone: its "
                "result is not counted"
            )
        return accepted

    # Workers that are gone

    def beat(self) -> None:
        """Send this worker's heartbeat, if that is due. Cheap: to be called often."""
        if self._held and time.monotonic() - self._beat_at >= BEAT_SECONDS:
            self._storage.set_study_user_attr(self._id, f"beat:{self.worker}", now())
            self._beat_at = time.monotonic()

    def take_back(self) -> list[str]:
        """Mark as lost the attempts of workers that are gone; -> messages. Every worker calls it now and then."""
        self.beat()
        stored = self._storage.get_all_trials(self._id, deepcopy=False)
        trials = by_index(stored, self.count)
        running = [attempt for attempt in stored if attempt.state == TrialState.RUNNING and INDEX in attempt.user_attrs]
        others = [attempt for attempt in running if attempt.number not in self._held]
        beats = self._storage.get_study_user_attrs(self._id) if others else {}
        messages = []
        for attempt in others:
            worker, trial = attempt.user_attrs.get("worker"), trials.get(attempt.user_attrs[INDEX])
            if worker not in (None, self.worker) and not self._watch.gone(worker, beats.get(f"beat:{worker}")):
                continue
            why = f"its worker {shown(worker)} is gone" if worker else "its worker is gone"
            try:
                self._storage.set_trial_user_attr(attempt._trial_id, "lost", self._loss(why))
            except UpdateFinishedTrialError:  # another worker was first, or the one that was missed is back
                continue
            if self._fail(attempt._trial_id) and trial is not None and attempt in trial.attempts:
                messages.append(f"trial {trial.index} was lost: {why}; {self.fate(trial.index)}")
        for trial in trials.values():  # earlier versions enqueued attempts; what has a later one waits no longer
            for attempt in trial.attempts[:-1]:
                if attempt.state == TrialState.WAITING:
                    self._fail(attempt._trial_id)
        return messages

    def _loss(self, why: str) -> dict[str, str]:
        return {"why": why, "by": self.worker, "at": now()}

    def fate(self, index: int) -> str:
        """What becomes of a trial whose attempt was lost, in words."""
        return "it has failed" if self.trials()[index].outcome == "failed" else "it is tried again"

    # What came of it all

    def importance(self) -> Importance | None:
        """How much each dimension mattered; None where too few trials were finished."""
        return importance(self.space, self.trials().values(), self.settings.direction)

    def records(self) -> list[TrialRecord]:
        """Every trial, as the record of the sweep has it."""
        return [self._record(trial) for trial in self.trials().values()]

    def _record(self, trial: StoredTrial) -> TrialRecord:
        last, index = trial.attempts[-1] if trial.attempts else None, trial.index
        attrs = last.user_attrs if last else {}
        end = attrs.get("end") or {}
        facts = attrs | end.get("facts", {})
        params = trial.params or (self._fixed[index] if index < len(self._fixed) else {})
        return TrialRecord(
            index=index,
            number=last.number if last else None,
            outcome=trial.outcome,
            reason=trial.reason,
            settings=attrs.get("settings") or self.space.settings(params),
            value=trial.value,
            **{name: facts[name] for name in ("values", "runs", "tokens", "found") if name in facts},
            curve=list(trial.curve),
            stopped_at=end.get("step") if trial.outcome == "pruned" else None,
            enqueued=index < self._points,
            retries=sum(ended_as(attempt) == "lost" for attempt in trial.attempts[:-1]),
            worker=shown(attrs["worker"]) if "worker" in attrs else None,
            started=iso(last.datetime_start) if last else None,
            ended=iso(last.datetime_complete) if last and not trial.open else None,
        )


def iso(when: datetime | None) -> str | None:
    """A time of Optuna's, which is local without a zone, as records hold it."""
    return None if when is None else when.astimezone(UTC).isoformat(timespec="seconds")


# Which workers live


def this_host() -> str:
    """Host, boot and space of process ids: where a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")  # containers of one machine share its boot
    except OSError:
        boot, space = str(int(psutil.boot_time())), "0"
    return f"{socket.gethostname().replace(':', '_')}:{boot}-{space}"


def worker_id(pid: int | None = None) -> str:
    """`host:boot:pid:start` of a process of this machine, of this one unless given."""
    pid = os.getpid() if pid is None else pid
    return f"{this_host()}:{pid}:{started(pid)}"


def shown(worker: str) -> str:
    """A worker as people read it: `host:pid`."""
    parts = worker.split(":")
    return f"{parts[0]}:{parts[2]}" if len(parts) == 4 else worker


def started(pid: int) -> int | None:
    """When a process started, in units of its system; None when it has ended. Ids are used again; with the start they
    name one process."""
    try:
        if sys.platform == "linux":  # psutil's times move when the clock is set
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if fields[0] in "ZX" else int(fields[19])
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(100 * process.create_time())
    except (OSError, psutil.NoSuchProcess):
        return None


class Watch:
    """Which other workers are gone: known at once on this machine, by a silent heartbeat elsewhere. A heartbeat is
    compared with what it was, by the clock of this machine: clocks of others may be wrong."""

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self._host = this_host()
        self._seen: dict[str, tuple[object, float]] = {}

    def gone(self, worker: str, beat: object) -> bool:
        """Whether a worker is gone. `beat`: its heartbeat, anything that changes."""
        host, _, process = worker.rpartition(":")
        host, _, pid = host.rpartition(":")
        if host == self._host and pid.isdigit():
            return str(started(int(pid))) != process
        before, since = self._seen.setdefault(worker, (beat, time.monotonic()))
        if before != beat:
            self._seen[worker] = (beat, time.monotonic())
            return False
        return time.monotonic() - since >= self.grace_seconds
