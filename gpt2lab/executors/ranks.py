"""One job at a time, trained by several ranks on this machine, which start and end together.

If a rank dies, raises or stops responding, the others are ended within seconds and the cause is recorded once. All
ranks of a job that is cancelled save at the same step. Over several machines torchrun does this instead.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from gpt2lab.errors import LockHeld, Preempted, RankLost
from gpt2lab.executors import Ending, out_of_memory, record_loss, worker_environment
from gpt2lab.executors.local import Process, Start, start_process, start_within
from gpt2lab.runner import NOTHING_LEFT, Job
from gpt2lab.store import RunFolder, Store
from gpt2lab.training.ranks import AGENT_STORE, has_joined

POLL_SECONDS = 0.1
GRACE_SECONDS = 2.0  # for the others to report the cause and end by themselves, once one has failed
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
IN_ORDER = (0, NOTHING_LEFT, Preempted.exit_code)


@dataclass
class Rank:
    """One process of the run. `code`: its exit code once it has ended by itself."""

    number: int
    process: Process
    log: Path
    code: int | None = None

    @property
    def ended_badly(self) -> bool:
        return self.code is not None and self.code not in IN_ORDER

    @property
    def killed_by(self) -> str | None:
        """The name of the signal that ended it, if one did."""
        return signal.Signals(-self.code).name if self.code is not None and self.code < 0 else None


def rendezvous() -> TCPStore:
    """The store in which ranks find each other, kept here and not by rank 0, so that it answers whatever happens to a
    rank. Torch would open it to the whole network."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())


@dataclass
class RanksExecutor:
    """Trains each job with `count` ranks, each a process that `start` starts."""

    count: int
    start: Start = start_process
    capacity: int = field(default=1, init=False)
    _job: Job | None = field(default=None, init=False)
    _ranks: list[Rank] = field(default_factory=list, init=False)
    _store: TCPStore | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False)
    _deadline: float = field(default=float("inf"), init=False)

    @property
    def label(self) -> str:
        return f"{self.count} ranks on this machine"

    def submit(self, job: Job) -> None:
        self._job, self._store, self._cancelled, self._deadline = job, rendezvous(), False, float("inf")
        Store(job.root).run(job.run_id).clear_failure()
        self._ranks = []
        try:
            for number in range(self.count):
                self._ranks.append(self._start_rank(job, number, self._store.port))
        except BaseException:
            self._end()
            raise

    def poll(self, seconds: float) -> list[str]:
        end = time.monotonic() + seconds
        while True:
            for rank in self._ranks:
                rank.code = rank.process.poll()
            if self._job and any(rank.code == Preempted.exit_code for rank in self._ranks):
                self.cancel(self._job.run_id)  # the others may not have begun to train
            if any(rank.ended_badly or self._is_missing(rank) for rank in self._ranks):
                self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
            left = end - time.monotonic()
            over = all(rank.code is not None for rank in self._ranks) or time.monotonic() > self._deadline
            if self._job and over:
                return [self._job.run_id]
            if left <= 0:
                return []
            time.sleep(min(left, POLL_SECONDS))

    def cancel(self, run_id: str) -> None:
        self._cancelled = True
        self._send(signal.SIGTERM)

    def collect(self, run_id: str) -> Ending:
        assert self._job is not None
        folder = Store(self._job.root).run(run_id)
        self._end()
        return self._account(folder)

    def close(self) -> None:
        """What ranks were writing stays whole."""
        if self._job is not None:
            self.cancel(self._job.run_id)
            while not self.poll(POLL_SECONDS):
                pass
        self._end()

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _start_rank(self, job: Job, number: int, port: int) -> Rank:
        environment = worker_environment(job) | {
            AGENT_STORE: "True",
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(self.count),
            "LOCAL_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if sys.platform in LOOPBACK:
            environment.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
        log = job.folder / ("run.log" if number == 0 else f"rank_{number}.log")
        return Rank(number, start_within(self.start, job, environment, log), log)

    def _is_missing(self, rank: Rank) -> bool:
        """Whether it was stopped before it joined the others, which would wait for it in vain."""
        store, stopped = self._store, rank.code == Preempted.exit_code
        return stopped and store is not None and not has_joined(store, rank.number)

    def _end(self) -> None:
        """No rank outlives its job."""
        self.kill()
        for rank in self._ranks:
            rank.process.wait()
        self._job, self._store = None, None

    def _account(self, folder: RunFolder) -> Ending:
        """How the run ended, from how its ranks did; the first cause is recorded, once."""
        codes = [rank.code for rank in self._ranks if rank.code is not None]  # None: it waited for a missing one
        if all(code in IN_ORDER for code in codes):
            if Preempted.exit_code in codes:
                return "preempted"
            return "found" if NOTHING_LEFT in codes else "done"
        killed = [rank for rank in self._ranks if rank.killed_by]
        if self._cancelled and any(rank.code == -signal.SIGTERM for rank in killed):  # before it listened for signals
            folder.clear_failure()  # which another rank recorded because of the missing one
            return "preempted"
        failure = folder.failure()
        if LockHeld.exit_code in codes and failure is None:
            return "preempted" if self._cancelled else "locked"
        if failure is None or (failure.get("code") == RankLost.code and killed):
            self._record(next(iter(killed), None) or next(rank for rank in self._ranks if rank.ended_badly), folder)
        return "failed"

    def _record(self, rank: Rank, folder: RunFolder) -> None:
        """Record the end of a rank that could not do so itself as the run's failure."""
        how = f"died ({rank.killed_by})" if rank.killed_by else f"ended with exit code {rank.code}"
        at = f"at step {folder.last_step()}{out_of_memory(rank.code)}"
        record_loss(folder, f"rank {rank.number} {how} {at}; log: {rank.log}")

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)
