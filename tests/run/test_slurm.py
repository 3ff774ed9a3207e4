"""The Slurm executor: what it submits, reads, says and cancels, with the fake of tests/fake_slurm.py, whose workers are
played by the test; and whole studies on a real Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_slurm import FakeSlurm
from slurm_cluster import Slurm
from workers import folder_of, rows_of, wait_until

from gpt2lab import api
from gpt2lab.api import StudyResult
from gpt2lab.basics.progress import Event, Listener
from gpt2lab.errors import EnvironmentFault, Preempted
from gpt2lab.executors import slurm
from gpt2lab.executors.inline import InlineExecutor
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.executors.slurm import SlurmExecutor
from gpt2lab.runner import Job
from gpt2lab.store import RunFolder, Store, now


@pytest.fixture
def fake(fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Its jobs wait in the queue for ever."""
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "LOOK_SECONDS", 0.02)
    (fake_slurm.folder / "idle").write_text("Priority")
    return fake_slurm


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Of a device that is not a CPU, so that its cores are left to Slurm."""
    return [Job(str(tmp_path / "runs"), digit * 16, "", {"device": "cuda"}, "", 1.0, 4) for digit in "abc"]


def fail(job: Job) -> None:
    folder_of(job).fail({"reason": "a bug", "phase": "training", "step": 1, "at": now()})


def given(executor: SlurmExecutor, jobs: list[Job], seconds: float = 0.1) -> list[str]:
    for job in jobs:
        executor.submit(job)
    return executor.poll(seconds)


def test_workers_are_submitted_once_with_the_options_given_and_their_runs(fake: FakeSlurm, jobs: list[Job]) -> None:
    executor = SlurmExecutor("tiny@tiny", workers=2, options=["--partition=gpu", "--gpus=1"], jobs=4)
    assert given(executor, jobs) == []
    [words] = fake.calls("sbatch")
    assert words[-2:] == ["--partition=gpu", "--gpus=1"] and "--array=0-0" in words  # three runs, four at a time
    assert {"--requeue", "--signal=B:USR1@120"} < set(words) and not any("cpus-per-task" in word for word in words)
    [waiting] = fake.jobs()
    script = Path(json.loads(waiting.read_text())["script"]).read_text()
    assert f"work --runs {jobs[0].root} --jobs 4 {' '.join(job.run_id for job in jobs)} &" in script
    assert all(job.path.exists() for job in jobs)
    fail(jobs[1])
    assert executor.poll(1) == [jobs[1].run_id] and executor.collect(jobs[1].run_id) == "failed"
    executor.submit(jobs[1])  # the failure is older than that, so that it is no ending
    assert executor.poll(0.1) == [] and len(fake.calls("sbatch")) == 1
    executor.cancel(jobs[0].run_id)
    assert executor.poll(1) == [jobs[0].run_id] and executor.collect(jobs[0].run_id) == "preempted"
    assert not jobs[0].path.exists() and not fake.calls("scancel")
    executor.close()
    assert not fake.jobs() and all("--name=gpt2lab-tiny@tiny-" in words[1] for words in fake.calls("scancel"))


def test_workers_whose_runs_have_several_ranks_have_one_run_at_a_time(fake: FakeSlurm, jobs: list[Job]) -> None:
    executor = SlurmExecutor("tiny@tiny", workers=2, options=["--gpus=8"], ranks=8)
    assert given(executor, jobs) == []
    [words] = fake.calls("sbatch")
    assert "--array=0-1" in words and not any("cpus-per-task" in word for word in words)
    script = Path(json.loads(fake.jobs()[0].read_text())["script"]).read_text()
    assert f"work --runs {jobs[0].root} --nproc 8 {jobs[0].run_id}" in script and "--jobs" not in script
    executor.close()
    on_cpu = SlurmExecutor("tiny@tiny", ranks=8)
    assert given(on_cpu, [replace(jobs[0], identity={"device": "cpu"})]) == []  # of four threads
    assert "--cpus-per-task=32" in fake.calls("sbatch")[-1]
    on_cpu.close()


def test_another_process_finds_the_workers_and_leaves_them_at_work(
    fake: FakeSlurm, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    given(SlurmExecutor("tiny@tiny", workers=3), jobs)
    assert len(fake.jobs()) == 3 and "--array=0-2" in fake.calls("sbatch")[0]
    given(SlurmExecutor("tiny@others", workers=1), jobs)
    assert len(fake.jobs()) == 4
    again = SlurmExecutor("tiny@tiny", workers=3)
    scheduler = Scheduler(again, lambda: scheduler.stop())
    with pytest.raises(Preempted, match=r"the workers go on in Slurm; scancel --me --name=gpt2lab-tiny@tiny-"):
        scheduler.run(jobs)
    assert len(fake.jobs()) == 4 and len(fake.calls("sbatch")) == 2 and not fake.calls("scancel")
    fake.jobs()[0].unlink()  # one of the three has ended
    given(again, jobs)
    assert "--array=0-0" in fake.calls("sbatch")[-1] and len(fake.jobs()) == 4
    shutil.rmtree(fake.folder / "queue")
    (fake.folder / "queue").mkdir()
    with pytest.raises(Preempted, match="was cancelled"):  # by somebody else, so they are not submitted again
        again.poll(0.1)


def test_what_slurm_refuses_is_told_in_its_words(fake: FakeSlurm, jobs: list[Job]) -> None:
    said: list[str] = []
    executor = SlurmExecutor("tiny@tiny", workers=3, say=said.append)
    (fake.folder / "refuse").write_text("sbatch: error: invalid partition specified: gpux")
    with pytest.raises(EnvironmentFault, match="invalid partition specified: gpux"):
        given(executor, jobs)
    (fake.folder / "refuse").unlink()
    (fake.folder / "idle").write_text("PartitionTimeLimit")
    executor.poll(0.1)
    assert len(fake.jobs()) == 3
    executor.poll(0.1)
    assert said == ["Slurm keeps workers of tiny@tiny waiting: PartitionTimeLimit"]
    (fake.folder / "refuse").write_text("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    fake.jobs()[0].unlink()
    given(executor, jobs)
    assert "QOSMaxSubmitJobPerUserLimit; 2 workers go on without more" in said[1] and len(said) == 2


@pytest.mark.parametrize(
    ("log", "ending"),
    [
        (
            "gpt2lab: error [ENVIRONMENT] run a: another run here\ntry: x\nworker ended: exit code 3 ",
            "another run here",
        ),
        ("/usr/bin/python: No module named gpt2lab\nworker ended: exit code 1 ", "No module named"),
        ("2 trained here, 1 failed; nothing else is left to do\nworker ended: exit code 1 ", "lost"),
        ("/bin/bash: python: command not found\nworker ended: exit code 127 ", "command not found"),
        ("worker ended: exit code 75 TERM", "cancelled"),
        ("worker ended: exit code 143 TERM", "cancelled"),  # before it listened
        (None, "cancelled"),
        ("", "lost"),  # killed
    ],
)
def test_workers_that_are_gone(fake: FakeSlurm, jobs: list[Job], log: str | None, ending: str) -> None:
    executor = SlurmExecutor("tiny@tiny")
    given(executor, jobs[:1])
    [waiting] = fake.jobs()
    if log is not None:
        Path(json.loads(waiting.read_text())["output"]).write_text(log)
    waiting.unlink()
    if ending == "lost":
        assert executor.poll(1) == [jobs[0].run_id] and executor.collect(jobs[0].run_id) == "lost"
        return
    with pytest.raises((EnvironmentFault, Preempted), match=ending):
        executor.poll(1)


def test_without_slurm_one_line_says_so(jobs: list[Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="sbatch: No such file"):
        given(SlurmExecutor("tiny@tiny"), jobs)


# On a real Slurm


def local_rows(tiny: Path, *overrides: str, seeds: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Run id -> its rows, of the same study trained in this process."""
    store = Store(tiny.parent / "local")
    executor = InlineExecutor()
    api.run_ablation(tiny, seeds=seeds, overrides=overrides, runs=store.root, tracking=False, executor=executor)
    return {run: rows_of(store.run(run)) for run in executor.trained}


@pytest.mark.service
def test_a_study_through_slurm_is_the_local_one(
    cluster: Slurm, tiny: Path, gpt2lab: Callable[..., tuple[int, str]]
) -> None:
    code, said = gpt2lab("run", str(tiny), "--executor", "slurm", "--workers", "2", "--no-tracking")
    assert code == 0 and "0 runs found finished, 4 trained now" in said
    store, rows = Store("runs"), local_rows(tiny)
    assert len(rows) == 4 and all(rows_of(store.run(run)) == rows[run] for run in rows)
    assert len(list((store.root / "slurm").glob("*.log"))) == 2
    code, said = gpt2lab("run", str(tiny), "--executor", "slurm", "--no-tracking")
    assert code == 0 and "4 runs found finished, 0 trained now" in said and not cluster.states()


@pytest.mark.service
def test_left_found_requeued_and_killed_it_is_the_undisturbed_one(cluster: Slurm, tiny: Path) -> None:
    store = Store(tiny.parent / "runs")
    steps = ["training.steps=1500", "training.checkpoint_every_steps=50", "evaluation.every_steps=100"]
    numbers = list[str]()

    def number() -> str:
        return cluster.said("squeue", "--noheader", "--format=%A").strip()

    def begun() -> RunFolder | None:
        return next((run for run in store.runs() if run.last_step() > 20 and run.result() is None), None)

    def leave(event: Event) -> None:
        if begun():
            os.kill(os.getpid(), signal.SIGHUP)

    def disturb(event: Event) -> None:
        run = begun()
        if run and run.status() == "running" and len(numbers) < 2 and run.last_step() > 400 * len(numbers):
            numbers.append(number())
            if len(numbers) == 1:
                cluster.said("scancel", "--batch", "--signal=USR1", number())
                wait_until(lambda: run.status() == "partial" and cluster.states() == ["PENDING"])
                assert run.saved_step() == run.last_step() < 1500
                cluster.start_requeued(number())
            else:
                psutil.Process(run.holder()["pid"]).parents()[1].kill()  # the worker, by way of its fork server
                wait_until(lambda: run.status() == "partial" and number() != numbers[0])

    def train(on_event: Listener) -> StudyResult:
        executor = SlurmExecutor("tiny@tiny")
        return api.run_ablation(
            tiny, seeds=1, overrides=steps, runs=store.root, tracking=False, executor=executor, on_event=on_event
        )

    with pytest.raises(Preempted, match="the workers go on in Slurm"):
        train(leave)
    assert cluster.states() == ["RUNNING"]
    assert not train(disturb).failed and len(numbers) == 2 and numbers[0] == numbers[1]
    rows = local_rows(tiny, *steps, seeds=1)
    assert all(rows_of(run) == rows[run.id] for run in store.runs()) and len(store.runs()) == 2


@pytest.mark.service
def test_what_cannot_start_is_told_and_what_is_cancelled_is_saved(cluster: Slurm, tiny: Path) -> None:
    said, store = list[str](), Store(tiny.parent / "runs")

    def train(on_event: Listener, *options: str) -> None:
        executor = SlurmExecutor("tiny@tiny", options=options, say=said.append)
        api.run_ablation(
            tiny, overrides=["training.steps=100000"], runs=store.root, tracking=False, executor=executor,
            on_event=on_event,
        )  # fmt: skip

    def stop(event: Event) -> None:
        if said:
            os.kill(os.getpid(), signal.SIGTERM)

    def cancel(event: Event) -> None:
        if any(run.last_step() > 20 for run in store.runs()):
            cluster.said("scancel", "--me", f"--name={executor_name}")

    with pytest.raises(EnvironmentFault, match="invalid partition specified: nowhere"):
        train(stop, "--partition=nowhere")
    with pytest.raises(Preempted) as left:
        train(stop, "--partition=short", "--time=10")
    assert said == ["Slurm keeps workers of tiny@tiny waiting: PartitionTimeLimit"]
    executor_name = str(left.value).partition("--name=")[2].split()[0]
    cluster.said("scancel", "--me", f"--name={executor_name}")
    wait_until(lambda: not cluster.states())
    other = cluster.said("sbatch", "--parsable", "--chdir=/tmp", "--output=/dev/null", "--wrap=sleep 300").strip()
    with pytest.raises(Preempted, match="was cancelled; nothing is lost"):
        train(cancel)
    [begun] = [run for run in store.runs() if run.rows()]
    assert begun.status() == "partial" and begun.saved_step() == begun.last_step() > 0
    assert cluster.said("squeue", "--noheader", "--format=%A").split() == [other]
