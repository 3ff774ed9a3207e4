"""Runs side by side on this machine: one worker process per run, over cores and GPUs.

A worker that fails takes nobody with it. When this process is told to stop, workers finish their step, save and end;
when it is killed, the kernel tells them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from gpt2lab.errors import LockHeld, Preempted
from gpt2lab.executors.warm import LOST, Forked, Server, wait_readable
from gpt2lab.runner import NOTHING_LEFT, PARENT, Job
from gpt2lab.store import Store

TICK_SECONDS = 0.2
LOCKED_PAUSE_SECONDS = 2.0
SERVERS = 2
"""As many servers may be killed before every run gets a process from scratch."""

FORCED = 130
Process = Forked | subprocess.Popen[str]
Start = Callable[[Job, Mapping[str, str], IO[str]], Process]
Over = Callable[[Job, "Ending"], None]
Ending = Literal["done", "failed", "preempted", "locked", "found"]
"""How a job ended: trained now, failed, stopped, held by another process, or finished by another one meanwhile. What is
held is waited for, so no caller sees that."""

ENDINGS: dict[int, Ending] = {
    0: "done",
    NOTHING_LEFT: "found",
    Preempted.exit_code: "preempted",
    LockHeld.exit_code: "locked",
}


@dataclass
class Worker:
    """A process at work on a job, in one of the executor's places."""

    job: Job
    place: int
    process: Process
    told: bool = False
    """to stop"""


@dataclass
class Waiting:
    """A job that has no worker: not before this moment (of time.monotonic), and not at all once it is unwanted."""

    job: Job
    not_before: float = 0.0
    unwanted: bool = False


@dataclass
class LocalExecutor:
    """Runs jobs, at most `places` at a time, as a rule in the order in which they come.

    on_tick: called several times a second while jobs run. gpus: how many there are to share. is_done: whether a run is
    finished by now, asked before its worker is started, because another process may be at the same study. warm: whether
    workers are forks of a process that has imported torch; elsewhere than on Linux its libraries do not bear that.
    """

    places: int
    on_tick: Callable[[], None]
    gpus: int = 0
    is_done: Callable[[str], bool] = lambda run_id: False
    warm: bool = sys.platform == "linux"
    _stop: bool = field(default=False, init=False)
    _waiting: deque[Waiting] = field(default_factory=deque, init=False)
    _workers: list[Worker] = field(default_factory=list, init=False)
    _server: Server = field(default_factory=Server, init=False)

    def run(self, jobs: Iterable[Job | None], ended: Callable[[str, Ending], None] | None = None) -> dict[str, Ending]:
        """Execute all jobs; run id -> how it ended. A run that another process or job is at is waited for.

        jobs: a sequence; or an iterator, which is asked for a job when a place is free that no waiting job will take.
        It may answer None: there is none at this moment, and it is asked again at the next tick. ended: called with
        each job that has ended, before another is asked for; not for jobs that never began because of a stop.

        Raises Preempted after a stop signal, when every worker has saved and ended.
        """
        listed = isinstance(jobs, Sequence)
        self._waiting = deque(Waiting(job) for job in jobs if job) if listed else deque()
        source, more, endings = iter(jobs), not listed, dict[str, Ending]()

        def over(job: Job, ending: Ending) -> None:
            endings[job.run_id] = ending
            if ended:
                ended(job.run_id, ending)

        with self._signals():
            try:
                while more or self._waiting or self._workers:
                    self._collect(over)
                    if self._stop:
                        self._tell_workers()
                        if not self._workers:
                            break
                    self._fill(over)
                    more = more and self._pull(source, over)
                    self.on_tick()
                    self._pause()
            finally:
                self._end_workers()
        if self._stop:
            not_begun = f", {len(self._waiting)} not begun" if listed else ""
            raise Preempted(
                f"stopped: {len(endings)} runs ended or saved{not_begun}; nothing is lost",
                hint="the same command continues",
            )
        return endings

    def stop(self) -> None:
        """Let every run finish its step and save, and begin no other; `run` then raises Preempted. For any thread."""
        self._stop = True

    def end(self, run_id: str) -> None:
        """Let this run alone finish its step, save and end, as "preempted"; one that is over by then ends as it would
        have. Where nobody here is at the run, the jobs that wait for it are dropped, as "preempted". For the thread
        that `run` is in: from on_tick, ended, or jobs."""
        at_work = [worker for worker in self._workers if worker.job.run_id == run_id]
        for worker in at_work:
            self._tell(worker)
        if not at_work:
            for one in self._waiting:
                one.unwanted |= one.job.run_id == run_id

    def _collect(self, over: Over) -> None:
        """Account for the workers that have ended."""
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._workers.remove(worker)
            ending = self._ending(worker)
            if ending is None:
                self._waiting.appendleft(Waiting(worker.job))
            elif ending == "locked":
                self._waiting.append(Waiting(worker.job, time.monotonic() + LOCKED_PAUSE_SECONDS))
            else:
                over(worker.job, ending)

    def _pull(self, source: Iterator[Job | None], over: Over) -> bool:
        """Ask for jobs while a place is free that no waiting one will take; -> whether there may be more."""
        while not self._stop and len(self._workers) + len(self._waiting) < self.places:
            try:
                job = next(source)
            except StopIteration:
                return False
            if job is None:
                break
            self._waiting.append(Waiting(job))
            self._fill(over)
        return True

    def _fill(self, over: Over) -> None:
        """Start jobs while there are free places; account for those that another process has finished meanwhile."""
        for _ in range(len(self._waiting)):
            if self._stop or len(self._workers) >= self.places:
                break
            one = self._waiting.popleft()
            job, run_id = one.job, one.job.run_id
            if one.unwanted:
                over(job, "preempted")
            elif time.monotonic() < one.not_before or run_id in {worker.job.run_id for worker in self._workers}:
                self._waiting.append(one)
            elif Store(job.root).run(run_id).status() == "running":  # a worker takes longer to find that out
                self._waiting.append(Waiting(job, time.monotonic() + LOCKED_PAUSE_SECONDS))
            elif self.is_done(run_id):
                over(job, "found")
            else:
                taken = {worker.place for worker in self._workers}
                place = next(p for p in range(self.places) if p not in taken)
                self._workers.append(Worker(job, place, self._start(job, place)))

    def _start(self, job: Job, place: int) -> Process:
        """A worker process with its own session, so that Ctrl-C reaches it only through us."""
        gpu = {"CUDA_VISIBLE_DEVICES": visible_gpu(place % self.gpus)} if self.gpus else {}
        return started(self._server.start if self.warm else start_cold, job, **gpu)

    def _ending(self, worker: Worker) -> Ending | None:
        """How a worker ended, which the record of a failed run says too; None when its job is to be done again."""
        code = worker.process.returncode
        assert code is not None
        folder = Store(worker.job.root).run(worker.job.run_id)
        log = folder.path / "run.log"
        if code == LOST:
            if self.is_done(worker.job.run_id):
                return "done"
            again = "it is saved" if self._stop or worker.told else "it is started again"
            with log.open("a") as file:
                file.write(f"the process that starts workers ended ({self._server.last_words()}); {again}\n")
            self.warm = self.warm and self._server.launched < SERVERS
            return "preempted" if self._stop or worker.told else None
        ending = ENDINGS.get(code, "failed")
        if worker.told and (ending == "locked" or code == -signal.SIGTERM):  # told before it could begin or listen
            return "preempted"
        if ending == "failed" and folder.failure() is None and folder.result() is None:  # it could not say so itself
            rows = folder.rows()
            cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            step = rows[-1]["step"] if rows else 0
            folder.fail(
                {"reason": f"{cause}{hint}; see {log}", "phase": "worker", "step": step, "at": time.strftime("%FT%T")}
            )
        return ending

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Take over the signals that stop a command; Python lets the main thread alone do that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_stop(self, number: int, frame: object) -> None:
        """First signal: let the loop tell everybody. Second: end at once; checkpoints stay whole whatever is
        interrupted."""
        if self._stop:
            for worker in self._workers:
                worker.process.send_signal(signal.SIGKILL)
            self._server.kill()
            os._exit(FORCED)
        self._stop = True

    def _tell_workers(self) -> None:
        """Ask those to stop that were not asked yet."""
        untold = [worker for worker in self._workers if not worker.told]
        for worker in untold:
            self._tell(worker)
        if untold:
            print(
                "\nstopping: every run finishes its step and saves; once more to end at once",
                file=sys.stderr,
                flush=True,
            )

    def _tell(self, worker: Worker) -> None:
        """Ask it to save and end, once."""
        if not worker.told:
            worker.process.send_signal(signal.SIGTERM)
            worker.told = True

    def _pause(self) -> None:
        """Until a worker ends, at most for a tick."""
        wait_readable([w.process.pipe for w in self._workers if isinstance(w.process, Forked)], TICK_SECONDS)

    def _end_workers(self) -> None:
        """Whatever ends this executor, no worker outlives it."""
        for worker in self._workers:
            worker.process.send_signal(signal.SIGTERM)
        for worker in self._workers:
            worker.process.wait()
        self._workers.clear()
        self._server.close()


def started(start: Start, job: Job, **environment: str) -> Process:
    """A worker for `job`, started in this way or that, with its number of threads and its log."""
    folder = Path(job.root) / job.run_id
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(job.threads)
    everything = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **environment}
    with (folder / "run.log").open("a") as log:
        return start(job, everything, log)


def start_cold(job: Job, environment: Mapping[str, str], log: IO[str]) -> subprocess.Popen[str]:
    """A worker that is a Python of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2lab.runner"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, PARENT: str(os.getpid())},
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(job.to_json())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; its exit code and log say why
    return process


def visible_gpu(index: int) -> str:
    """The name of the index-th GPU among those that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index] if named else str(index)
