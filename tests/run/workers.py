"""What tests with worker processes share: jobs, the command line as a process, and waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gpt2lab import api
from gpt2lab.basics import faults
from gpt2lab.basics.signals import STOP_SIGNALS
from gpt2lab.experiments.ablation import job_of
from gpt2lab.runner import Job, StopRequest, work
from gpt2lab.store import RunFolder, Store

SWEEP = """
sweep: lr
question: Which rate suits a tiny model?
base: {base}
space:
  optim.lr: {{low: 1e-3, high: 1e-1, log: true}}
"""
"""A sweep's file, without what differs between tests."""


def replace_in(file: Path, *pairs: tuple[str, str]) -> None:
    """Replace texts in a file, each of which must be there."""
    text = file.read_text()
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text)


def jobs_of(ablation: Path, *overrides: str, plugin: str | None = None) -> list[Job]:
    """The jobs of an ablation's runs, their files written."""
    store = Store(ablation.parent / "runs")
    plan = api.plan(ablation, overrides=overrides, plugins=() if plugin is None else (plugin,), runs=store.root)
    jobs = [job_of(run, store, plan) for run in plan.runs()]
    for job in jobs:
        job.write()
    return jobs


def folder_of(job: Job) -> RunFolder:
    return Store(job.root).run(job.run_id)


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    """The journal without `seconds`, the only field in which equal runs may differ."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.rows()]


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The command line as a process of its own in `folder`; it prints into log.txt there."""
    folder.mkdir(exist_ok=True)
    argv = [sys.executable, "-c", "from gpt2lab.cli import main; main()", *words]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder, text=True)


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def wait_for_rows(root: Path, count: int) -> None:
    """Until the journals of a store hold that many rows together."""
    wait_until(lambda: sum(len(run.rows()) for run in Store(root).runs()) >= count)


def is_alive(pid: int) -> bool:
    """Whether a process still runs; a zombie has ended."""
    with suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


class ForkedRank:
    """A worker's process forked from this one, which has imported torch: what `python -m gpt2lab.runner` does later."""

    def __init__(self, job: Job, environment: Mapping[str, str], log: IO[str], fault: str = "") -> None:
        self.code: int | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self.pid = os.fork()
        if self.pid == 0:
            for number in STOP_SIGNALS:  # a command that this process executed before may have taken them
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if self.pid:
            return
        code = 99
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.environ.update(environment)
            faults.arm(fault)
            stop = StopRequest()
            stop.listen()
            code = work(job, stop)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def wait(self) -> int:
        wait_until(lambda: self.poll() is not None)
        assert self.code is not None
        return self.code

    def send_signal(self, sig: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)
