"""Follows runs while they train: reads their journals, has them mirrored by the tracker, and sends events.

Studies, single runs and sweeps train through this one; they differ in which jobs they hand out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.basics.progress import Listener, Message, Progress, RunProgress
from gpt2lab.errors import ConfigError, Gpt2labError
from gpt2lab.executors import Executor
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.executors.ranks import RanksExecutor
from gpt2lab.planning.machine import Machine
from gpt2lab.records import StudyRecord
from gpt2lab.store import Row, Store
from gpt2lab.store.listing import facts_of_runs
from gpt2lab.tracking import Tracker
from gpt2lab.tracking.follower import Follower

TrackerFactory = Callable[[], Tracker]

CLOSE_SECONDS = 30.0
"""How long the tracker may take to receive what is left."""


def executor_for(machine: Machine) -> Executor:
    """Where runs execute unless an executor is given: processes of this machine.

    Raises ConfigError in a process that torchrun or the like has started as one of several: each would start them all.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if os.environ.get("WORLD_SIZE", "1").isdecimal() else 1
    if started > 1:
        what = f"{started} processes were started by torchrun or the like, and each would train everything"
        raise ConfigError(what, where="WORLD_SIZE", hint="without it; only `gpt2lab train` runs under it")
    return RanksExecutor(machine.ranks) if machine.ranks > 1 else LocalExecutor(machine.jobs, machine.gpus)


@dataclass
class Driver:
    """Follows the runs of `record` (a study's, or a sweep's as tracking/trials.py has it) while inside.

    progress: run id -> how far that run is, which rows bring up to date; runs may be added at any time.
    on_rows: called with each run's new rows.
    """

    store: Store
    record: StudyRecord | Mapping[str, Any]
    title: str
    jobs: int
    on_event: Listener
    tracker: TrackerFactory | None = None
    on_rows: Callable[[str, list[Row]], None] = lambda run_id, rows: None
    progress: dict[str, RunProgress] = field(default_factory=dict)
    _follower: Follower = field(init=False)

    def __enter__(self) -> Driver:
        record = self.record.plain() if isinstance(self.record, StudyRecord) else self.record
        self._follower = Follower(self.store, record, self.tracker, self.say)
        try:
            self.tick()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._follower.close(timeout=CLOSE_SECONDS)
        with contextlib.suppress(Gpt2labError):
            facts_of_runs(self.store, self.progress)

    def say(self, text: str) -> None:
        """Send a message."""
        self.on_event(Message(text))

    def tick(self) -> None:
        """Read what is new and send where all runs are; to be called several times a second."""
        for news in self._follower.poll():
            if news.run_id in self.progress:
                self.progress[news.run_id].take(news.rows)
            self.on_rows(news.run_id, news.rows)
        for run in self.progress.values():
            if run.status not in ("finished", "diverged"):
                status = self.store.run(run.run_id).status()
                run.status = "waiting" if status in ("absent", "partial") else status
        self.on_event(Progress.of(self.title, self.progress.values(), self.jobs))
