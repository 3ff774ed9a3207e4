"""Several ranks on this machine for one run: started together, watched, and ended together.

If one of them dies, raises, or stops answering, the others are ended within seconds and the cause is told once. A stop
signal reaches all of them; they save at the same step. Over several machines torchrun does this instead.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from gpt2lab.errors import Gpt2labError, LockHeld, Preempted, Problem, RankLost
from gpt2lab.executors.local import Ending, start_cold
from gpt2lab.runner import NOTHING_LEFT, PARENT, Job
from gpt2lab.runner.stop import STOP_SIGNALS
from gpt2lab.store import RunFolder, Store, now
from gpt2lab.training.joining import AGENT_STORE
from gpt2lab.training.monitor import HINT

TICK_SECONDS = 0.1
GRACE_SECONDS = 2.0  # for the others to say why and end by themselves, once one has ended badly
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
PEACEFUL = (0, NOTHING_LEFT, Preempted.exit_code)


class Process(Protocol):
    """What is asked of a rank's process, as of `subprocess.Popen`."""

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Rank:
    """One process of the run. `code`: as it ended by itself; None while it runs, or if we ended it."""

    number: int
    process: Process
    log: Path
    code: int | None = None

    @property
    def ended_badly(self) -> bool:
        return self.code is not None and self.code not in PEACEFUL

    @property
    def died_of(self) -> str | None:
        """The name of the signal that ended it, if one did."""
        return signal.Signals(-self.code).name if self.code is not None and self.code < 0 else None


def launched(job: Job, environment: dict[str, str], log: Path) -> Process:
    """A worker in a session of its own, so that Ctrl-C reaches it only through us."""
    with log.open("a") as file:
        return start_cold(job, environment, file)


def meeting_place() -> TCPStore:
    """The store in which ranks find each other, kept here and not by rank 0, so that it answers whatever happens to a
    rank. Torch would open it to the whole network."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())


@dataclass
class RanksExecutor:
    """Trains one run with `count` ranks. on_tick: called several times a second meanwhile. launch: starts a process for
    a job, with its environment and the file for what it prints."""

    count: int
    on_tick: Callable[[], None] = lambda: None
    launch: Callable[[Job, dict[str, str], Path], Process] = launched
    _ranks: list[Rank] = field(default_factory=list, init=False)
    _stop: int | None = field(default=None, init=False)
    _end: bool = field(default=False, init=False)

    def run(self, job: Job) -> Ending:
        """Execute the job to its end, or to where `end` let it end: then it is "preempted".

        Raises Preempted after a stop signal, with everything saved; LockHeld; what a rank raised first, as far as it is
        one of our errors; RankLost when a rank died, hung, or raised something else.
        """
        folder = Store(job.root).run(job.run_id)
        if folder.status() == "running":
            raise _locked(folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.clear_failure()
        self._end = False
        before = {number: signal.signal(number, self._on_stop) for number in STOP_SIGNALS}
        store = meeting_place()
        try:
            self._ranks = [self._start(job, number, store.port, folder.path) for number in range(self.count)]
            if self._stop is not None:  # it came while they were being started
                self._send(self._stop)
            self._watch()
        finally:
            self._kill()
            del store  # which closes it, though an error may keep this frame
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._account(folder)

    def end(self) -> None:
        """Let all ranks finish the same step, save and end; a run that is over by then ends as it would have. From
        on_tick."""
        if not self._end:
            self._end = True
            self._send(signal.SIGTERM)

    def _start(self, job: Job, number: int, port: int, folder: Path) -> Rank:
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
        environment |= {
            PARENT: str(os.getpid()),
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
        log = folder / ("run.log" if number == 0 else f"rank_{number}.log")
        return Rank(number, self.launch(job, environment, log), log)

    def _watch(self) -> None:
        """Until every rank has ended, or one has ended badly and the others had time to follow."""
        deadline = float("inf")
        while any(rank.code is None for rank in self._ranks) and time.monotonic() < deadline:
            for rank in self._ranks:
                rank.code = rank.process.poll()
            if any(rank.ended_badly for rank in self._ranks):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            self.on_tick()
            time.sleep(TICK_SECONDS)

    def _account(self, folder: RunFolder) -> Ending:
        """How the run ended, from how its ranks did; the first cause, once."""
        codes = [rank.code for rank in self._ranks]
        if all(code in PEACEFUL for code in codes):
            if Preempted.exit_code in codes:
                return self._stopped("stopped, everything saved", folder)
            return "found" if NOTHING_LEFT in codes else "done"
        died = [rank for rank in self._ranks if rank.died_of]
        sent = {self._stop, signal.SIGTERM if self._end else None} - {None}
        if any(-rank.code in sent for rank in died if rank.code):  # told before it could listen
            folder.clear_failure()  # what another rank said of the missing one
            return self._stopped("stopped before training began", folder)
        failure = folder.failure()
        if LockHeld.exit_code in codes and failure is None:
            raise _locked(folder)
        if failure is None or (failure.get("code") == RankLost.code and died):
            bad = next(iter(died), None) or next(rank for rank in self._ranks if rank.ended_badly)
            raise self._lost(bad, folder)
        raise error_of(failure, folder)

    def _stopped(self, what: str, folder: RunFolder) -> Ending:
        """How a run ended that was told to: for whoever stops everything, an error."""
        if self._end and self._stop is None:
            return "preempted"
        raise Preempted(what, where=folder.id, hint="the same command continues")

    def _lost(self, rank: Rank, folder: RunFolder) -> RankLost:
        """A rank that could not say itself why it ended; kept as the run's failure."""
        rows = folder.rows()
        step = rows[-1]["step"] if rows else 0
        how = f"died ({rank.died_of})" if rank.died_of else f"ended with exit code {rank.code}"
        memory = " (out of memory?)" if rank.code == -signal.SIGKILL else ""
        what = f"rank {rank.number} {how} at step {step}{memory}; log: {rank.log}"
        folder.fail({"reason": what, "phase": "training", "step": step, "at": now(), "code": RankLost.code,
                     "exit_code": RankLost.exit_code, "hint": HINT})  # fmt: skip
        return RankLost(what, hint=HINT)

    def _on_stop(self, number: int, frame: object) -> None:
        """Pass it on: all ranks finish the same step and save. A second Ctrl-C ends them at once."""
        if number == signal.SIGINT and self._stop == signal.SIGINT:
            self._kill()
            os._exit(130)
        if self._stop is None:
            more = "; once more to end at once" if number == signal.SIGINT else ""
            print(f"\nstopping: the run finishes its step and saves{more}", file=sys.stderr, flush=True)
        self._stop = number
        self._send(number)

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    def _kill(self) -> None:
        """Whatever ends this executor, no rank outlives it. What they were writing stays whole."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()


def error_of(failure: dict[str, object], folder: RunFolder) -> Gpt2labError:
    """What a failure.json says, as the error that it was; anything that is none of ours is a lost rank's."""
    reason, hint = str(failure.get("reason")), failure.get("hint")
    found = Gpt2labError([Problem("", line) for line in reason.split("\n")], hint=None if hint is None else str(hint))
    code, exit_code = failure.get("code"), failure.get("exit_code")
    if not isinstance(code, str) or not isinstance(exit_code, int):
        rank, step = failure.get("rank", 0), failure.get("step", 0)
        what = f"rank {rank} raised {reason} at step {step}; log: {folder.path / 'error.log'}"
        return RankLost(what, hint=HINT)
    found.code, found.exit_code = code, exit_code
    return found


def _locked(folder: RunFolder) -> LockHeld:
    """The refusal that names who is at work on the run."""
    try:
        with folder.lock():
            return LockHeld("another process was at it a moment ago", where=str(folder.path), hint="try again")
    except LockHeld as error:
        return error
