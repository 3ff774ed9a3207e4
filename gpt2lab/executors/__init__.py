"""Where runs execute. An executor takes jobs from the `Scheduler` and reports how each of them ended.

The contract is small, so that a cluster's queue fits it as well as processes of this machine: a worker reads `job.json`
in the run's folder and writes its results there. Between them lies one command, `worker_command`, executed anywhere
that sees the folder and the data.

`tests/run/test_executor_contract.py` holds every executor to the contract; docs/extending.md shows how to write one.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from gpt2lab.basics.signals import PARENT
from gpt2lab.config import config_from_text
from gpt2lab.errors import LockHeld, Preempted, RankLost
from gpt2lab.planning.runs import Run, is_finished
from gpt2lab.registry import Slot
from gpt2lab.runner import NOTHING_LEFT, Job
from gpt2lab.store import RunFolder, Store, now

executor = Slot("executor", "where runs execute (--executor)", default=(), in_config=False)
"""Those of plug-ins, which are made without arguments."""

Ending = Literal["done", "found", "failed", "preempted", "locked", "lost"]
"""How a job ended: trained now; finished by another process meanwhile; failed; stopped with everything saved; not
begun, because another process holds the run; or lost through no fault of its own, as with a node that was taken away.
The scheduler retries locked and lost jobs, so its callers see neither."""

ENDINGS: dict[int, Ending] = {
    0: "done",
    NOTHING_LEFT: "found",
    Preempted.exit_code: "preempted",
    LockHeld.exit_code: "locked",
}


class Executor(Protocol):
    """Executes jobs, each named by its run id. All methods are called from one thread; only `poll` may wait.

    If its jobs go on when this process is stopped, it also has a text `outlives`: that they do, and how to end them.
    """

    @property
    def capacity(self) -> int:
        """How many jobs it takes at a time."""

    @property
    def label(self) -> str:
        """Where jobs execute, as "2 processes on this machine"."""

    def submit(self, job: Job) -> None:
        """Start work on a job whose job.json is written. At most `capacity` jobs are submitted and not collected; the
        same run is submitted again only after it was collected."""

    def poll(self, seconds: float) -> list[str]:
        """Ids of the runs whose jobs have ended and are not collected; waits at most so long for the first."""

    def cancel(self, run_id: str) -> None:
        """Ask a job to finish its step, save and end. Returns at once; a job that has ended by then keeps its ending,
        any other ends as "preempted"."""

    def collect(self, run_id: str) -> Ending:
        """How a job ended that `poll` returned; the executor forgets it."""

    def close(self) -> None:
        """Cancel what is still at work and wait until it has saved and ended. Nothing outlives the executor."""

    def kill(self) -> None:
        """End everything at once; called from a signal handler. Checkpoints stay whole whatever is interrupted."""


def worker_command(job: Job) -> list[str]:
    """The command that executes a job; its exit code goes to `ending_of`, its output belongs into run.log."""
    return [sys.executable, "-m", "gpt2lab.worker", str(job.path)]


LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+")
"""Variables by which torchrun and its like give a process its place among ranks."""


def worker_environment(job: Job) -> dict[str, str]:
    """The environment of a worker on this machine: its number of threads, and the process that it ends with; without
    what a launcher has set for this process."""
    threads = str(job.threads)
    inherited = {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}
    return {**inherited, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, PARENT: str(os.getpid())}


def ending_of(code: int, job: Job, *, cancelled: bool = False) -> Ending:
    """How a job ended, by the exit code of its worker: negative for a signal, as subprocess has it. A failure that the
    worker could not record itself, as of one that was killed, is recorded in the run's folder."""
    ending = ENDINGS.get(code, "failed")
    if cancelled and (ending == "locked" or code == -signal.SIGTERM):  # before it could begin, or listen for signals
        return "preempted"
    folder = Store(job.root).run(job.run_id)
    if ending == "failed" and folder.failure() is None and folder.result() is None:
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        record_loss(folder, f"{cause}{out_of_memory(code)}; see {folder.path / 'run.log'}")
    return ending


def has_finished(job: Job) -> bool:
    """Whether its run is finished, with the evaluation that the job asks for. Raises DataFault."""
    store = Store(job.root)
    if store.run(job.run_id).result() is None:
        return False
    return is_finished(Run(job.run_id, "", config_from_text(job.config), job.identity), store)


def out_of_memory(code: int | None) -> str:
    """A note on a process that ended with this exit code: the kernel sends SIGKILL when memory runs out."""
    return " (out of memory?)" if code == -signal.SIGKILL else ""


def record_loss(folder: RunFolder, reason: str) -> None:
    """Record a failure of a run whose worker ended without recording one."""
    folder.fail({"reason": reason, "phase": "worker", "step": folder.last_step(), "at": now()})


def is_loss(failure: Mapping[str, Any]) -> bool:
    """Whether a recorded failure is the end of a process, which is no result of the run."""
    return failure.get("phase") == "worker" or failure.get("code") == RankLost.code
