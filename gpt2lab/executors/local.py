"""Runs side by side on this machine: one worker process per run, over cores and GPUs.

A worker that fails takes nobody with it. When this process is told to stop, workers finish their step, save and end;
when it is killed, the kernel tells them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt2lab.errors import LockHeld, Preempted
from gpt2lab.runner import NOTHING_LEFT, PARENT, Job
from gpt2lab.store import Store

TICK_SECONDS = 0.2
LOCKED_PAUSE_SECONDS = 2.0
Ending = Literal["done", "failed", "preempted", "locked", "found"]
"""How a job ended: trained now, failed, stopped, held by another process, or finished by another one meanwhile."""

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
    process: subprocess.Popen[str]


@dataclass
class LocalExecutor:
    """Runs jobs, at most `places` at a time.

    on_tick: called several times a second while jobs run. gpus: how many there are to share. is_done: whether a run is
    finished by now, asked before its worker is started, because another process may be at the same study.
    """

    places: int
    on_tick: Callable[[], None]
    gpus: int = 0
    is_done: Callable[[str], bool] = lambda run_id: False
    _stop: bool = field(default=False, init=False)
    _workers: list[Worker] = field(default_factory=list, init=False)

    def run(self, jobs: Sequence[Job]) -> dict[str, Ending]:
        """Execute all jobs; run id -> how it ended. A run that another process holds is waited for.

        Raises Preempted after a stop signal, when every worker has saved and ended.
        """
        waiting, endings = deque(jobs), dict[str, Ending]()
        not_before: dict[str, float] = {}
        before = {number: signal.signal(number, self._on_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while waiting or self._workers:
                for worker in [w for w in self._workers if w.process.poll() is not None]:
                    self._workers.remove(worker)
                    ending = ENDINGS.get(worker.process.returncode, "failed")
                    if ending == "locked" and not self._stop:
                        waiting.append(worker.job)
                        not_before[worker.job.run_id] = time.monotonic() + LOCKED_PAUSE_SECONDS
                    else:
                        self._account(worker, ending)
                        endings[worker.job.run_id] = ending
                if self._stop and not self._workers:
                    break
                endings |= self._fill(waiting, not_before)
                self.on_tick()
                time.sleep(TICK_SECONDS)
        finally:
            self._end_workers()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stop:
            raise Preempted(
                f"stopped: {len(endings)} runs ended or saved, {len(waiting)} not begun; nothing is lost",
                hint="the same command continues",
            )
        return endings

    def _fill(self, waiting: deque[Job], not_before: dict[str, float]) -> dict[str, Ending]:
        """Start jobs while there are free places; -> those that another process has finished meanwhile."""
        found: dict[str, Ending] = {}
        for _ in range(len(waiting)):
            if self._stop or len(self._workers) >= self.places:
                break
            job = waiting.popleft()
            if time.monotonic() < not_before.get(job.run_id, 0.0):
                waiting.append(job)
            elif Store(job.root).run(job.run_id).status() == "running":  # a worker takes seconds to find that out
                not_before[job.run_id] = time.monotonic() + LOCKED_PAUSE_SECONDS
                waiting.append(job)
            elif self.is_done(job.run_id):
                found[job.run_id] = "found"
            else:
                taken = {worker.place for worker in self._workers}
                place = next(p for p in range(self.places) if p not in taken)
                self._workers.append(Worker(job, place, self._start(job, place)))
        return found

    def _start(self, job: Job, place: int) -> subprocess.Popen[str]:
        """A worker process with its own session, so that Ctrl-C reaches it only through us."""
        folder = Path(job.root) / job.run_id
        folder.mkdir(parents=True, exist_ok=True)
        threads = str(job.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment[PARENT] = str(os.getpid())
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = visible_gpu(place % self.gpus)
        with (folder / "run.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpt2lab.runner"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(job.to_json())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; its exit code and log say why
        return process

    def _account(self, worker: Worker, ending: Ending) -> None:
        """A worker that was killed could not say so itself."""
        code = worker.process.returncode
        folder = Store(worker.job.root).run(worker.job.run_id)
        if ending == "failed" and folder.failure() is None and folder.result() is None:
            rows = folder.rows()
            cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            log = f"see {folder.path / 'run.log'}"
            step = rows[-1]["step"] if rows else 0
            folder.fail(
                {"reason": f"{cause}{hint}; {log}", "phase": "worker", "step": step, "at": time.strftime("%FT%T")}
            )

    def _on_stop(self, number: int, frame: object) -> None:
        """First signal: pass it on and wait. Second: end at once; checkpoints stay whole whatever is interrupted."""
        if self._stop:
            self._end_workers(signal.SIGKILL)
            os._exit(130)
        self._stop = True
        print(
            "\nstopping: every run finishes its step and saves; once more to end at once", file=sys.stderr, flush=True
        )
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    def _end_workers(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Whatever ends this executor, no worker outlives it."""
        self._signal(number)
        for worker in self._workers:
            worker.process.wait()
        self._workers.clear()


def visible_gpu(index: int) -> str:
    """The name of the index-th GPU among those that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index] if named else str(index)
