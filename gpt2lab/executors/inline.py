"""Jobs in this process, one after another: for a debugger, a notebook without processes, and tests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gpt2lab.executors import Ending, ending_of
from gpt2lab.runner import Job, StopRequest, work


@dataclass
class InlineExecutor:
    """Trains each job here while it is polled, so nothing else happens meanwhile."""

    capacity: int = field(default=1, init=False)
    label: str = field(default="this process", init=False)
    trained: list[str] = field(default_factory=list, init=False)
    """ids of all runs that it was given, in their order"""
    _job: Job | None = field(default=None, init=False)
    _stop: StopRequest = field(default_factory=StopRequest, init=False)
    _code: int | None = field(default=None, init=False)

    def submit(self, job: Job) -> None:
        self._job, self._stop, self._code = job, StopRequest(), None
        self.trained.append(job.run_id)

    def poll(self, seconds: float) -> list[str]:
        if self._job is None:
            time.sleep(seconds)
            return []
        if self._code is None:
            self._code = work(self._job, self._stop)
        return [self._job.run_id]

    def cancel(self, run_id: str) -> None:
        self._stop.reason = "cancelled"

    def collect(self, run_id: str) -> Ending:
        assert self._job is not None and self._code is not None
        job, self._job = self._job, None
        return ending_of(self._code, job, cancelled=self._stop.reason is not None)

    def close(self) -> None:
        self._job = None

    def kill(self) -> None:
        """It ends with this process."""
