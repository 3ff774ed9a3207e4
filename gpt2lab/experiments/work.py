"""A worker for runs that are declared in a store: any number of them work on a study, and nothing hands the runs out.

A run is free when its job.json is there and no process holds its lock. A run that failed after it was declared is left
alone, as every other worker would try it again. One whose job.json is taken away is saved and ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

import torch

from gpt2lab.basics.cores import usable_cores
from gpt2lab.errors import EnvironmentFault
from gpt2lab.executors import Ending, Executor
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.executors.ranks import RanksExecutor
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.executors.submitted import enter, is_imported
from gpt2lab.planning.machine import check_ranks, shares
from gpt2lab.planning.runs import Run, is_finished
from gpt2lab.records import run_ids
from gpt2lab.runner import Job
from gpt2lab.runner.arrival import config_of, refuse_another_run
from gpt2lab.store import Store
from gpt2lab.store.listing import facts_of_runs
from gpt2lab.store.run_folder import RUN_ID
from gpt2lab.training.precision import choose_device

LOOK_SECONDS = 5.0
"""How often a worker with room to spare looks for runs that have become free."""


@dataclass
class Pool:
    """The runs that one worker may take, in their order."""

    store: Store
    left: list[str]
    at_work: dict[str, Job] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)
    """run id -> how it ended, of the runs that this worker had"""

    def free(self) -> Iterator[Job | None]:
        """The next free run, and None while there is none but this worker still trains."""
        looked = -LOOK_SECONDS
        while True:
            claimed = False
            if time.monotonic() >= looked + LOOK_SECONDS or not self.at_work:
                for run in list(self.left):
                    if job := self._claimable(run):
                        self.left.remove(run)
                        self.at_work[run] = job
                        claimed = True
                        yield job
                looked = time.monotonic()
            if not claimed:  # otherwise, those looked at before may be free or finished by now
                if not self.at_work:
                    return
                yield None

    def ended(self, run: str, ending: Ending) -> None:
        """Take note of how a run ended here."""
        del self.at_work[run]
        if ending == "locked":
            self.left.append(run)
        else:
            self.endings[run] = ending

    def withdrawn(self) -> list[str]:
        """The runs at work here whose job.json was taken away."""
        return [run for run, job in self.at_work.items() if not job.path.exists()]

    def _claimable(self, run: str) -> Job | None:
        """The job of a run, if it is free; a run that needs no worker is left out from now on."""
        folder = self.store.run(run)
        status, declared = folder.status(), folder.path / "job.json"
        if status == "running":
            return None
        job = Job.read(declared) if declared.exists() and status != "damaged" else None
        if job is None or (status == "failed" and job.has_failed()):
            self.left.remove(run)
            return None
        if not is_imported(job):
            if self.at_work:  # later, when nothing is interrupted by it
                return None
            enter(job)
        config = config_of(job)
        if is_finished(Run(run, "", config, job.identity), self.store):
            self.left.remove(run)
            return None
        if Path(job.root) != self.store.root.resolve():
            hint = "mount the store, and the folder of prepared data, under the same path everywhere"
            what = f"declared in {job.root}, which is not this store"
            raise EnvironmentFault(what, where=f"run {job.run_id}", hint=hint)
        refuse_another_run(job, config)
        return job


def work(
    names: Sequence[str], store: Store, *, jobs: int | None = None, ranks: int = 1, say: Callable[[str], None] = print
) -> Pool:
    """Train what is free of the named studies and runs, on this machine, as many side by side as fit or `jobs`, or one
    at a time with several ranks, until nothing is left that this worker could do; -> what became of them.

    Raises ConfigError for names that are neither and for ranks that do not fit, EnvironmentFault where a run would
    become another one here, and Preempted when stopped, with everything saved.
    """
    pool = Pool(store, [run for name in names for run in runs_of(name, store)])
    free = pool.free()
    first = next(free, None)
    if first is None:
        return pool
    config = config_of(first)
    device = choose_device(config.training.device).type
    executor: Executor
    if ranks > 1:
        check_ranks(config, ranks)
        executor = RanksExecutor(ranks)
    else:
        side_by_side, _ = shares(jobs, first.threads, usable_cores(), device)
        executor = LocalExecutor(side_by_side, torch.cuda.device_count() if device == "cuda" else 0)
    say(f"{first.root}: {executor.label}, {device}")

    def tick() -> None:
        for run in pool.withdrawn():
            scheduler.cancel(run)

    def ended(run: str, ending: Ending) -> None:
        pool.ended(run, ending)
        if ending != "locked":
            say(f"{run} {ending}")

    scheduler = Scheduler(executor, tick, shared=True)
    scheduler.run(chain([first], free), ended)
    facts_of_runs(store, pool.endings)
    return pool


def runs_of(name: str, store: Store) -> list[str]:
    """The runs of a study, the first of each arm before the second; or the run itself. Raises ConfigError."""
    if RUN_ID.fullmatch(name):
        return [name]
    record = store.study(name)
    arms = [run_ids(record.with_(arms={name: arm})) for name, arm in record.arms.items()]
    return list(dict.fromkeys(run for turn in zip_longest(*arms) for run in turn if run))
