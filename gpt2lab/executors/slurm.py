"""Runs on a Slurm cluster: identical workers as one job array, which take the submitted runs from the store.

What happens is read from the store and from squeue, so no accounting is needed. The workers of a study share a job
name, by which the same command finds them again; nothing else is ever cancelled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gpt2lab.errors import DataFault, EnvironmentFault, Preempted
from gpt2lab.executors import Ending, has_finished
from gpt2lab.executors.submitted import IMPORTS, copy_of_code, environment_of, with_copy
from gpt2lab.runner import Job
from gpt2lab.store import Store, make_folder

LOOK_SECONDS, QUEUE_SECONDS = 0.5, 5.0
"""Between two looks into the store, and between two calls of squeue."""
SETTLED_SECONDS = 4.0
"""For which a reason to wait must stand: until its scheduler has come to a job, Slurm gives a preliminary one."""
ORDINARY = {"None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit", "Prolog", ""}
"""Reasons to wait that end by themselves."""
NOTHING_LEFT = "nothing else is left to do"
"""In the last words of a worker that could begin; its exit code is 1 where runs failed."""
ENDED = re.compile(r"worker ended: exit code (\d+).*")
SCRIPT = """#!/bin/bash
trap 'signal=USR1 caught=1; kill -USR1 $worker' USR1
trap 'signal=TERM caught=1; kill -TERM $worker' TERM
{command} &
worker=$!
until caught=; wait $worker; code=$?; [ -z "$caught" ]; do true; done
echo "worker ended: exit code $code $signal"
if [ "$signal" = USR1 ] && [ $code -ge {saved} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


class QueueLine(NamedTuple):
    """A line of squeue. array: the id that the workers of one sbatch share."""

    array: str
    state: str
    reason: str


@dataclass
class SlurmExecutor:
    """Runs by `workers` Slurm jobs, each with `jobs` runs at a time, or one that `ranks` processes share. name: of the
    study. options: of sbatch, as "--partition=gpu". say: takes each message for the user, once."""

    name: str
    workers: int = 1
    options: Sequence[str] = ()
    jobs: int | None = None
    ranks: int = 1
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
    capacity: int = field(default=10**6, init=False)
    _jobs: dict[str, Job] = field(default_factory=dict, init=False)
    _cancelled: set[str] = field(default_factory=set, init=False)
    _given: set[str] = field(default_factory=set, init=False)
    """runs that the workers of the newest array have"""
    _endings: dict[str, Ending] = field(default_factory=dict, init=False)
    _array: str = field(default="", init=False)
    _queue: list[QueueLine] = field(default_factory=list, init=False)
    _reasons: dict[str, float] = field(default_factory=dict, init=False)
    """why workers wait -> since when"""
    _looked: float = field(default=float("-inf"), init=False)
    _root: Path = field(default=Path(), init=False)

    def __post_init__(self) -> None:
        self._say_once = cache(self.say)

    @property
    def label(self) -> str:
        return f"{self.workers} worker{'s' if self.workers > 1 else ''} in Slurm"

    @property
    def job_name(self) -> str:
        """What the workers of this study in this store are called in Slurm."""
        return f"gpt2lab-{self.name}-{hashlib.sha256(str(self._root).encode()).hexdigest()[:8]}"

    @property
    def outlives(self) -> str:
        """What goes on when the scheduler's process is stopped."""
        command = shlex.join(["scancel", "--me", f"--name={self.job_name}"])
        return f"the workers go on in Slurm; {command} saves and ends them"

    def submit(self, job: Job) -> None:
        self._root = Path(job.root)
        self._jobs[job.run_id] = job
        self._cancelled.discard(job.run_id)
        self._given.discard(job.run_id)
        if has_finished(job):
            self._endings[job.run_id] = "found"
        else:
            with_copy(job).write()  # newer than a failure, and so to be tried again

    def poll(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while True:
            self._look()
            left = deadline - time.monotonic()
            if self._endings or left <= 0:
                return list(self._endings)
            time.sleep(min(left, LOOK_SECONDS))

    def cancel(self, run_id: str) -> None:
        self._cancelled.add(run_id)
        self._jobs[run_id].path.unlink(missing_ok=True)  # which its worker heeds

    def collect(self, run_id: str) -> Ending:
        del self._jobs[run_id]
        return self._endings.pop(run_id)

    def close(self) -> None:
        if self._root != Path():
            self._scancel()
            while self._read_queue():
                time.sleep(LOOK_SECONDS)
        self._jobs.clear()
        self._endings.clear()
        self._given.clear()

    def kill(self) -> None:
        self._scancel("--signal=KILL", "--full")

    def _look(self) -> None:
        """Bring the endings up to date; submit workers where runs have none."""
        for run_id, job in self._jobs.items():
            if run_id not in self._endings and (ending := self._ending(job)):
                self._endings[run_id] = ending
        unended = [run_id for run_id in self._jobs if run_id not in self._endings]
        if not unended or time.monotonic() < self._looked + QUEUE_SECONDS:
            return
        self._looked = time.monotonic()
        queue = self._read_queue()
        todo = [run_id for run_id in unended if run_id not in self._cancelled]
        if set(todo) - self._given:
            self._start(todo, [worker for worker in queue if worker.state != "COMPLETING"])
        elif not queue and todo:
            self._refuse_ended()
            for run_id in todo:  # some may have ended since they were looked at
                is_running = Store(self._root).run(run_id).status() == "running"
                self._endings[run_id] = self._ending(self._jobs[run_id]) or ("locked" if is_running else "lost")

    def _ending(self, job: Job) -> Ending | None:
        """How a run has ended, as far as the store knows."""
        folder = Store(job.root).run(job.run_id)
        try:
            if (folder.path / "result.json").exists() and has_finished(job):
                return "done"
            if job.run_id in self._cancelled:
                return None if folder.status() == "running" else "preempted"
            return "failed" if job.has_failed() else None
        except DataFault:
            return "failed"

    def _start(self, run_ids: list[str], alive: list[QueueLine]) -> None:
        """Submit the workers that are missing, for these runs; or take over those of an earlier call."""
        first = self._jobs[run_ids[0]]
        is_cpu = first.identity.get("device") == "cpu"
        side_by_side = self.jobs or (1 if is_cpu or self.ranks > 1 else None)
        count = min(self.workers, -(-len(run_ids) // (side_by_side or 1))) - len(alive)
        if count <= 0:
            if not self._array:
                self._array, self._given = alive[0].array, set(run_ids)
            return
        make_folder(self._root / "slurm")
        worker = [sys.executable, "-m", "gpt2lab", "work", "--runs", str(self._root)]
        shared = ["--nproc", str(self.ranks)] if self.ranks > 1 else []
        worker += [*(shared or (["--jobs", str(side_by_side)] if side_by_side else [])), *run_ids]
        variables = environment_of(copy_of_code(self._root, first.plugins))
        imports = [f"{name}={variables[name]}" for name in IMPORTS]
        script = SCRIPT.format(command=shlex.join(["env", *imports, *worker]), saved=Preempted.exit_code)
        cores = [f"--cpus-per-task={(side_by_side or 1) * self.ranks * first.threads}"] if is_cpu else []
        words = ["sbatch", "--parsable", f"--job-name={self.job_name}", f"--array=0-{count - 1}", "--requeue",
                 "--signal=B:USR1@120", "--open-mode=append", f"--output={self._root}/slurm/%A_%a.log",
                 f"--chdir={os.getcwd()}", *cores, *self.options]  # fmt: skip
        try:
            self._array = called(words, script).strip().partition(";")[0]
        except EnvironmentFault as error:
            if not alive:
                raise
            self._say_once(f"{error.problems[0].what}; {len(alive)} workers go on without more")
        self._given |= set(run_ids)

    def _refuse_ended(self) -> None:
        """Raises EnvironmentFault where workers could not begin, and Preempted where they were cancelled."""
        logs = {log: log.read_text(errors="replace") for log in (self._root / "slurm").glob(f"{self._array}_*.log")}
        cancelled = not logs
        for log, text in logs.items():
            lines = text.strip().splitlines() or [""]
            ended = ENDED.fullmatch(lines[-1])
            code = int(ended[1]) if ended else 0
            if 0 < code < 128 and code != Preempted.exit_code and NOTHING_LEFT not in text:
                what = next((line for line in reversed(lines) if ": error [" in line), lines[-2:][0])
                raise EnvironmentFault(what, where=f"Slurm job {self._array}", hint=f"see {log}")
            cancelled |= code >= Preempted.exit_code and lines[-1].endswith("TERM")
        if cancelled:
            what = f"Slurm job {self._array} was cancelled; nothing is lost"
            raise Preempted(what, hint="the same command continues")

    def _read_queue(self) -> list[QueueLine]:
        """The workers of this study that have not ended; as they were when squeue does not answer."""
        words = ["squeue", "--me", "--noheader", "--array", f"--name={self.job_name}", "--format=%F|%T|%r"]
        try:
            lines = called(words).splitlines()
        except EnvironmentFault as error:
            self._say_once(error.problems[0].what)
            return self._queue
        self._queue = [QueueLine(*fields) for line in lines if len(fields := line.strip().split("|")) == 3]
        seen = self._reasons
        reasons = {w.reason for w in self._queue if w.state == "PENDING"} - ORDINARY
        self._reasons = {reason: seen.get(reason, time.monotonic()) for reason in sorted(reasons)}
        for reason, since in self._reasons.items():
            if time.monotonic() >= since + SETTLED_SECONDS:
                self._say_once(f"Slurm keeps workers of {self.name} waiting: {reason}")
        return self._queue

    def _scancel(self, *options: str) -> None:
        with contextlib.suppress(EnvironmentFault):  # none is left
            called(["scancel", "--me", f"--name={self.job_name}", *options])


def called(words: Sequence[str], text: str = "") -> str:
    """What a command of Slurm prints. Raises EnvironmentFault, in Slurm's own words."""
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, start_new_session=True)
    except OSError as error:
        what = f"{words[0]}: {error.strerror or error}"
        raise EnvironmentFault(what, where="Slurm", hint="a machine with Slurm's commands on PATH") from None
    if done.returncode:
        said = "; ".join(done.stderr.strip().splitlines()) or f"{words[0]}: exit code {done.returncode}"
        raise EnvironmentFault(said, where="Slurm", hint="the options given by --sbatch; sbatch --help")
    return done.stdout
