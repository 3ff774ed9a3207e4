"""Submits jobs to an executor as it has room, and stops them.

A job that fails does not affect the others. When this process gets a stop signal, every job finishes its step, saves
and ends; unless the executor says by a text `outlives` that its jobs go on without this process, and how to end them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gpt2lab.basics.signals import STOP_SIGNALS, print_ended
from gpt2lab.errors import Preempted
from gpt2lab.executors import Ending, Executor, record_loss
from gpt2lab.runner import Job
from gpt2lab.store import Store

TICK_SECONDS = 0.2
LOCKED_PAUSE_SECONDS = 2.0
MOST_LOSSES = 3
"""How often in a row a job may be lost without progress before it counts as failed."""

FORCED = 130
"""Exit code after a second Ctrl-C."""


@dataclass
class Waiting:
    """A job that is not submitted: not before this moment (of time.monotonic), and not at all once it is cancelled."""

    job: Job
    not_before: float = 0.0
    cancelled: bool = False


@dataclass
class Scheduler:
    """Runs jobs on an executor, as a rule in the order in which they come.

    on_tick: called several times a second while jobs run. is_done: whether a run is finished by now, called before its
    job is submitted, because another process may work on the same study. shared: whether jobs come from the store, for
    any number of processes: their job.json is there already, and a run that another process holds is not waited for
    but ends as "locked". most: jobs at a time, where the executor would take more.
    """

    executor: Executor
    on_tick: Callable[[], None] = lambda: None
    is_done: Callable[[str], bool] = lambda run_id: False
    shared: bool = False
    most: int | None = None
    _stop: bool = field(default=False, init=False)
    _ready: list[str] = field(default_factory=list, init=False)
    _waiting: deque[Waiting] = field(default_factory=deque, init=False)
    _working: dict[str, Job] = field(default_factory=dict, init=False)
    _cancelled: set[str] = field(default_factory=set, init=False)
    _losses: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)
    """run id -> (how often it was lost without progress, its furthest checkpoint)"""
    _endings: dict[str, Ending] = field(default_factory=dict, init=False)
    _ended: Callable[[str, Ending], None] | None = field(default=None, init=False)

    def run(self, jobs: Iterable[Job | None], ended: Callable[[str, Ending], None] | None = None) -> dict[str, Ending]:
        """Execute all jobs; run id -> how it ended. A run that another process or job works on is waited for.

        jobs: a sequence; or an iterator, from which a job is taken when there is room that no waiting job will take.
        None from it means that there is none now, and the next is taken at the next tick. ended: called with each job
        that has ended, before another is taken; not for jobs that never began because of a stop.

        Raises Preempted after a stop signal, when every job has saved and ended.
        """
        listed = isinstance(jobs, Sequence)
        self._waiting = deque(Waiting(job) for job in jobs if job) if listed else deque()
        self._endings, self._ended = {}, ended
        source, more = iter(jobs), not listed
        with self._signals():
            try:
                while more or self._waiting or self._working:
                    self._collect()
                    if self._stop:
                        if self._outlives:
                            break
                        self._cancel_all()
                        if not self._working:
                            break
                    self._submit()
                    more = more and self._pull(source)
                    self.on_tick()
                    self._ready = self.executor.poll(TICK_SECONDS)
            finally:
                if not (self._stop and self._outlives):
                    self.executor.close()
                self._working.clear()
        if self._stop and self._outlives:
            raise Preempted(self._outlives, hint="the same command follows them again")
        if self._stop:
            not_begun = f", {len(self._waiting)} not begun" if listed else ""
            raise Preempted(
                f"stopped: {len(self._endings)} runs ended or saved{not_begun}; nothing is lost",
                hint="the same command continues",
            )
        return self._endings

    @property
    def _room(self) -> int:
        """How many jobs may be submitted and not collected."""
        return min(self.executor.capacity, self.most or self.executor.capacity)

    @property
    def _outlives(self) -> str:
        return str(getattr(self.executor, "outlives", ""))

    def stop(self) -> None:
        """Let every run finish its step and save, and begin no other; `run` then raises Preempted. For any thread."""
        self._stop = True

    def cancel(self, run_id: str) -> None:
        """Let this run alone finish its step, save and end, as "preempted"; one that is over by then ends as it would
        have. Jobs that wait for a run which is not at work here are dropped, as "preempted". For the thread that `run`
        is in: from on_tick, ended, or jobs."""
        if run_id in self._working:
            self._cancel(run_id)
        else:
            for waiting in self._waiting:
                waiting.cancelled |= waiting.job.run_id == run_id

    def _over(self, job: Job, ending: Ending) -> None:
        self._endings[job.run_id] = ending
        if self._ended:
            self._ended(job.run_id, ending)

    def _collect(self) -> None:
        """Account for the jobs that have ended."""
        for run_id in self._ready:
            job, ending = self._working.pop(run_id), self.executor.collect(run_id)
            cancelled = self._stop or run_id in self._cancelled
            self._cancelled.discard(run_id)
            if ending == "lost":
                self._lost(job, cancelled)
            elif ending == "locked" and not self.shared:
                self._waiting.append(Waiting(job, time.monotonic() + LOCKED_PAUSE_SECONDS))
            else:
                self._over(job, ending)
        self._ready = []

    def _lost(self, job: Job, cancelled: bool) -> None:
        """Submit a lost job again, unless it was cancelled, had finished, or was lost too often without progress."""
        folder = Store(job.root).run(job.run_id)
        losses, furthest = self._losses.get(job.run_id, (0, 0))
        step = folder.saved_step()
        losses = 1 if step > furthest else losses + 1
        self._losses[job.run_id] = losses, max(step, furthest)
        if self.is_done(job.run_id):
            self._over(job, "done")
        elif cancelled:
            self._over(job, "preempted")
        elif losses <= MOST_LOSSES:
            self._waiting.appendleft(Waiting(job))
        else:
            record_loss(folder, f"its worker was lost {losses} times; see {folder.path / 'run.log'}")
            self._over(job, "failed")

    def _pull(self, source: Iterator[Job | None]) -> bool:
        """Take jobs while there is room that no waiting one will take; -> whether there may be more."""
        while not self._stop and len(self._working) + len(self._waiting) < self._room:
            try:
                job = next(source)
            except StopIteration:
                return False
            if job is None:
                break
            self._waiting.append(Waiting(job))
            self._submit()
        return True

    def _submit(self) -> None:
        """Submit jobs while there is room; account for those that another process has finished meanwhile."""
        for _ in range(len(self._waiting)):
            if self._stop or len(self._working) >= self._room:
                break
            waiting = self._waiting.popleft()
            job, run_id = waiting.job, waiting.job.run_id
            if waiting.cancelled:
                self._over(job, "preempted")
            elif time.monotonic() < waiting.not_before or run_id in self._working:
                self._waiting.append(waiting)
            elif Store(job.root).run(run_id).status() == "running":  # a worker takes longer to find that out
                if self.shared:
                    self._over(job, "locked")
                    continue
                self._waiting.append(Waiting(job, time.monotonic() + LOCKED_PAUSE_SECONDS))
            elif self.is_done(run_id):
                self._over(job, "found")
            else:
                if not self.shared:
                    job.write()
                self.executor.submit(job)
                self._working[run_id] = job

    def _cancel(self, run_id: str) -> None:
        if run_id not in self._cancelled:
            self._cancelled.add(run_id)
            self.executor.cancel(run_id)

    def _cancel_all(self) -> None:
        """Cancel all jobs that are not cancelled yet."""
        if self._working.keys() - self._cancelled:
            text = "stopping: every run finishes its step and saves; Ctrl-C once more ends them at once"
            with contextlib.suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
                print(f"\n{text}", file=sys.stderr, flush=True)
        for run_id in self._working:
            self._cancel(run_id)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Take over the signals that stop a command; Python lets the main thread alone do that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_stop) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_stop(self, number: int, frame: object) -> None:
        """Let the loop cancel every job. A second Ctrl-C ends them at once; clusters send other signals twice."""
        if self._stop and number == signal.SIGINT:
            if not self._outlives:
                self.executor.kill()
                print_ended()
            os._exit(FORCED)
        self._stop = True
