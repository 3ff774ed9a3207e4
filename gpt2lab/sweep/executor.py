"""Runs of several ranks, one after another: what LocalExecutor is to runs of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gpt2lab.errors import Gpt2labError, LockHeld, Preempted
from gpt2lab.executors.local import LOCKED_PAUSE_SECONDS, TICK_SECONDS, Ending
from gpt2lab.executors.ranks import RanksExecutor
from gpt2lab.runner import Job


@dataclass
class OneByOne:
    """Each job with `ranks` processes. on_tick: called several times a second."""

    ranks: int
    on_tick: Callable[[], None]
    _now: tuple[str, RanksExecutor] | None = field(default=None, init=False)

    def run(self, jobs: Iterable[Job | None], ended: Callable[[str, Ending], None]) -> None:
        """Execute jobs until there are no more; None means that there is none at this moment. Raises Preempted after a
        stop signal, when the run at work has saved and ended."""
        try:
            for job in jobs:
                if job is None:
                    self._wait(TICK_SECONDS)
                else:
                    self._one(job, ended)
        except KeyboardInterrupt:  # between two runs: while one is at work, its executor takes the signal
            raise Preempted("stopped between two runs, nothing is lost", hint="the same command continues") from None

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.on_tick()
            time.sleep(TICK_SECONDS)

    def end(self, run_id: str) -> None:
        """Let the run finish its step, save and end; every rank at the same step."""
        if self._now and self._now[0] == run_id:
            self._now[1].end()

    def _one(self, job: Job, ended: Callable[[str, Ending], None]) -> None:
        while True:
            executor = RanksExecutor(self.ranks, self.on_tick)
            self._now = (job.run_id, executor)
            try:
                ending = executor.run(job)
            except Preempted:
                ended(job.run_id, "preempted")
                raise
            except LockHeld:
                self._wait(LOCKED_PAUSE_SECONDS)
                continue
            except Gpt2labError:
                ending = "failed"
            finally:
                self._now = None
            return ended(job.run_id, ending)
