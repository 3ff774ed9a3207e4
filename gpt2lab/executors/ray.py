"""Runs on a Ray cluster, each a task that trains in a folder of its own node: no disk is shared.

Code, prepared data and, where a run goes on, its checkpoints travel through Ray's object store; what a run writes comes
back while it trains, so that this store is as after a local training. The run's lock is held here meanwhile.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gpt2lab.basics.forks import LOST
from gpt2lab.basics.signals import PARENT
from gpt2lab.config import config_from_text
from gpt2lab.errors import EnvironmentFault, LockHeld
from gpt2lab.executors import Ending, ending_of, has_finished, ray_node, record_loss
from gpt2lab.executors.submitted import with_copy
from gpt2lab.runner import Job
from gpt2lab.store import Store
from gpt2lab.store.arrivals import receive

LOCK = re.compile(r"/lock(\.claim\.\d+)?$")
MOST_BYTES = 2 << 30
"""Of prepared data that is sent; what is larger must be on every node, in the same folder."""


@dataclass
class RayTask:
    """A submitted job. lock: holds the run's lock until the job is collected."""

    job: Job
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    reference: Any = None
    cancelled: bool = False
    ending: Ending | None = None


@dataclass
class RayExecutor:
    """Runs as tasks of a Ray cluster: that of RAY_ADDRESS, or one that runs here, or else a new one on this machine.
    At most `capacity` are submitted at a time; `jobs` share a GPU. say: takes each message for the user."""

    capacity: int = 64
    jobs: int = 1
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
    _tasks: dict[str, RayTask] = field(default_factory=dict, init=False)
    _attempts: int = field(default=0, init=False)
    _mail: Any = field(default=None, init=False)
    _train: Any = field(default=None, init=False)
    _sent: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._say_once = cache(self.say)

    @property
    def label(self) -> str:
        return f"{self.capacity} task{'s' if self.capacity > 1 else ''} in Ray"

    def submit(self, job: Job) -> None:
        task = self._tasks[job.run_id] = RayTask(job)
        try:
            task.lock.enter_context(Store(job.root).run(job.run_id).lock())
        except LockHeld:
            task.ending = "locked"
            return
        try:
            if has_finished(job):
                task.ending = "found"
            else:
                self._send(task)
        except BaseException:
            self._tasks.pop(job.run_id).lock.close()
            raise

    def poll(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while True:
            self._look(max(0.0, deadline - time.monotonic()))
            ended = [run_id for run_id, task in self._tasks.items() if task.ending]
            if ended or time.monotonic() >= deadline:
                return ended

    def cancel(self, run_id: str) -> None:
        task = self._tasks[run_id]
        if task.ending is None and not task.cancelled:
            task.cancelled = True
            if not ray_of().get(self._mail.cancel.remote(run_id)):
                ray_of().cancel(task.reference)  # which waits for its turn

    def collect(self, run_id: str) -> Ending:
        task = self._tasks.pop(run_id)
        task.lock.close()
        assert task.ending is not None
        return task.ending

    def close(self) -> None:
        for run_id in self._tasks:
            self.cancel(run_id)
        while any(task.ending is None for task in self._tasks.values()):
            self.poll(1.0)
        for task in self._tasks.values():
            task.lock.close()
        self._tasks.clear()

    def kill(self) -> None:
        for task in self._tasks.values():
            if task.reference is not None:
                ray_of().cancel(task.reference, force=True)

    def _send(self, task: RayTask) -> None:
        """Give a job to Ray."""
        ray = self._connected()
        task.job = job = with_copy(task.job)
        gpu = job.identity.get("device") == "cuda"
        needs = {"num_cpus": job.threads, "num_gpus": 1 / self.jobs if gpu else 0}
        self._warn(needs["num_cpus"], needs["num_gpus"])
        self._attempts += 1
        ray.get(self._mail.expect.remote(job.run_id, self._attempts))
        branch = config_from_text(job.config).branch or ""
        trunk = [run for run in (branch.partition("@")[0],) if Path(job.root, run, "checkpoints").is_dir() and run]
        variables = {name: value for name, value in os.environ.items() if name.startswith("GPT2LAB_")}
        for name in (PARENT, "GPT2LAB_DATA"):
            variables.pop(name, None)
        variables |= {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
        data = [self._shared(job.data)] if size_of(job.data) <= MOST_BYTES else []
        start = ray.put(packed(job.root, job.run_id, *trunk))
        remote = self._train.options(max_retries=0, name=f"gpt2lab {job.run_id}", **needs)
        task.reference = remote.remote(
            self._mail, self._attempts, asdict(job), [self._shared(job.code)], data, [start], variables
        )

    def _connected(self) -> Any:
        """Ray, connected, with the actor of this executor. Raises EnvironmentFault."""
        ray = ray_of()
        try:
            if not ray.is_initialized():
                ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, configure_logging=False)
            if self._mail is None:
                ray.cloudpickle.register_pickle_by_value(ray_node)
                self._train = ray.remote(ray_node.train)  # sent to each node once
                strategies = ray.util.scheduling_strategies
                here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
                self._mail = ray.remote(ray_node.Mail).options(num_cpus=0, scheduling_strategy=here).remote()
        except Exception as error:  # Ray raises bare exceptions, too, as where a node does not start in time
            what = f"no connection to the cluster: {str(error).partition(chr(10))[0]}"
            raise EnvironmentFault(what, where="Ray", hint="`ray status`, and RAY_ADDRESS") from error
        return ray

    def _shared(self, folder: str) -> Any:
        """A reference to the packed folder, which is sent to each node once."""
        if folder not in self._sent:
            self._sent[folder] = ray_of().put(packed(folder, *os.listdir(folder)))
        return self._sent[folder]

    def _warn(self, cpus: float, gpus: float) -> None:
        """Say once that no node of the present cluster could take such a run: it waits for one that can."""
        nodes = [node["Resources"] for node in ray_of().nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            self._say_once(f"no node of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs; runs wait for one")

    def _look(self, seconds: float) -> None:
        """Take what has arrived; wait at most so long for the first task that ends."""
        ray = ray_of() if self._mail is not None else None
        waiting = {task.reference: task for task in self._tasks.values() if task.ending is None}
        if ray is None or not waiting:
            time.sleep(0.0 if any(task.ending for task in self._tasks.values()) else seconds)
            return
        ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        if not ended:
            ended, _ = ray.wait(list(waiting), timeout=seconds)
        for run_id, news in ray.get(self._mail.take.remote()):
            if run_id in self._tasks:
                receive(self._tasks[run_id].job.folder, news)
        for reference in ended:
            waiting[reference].ending = self._ending(waiting[reference])

    def _ending(self, task: RayTask) -> Ending:
        ray = ray_of()
        try:
            code = ray.get(task.reference)
        except ray.exceptions.TaskCancelledError:
            return "preempted"
        except ray.exceptions.RayTaskError as error:
            record_loss(Store(task.job.root).run(task.job.run_id), f"in Ray: {str(error).strip().splitlines()[-1]}")
            return "failed"
        except ray.exceptions.RayError:
            return "preempted" if task.cancelled else "lost"
        if code == LOST:
            return "preempted" if task.cancelled else "lost"
        return ending_of(code, task.job, cancelled=task.cancelled)


def ray_of() -> Any:
    """The package. Raises EnvironmentFault where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise EnvironmentFault(
            "Ray is not installed", where="--executor ray", hint="pip install 'gpt2lab[ray]'"
        ) from None
    return ray


def packed(root: str, *names: str) -> bytes:
    """Files and folders in `root`, without locks, as a file of tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.add(Path(root) / name, name, filter=lambda entry: None if LOCK.search(entry.name) else entry)
    return buffer.getvalue()


def size_of(folder: str) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
