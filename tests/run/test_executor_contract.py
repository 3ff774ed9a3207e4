"""What every executor promises, the one in docs/extending.md among them. A line in KINDS holds another one to it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from workers import folder_of, jobs_of, wait_until

from gpt2lab.errors import ConfigError
from gpt2lab.executors import Ending, Executor, worker_environment
from gpt2lab.executors.driver import executor_for
from gpt2lab.executors.inline import InlineExecutor
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.executors.ranks import RanksExecutor
from gpt2lab.executors.ray import RayExecutor
from gpt2lab.executors.slurm import SlurmExecutor
from gpt2lab.planning.machine import Machine
from gpt2lab.runner import Job

SECONDS = 120.0  # after which a test gives up
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@cache
def documented(name: str) -> Any:
    """A class of the page, as a reader would copy it."""
    code = next(
        text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if f"class {name}" in text
    )
    names: dict[str, Any] = {}
    exec(code, names)
    return names[name]


KINDS: dict[str, Callable[[], Executor]] = {
    "forks": lambda: LocalExecutor(2),
    "processes": lambda: LocalExecutor(2, fork=False),
    "ranks": lambda: RanksExecutor(2),
    "inline": InlineExecutor,
    "slurm": lambda: SlurmExecutor("tiny", workers=2),
    "ray": lambda: RayExecutor(2),
    "documented": lambda: documented("NiceExecutor")(),
}
QUICK = ("forks", "inline")  # the others import torch for every job
CLUSTERS = {"slurm": "fake_slurm", "ray": "ray_cluster"}
"""Kind -> the fixture that it runs on."""
INTERRUPTIBLE = [kind for kind in KINDS if kind != "inline"]


def kinds(names: Any = KINDS) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture
def executor(request: pytest.FixtureRequest, forks: None) -> Iterator[Executor]:
    if request.param in CLUSTERS:
        request.getfixturevalue(CLUSTERS[request.param])
    made = KINDS[request.param]()
    yield made
    made.close()


def ended(executor: Executor, *jobs: Job) -> list[Ending]:
    """How jobs end that were submitted."""
    left, endings = {job.run_id for job in jobs}, dict[str, Ending]()
    deadline = time.monotonic() + SECONDS
    while left:
        assert time.monotonic() < deadline, "the jobs did not end in time"
        for run_id in executor.poll(0.2):
            endings[run_id] = executor.collect(run_id)
            left.discard(run_id)
    return [endings[job.run_id] for job in jobs]


def under_way(executor: Executor, job: Job) -> None:
    def has_rows() -> bool:
        assert executor.poll(0.05) == [], (folder_of(job).path / "run.log").read_text()
        return len(folder_of(job).rows()) > 3

    wait_until(has_rows, SECONDS)


@pytest.mark.parametrize("executor", kinds(), indirect=True)
def test_jobs_are_executed_and_found_finished_afterwards(executor: Executor, tiny: Path) -> None:
    together = jobs_of(tiny)[: executor.capacity]
    assert executor.poll(0) == []
    for job in together:
        executor.submit(job)
    assert ended(executor, *together) == ["done"] * len(together)
    assert all(folder_of(job).status() == "finished" for job in together)
    executor.submit(together[0])
    assert ended(executor, together[0]) == ["found"]
    assert executor.label and executor.poll(0) == []


@pytest.mark.parametrize("executor", kinds(), indirect=True)
def test_a_failure_is_reported_and_recorded(executor: Executor, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2lab.basics import faults

    monkeypatch.setenv("GPT2LAB_FAULT", "raise@step:3")
    faults.arm("raise@step:3")  # for the one that trains in this process
    job = jobs_of(tiny)[0]
    executor.submit(job)
    assert ended(executor, job) == ["failed"]
    faults.arm("")
    failure = folder_of(job).failure()
    assert failure is not None and "injected at step" in failure["reason"]
    monkeypatch.delenv("GPT2LAB_FAULT")
    executor.submit(job)
    assert ended(executor, job) == ["done"]
    assert folder_of(job).failure() is None


@pytest.mark.parametrize("executor", kinds(), indirect=True)
def test_a_run_that_another_process_holds_is_locked(executor: Executor, tiny: Path) -> None:
    job = jobs_of(tiny)[0]
    with folder_of(job).lock():
        executor.submit(job)
        assert ended(executor, job) == ["locked"]
    assert folder_of(job).failure() is None


@pytest.mark.parametrize("executor", kinds(INTERRUPTIBLE), indirect=True)
def test_a_cancelled_job_is_saved_and_goes_on_later(executor: Executor, tiny: Path) -> None:
    job = jobs_of(tiny, "training.steps=400")[0]
    executor.submit(job)
    under_way(executor, job)
    executor.cancel(job.run_id)
    executor.cancel(job.run_id)
    assert ended(executor, job) == ["preempted"]
    saved = folder_of(job).last_step()
    assert folder_of(job).status() == "partial" and folder_of(job).failure() is None and 0 < saved < 400
    with folder_of(job).lock():
        executor.submit(job)
        assert ended(executor, job) == ["locked"]  # this one was not cancelled
    executor.submit(job)
    assert ended(executor, job) == ["done"]
    assert [row["step"] for row in folder_of(job).rows()] == list(range(401))


@pytest.mark.parametrize("executor", kinds(INTERRUPTIBLE), indirect=True)
def test_a_job_that_is_cancelled_before_it_could_begin_is_preempted(executor: Executor, tiny: Path) -> None:
    job = jobs_of(tiny, "training.steps=100000")[0]
    executor.submit(job)
    executor.cancel(job.run_id)
    assert ended(executor, job) == ["preempted"]
    assert folder_of(job).failure() is None


@pytest.mark.parametrize("executor", kinds(INTERRUPTIBLE), indirect=True)
def test_closing_saves_what_is_at_work_and_the_executor_can_be_used_again(executor: Executor, tiny: Path) -> None:
    job = jobs_of(tiny, "training.steps=100000")[0]
    executor.submit(job)
    under_way(executor, job)
    executor.close()
    assert folder_of(job).status() == "partial"
    short = jobs_of(tiny)[1]
    executor.submit(short)
    assert ended(executor, short) == ["done"]


@pytest.mark.parametrize("executor", kinds(INTERRUPTIBLE), indirect=True)
def test_killing_ends_it_at_once_and_leaves_whole_files(executor: Executor, tiny: Path) -> None:
    job = jobs_of(tiny, "training.steps=100000")[0]
    executor.submit(job)
    under_way(executor, job)
    executor.kill()
    wait_until(lambda: executor.poll(0.2))
    executor.collect(job.run_id)
    wait_until(lambda: folder_of(job).status() != "running")  # until the kernel has let go of its lock
    assert folder_of(job).status() in ("partial", "failed") and folder_of(job).rows()


def test_a_worker_inherits_nothing_of_a_launchers_variables(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs_of(tiny)[0]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "4")
    environment = worker_environment(job)
    assert not [name for name in environment if "RANK" in name or name.startswith(("MASTER", "TORCHELASTIC", "WORLD"))]
    with pytest.raises(ConfigError, match="4 processes were started"):
        executor_for(Machine("cpu", "cpu", 1, 1, 1e9, "a test"))
