"""Jobs side by side on this machine: one worker process for each, over its cores and GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from gpt2lab.basics.forks import LOST, Forked, ForkServer, wait_readable
from gpt2lab.errors import EnvironmentFault
from gpt2lab.executors import Ending, ending_of, worker_command, worker_environment
from gpt2lab.runner import Job

SERVERS = 2
"""As many fork servers may be killed before every job gets a new Python."""

POLL_SECONDS = 0.01


class Process(Protocol):
    """A worker's process; `poll` and `wait` return its exit code, negative for a signal."""

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...


Start = Callable[[Job, Mapping[str, str], IO[str]], Process]


@dataclass
class Worker:
    """A process at work on a job, in one of the executor's places."""

    job: Job
    place: int
    process: Process
    cancelled: bool = False


@dataclass
class LocalExecutor:
    """Worker processes on this machine, at most `capacity` at a time, over `gpus` GPUs where there are any.

    fork: whether workers are forks of a process that has imported torch, and so start at once; elsewhere than on Linux
    torch's libraries do not bear that.
    """

    capacity: int
    gpus: int = 0
    fork: bool = sys.platform == "linux"
    _workers: dict[str, Worker] = field(default_factory=dict, init=False)
    _server: ForkServer = field(default_factory=ForkServer, init=False)

    @property
    def label(self) -> str:
        return f"{self.capacity} process{'es' if self.capacity > 1 else ''} on this machine"

    def submit(self, job: Job) -> None:
        taken = {worker.place for worker in self._workers.values()}
        place = next(place for place in range(self.capacity) if place not in taken)
        gpu = {"CUDA_VISIBLE_DEVICES": visible_gpu(place % self.gpus)} if self.gpus else {}
        process = started(self._server.start if self.fork else start_process, job, **gpu)
        self._workers[job.run_id] = Worker(job, place, process)

    def poll(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while True:
            ended = [run_id for run_id, worker in self._workers.items() if worker.process.poll() is not None]
            left = deadline - time.monotonic()
            if ended or left <= 0:
                return ended
            pipes = [worker.process.pipe for worker in self._workers.values() if isinstance(worker.process, Forked)]
            wait_readable(pipes, left if len(pipes) == len(self._workers) else min(left, POLL_SECONDS))

    def cancel(self, run_id: str) -> None:
        self._workers[run_id].cancelled = True
        self._workers[run_id].process.send_signal(signal.SIGTERM)

    def collect(self, run_id: str) -> Ending:
        worker = self._workers.pop(run_id)
        code = worker.process.wait()
        if code != LOST:
            return ending_of(code, worker.job, cancelled=worker.cancelled)
        again = "it is saved" if worker.cancelled else "it is started again"
        with (worker.job.folder / "run.log").open("a") as log:
            log.write(f"the process that starts workers ended ({self._server.ending()}); {again}\n")
        self.fork = self.fork and self._server.launched < SERVERS
        return "lost"

    def close(self) -> None:
        for run_id in self._workers:
            self.cancel(run_id)
        for worker in self._workers.values():
            worker.process.wait()
        self._workers.clear()
        self._server.close()

    def kill(self) -> None:
        for worker in self._workers.values():
            worker.process.send_signal(signal.SIGKILL)
        self._server.kill()


def started(start: Start, job: Job, **environment: str) -> Process:
    """A worker for `job`, by `start`, with its environment and its log. Raises EnvironmentFault."""
    return start_within(start, job, {**worker_environment(job), **environment}, job.folder / "run.log")


def start_within(start: Start, job: Job, environment: Mapping[str, str], log: Path) -> Process:
    """A worker by `start` that prints into the file `log`. Raises EnvironmentFault."""
    try:
        with log.open("a") as file:
            return start(job, environment, file)
    except OSError as error:
        what = f"no process can be started: {error.strerror or error}"
        raise EnvironmentFault(what, where=job.run_id, hint="fewer --jobs or --nproc; `gpt2lab doctor`") from error


def start_process(job: Job, environment: Mapping[str, str], log: IO[str]) -> subprocess.Popen[bytes]:
    """A worker that is a new Python, in a session of its own, so that Ctrl-C reaches it only through the executor."""
    return subprocess.Popen(
        worker_command(job),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )


def visible_gpu(index: int) -> str:
    """The name of the index-th GPU among those that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index] if named else str(index)
