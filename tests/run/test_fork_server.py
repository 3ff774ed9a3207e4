"""Workers forked from a server that has imported torch: as clean as new processes, as hard to lose, only sooner."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2lab import api
from gpt2lab.errors import LockHeld, Preempted
from gpt2lab.executors.fork_server import Forked, ForkServer
from gpt2lab.executors.local import SERVERS, LocalExecutor, Start, start_process
from gpt2lab.executors.local import started as started_worker
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.experiments.ablation import job_of, longest_first
from gpt2lab.planning.plan import Plan
from gpt2lab.runner import NOTHING_LEFT, Job
from gpt2lab.store import RunFolder, Store

EXACT = ("status", "reason", "steps", "tokens", "flops_per_token", "metrics", "skipped_steps", "spikes")
"""The fields of a result that equal runs have in common: the others are about time and memory."""

# what a worker finds around itself when it builds its model
WITNESS = """
import json, os, pathlib, random, signal, stat, sys, threading
import torch
from gpt2lab.components.norm import norm

def around():
    kinds = [stat.S_IFMT(os.stat(f"/proc/self/fd/{fd}").st_mode) for fd in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{fd}")]
    return {
        "environment": {k: v for k, v in os.environ.items() if k not in ("GPT2LAB_PARENT", "LC_CTYPE")},
        "parent": os.environ["GPT2LAB_PARENT"] == str(os.getppid()),
        "leads a session": os.getsid(0) == os.getpid(),
        "folder": os.getcwd(),
        "input": sys.stdin.read(1),
        "blocked": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "child handler": str(signal.getsignal(signal.SIGCHLD)),
        "wake-up": signal.set_wakeup_fd(-1),
        "sockets": sum(map(stat.S_ISSOCK, kinds)),
        "threads": [t.name for t in threading.enumerate()],
        "torch's threads": torch.get_num_threads(),
        "cuda": [torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()],
    }

@norm.register("witness", source="a test")
def witness(site):
    \"\"\"LayerNorm; says what is around it.\"\"\"
    if torch.empty(0).device.type != "meta":
        pathlib.Path(os.environ["WITNESS"]).write_text(json.dumps(around()))
    return torch.nn.LayerNorm(site.width or site.dims.n_embd)
"""


def plan_of(tiny: Path, *overrides: str, plugin: str | None = None) -> Plan:
    plugins = () if plugin is None else (plugin,)
    return api.plan(tiny, overrides=overrides, plugins=plugins, runs=tiny.parent / "runs")


def started(start: Start, job: Job, **environment: str) -> Any:
    job.write()
    return started_worker(start, job, **environment)


def jobs_of(tiny: Path, *overrides: str, plugin: str | None = None) -> list[Job]:
    plan = plan_of(tiny, *overrides, plugin=plugin)
    return [job_of(run, Store(tiny.parent / "runs"), plan) for run in plan.runs()]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """One for all tests of this file that do not kill it."""
    made = ForkServer()
    yield made
    made.close()


def wait_until(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def folder_of(job: Job) -> RunFolder:
    return Store(job.root).run(job.run_id)


def everything(run: RunFolder) -> dict[str, Any]:
    """All that a run left, without what may differ: text as text, the rest as bytes."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.path.rglob("*") if path.is_file()):
        name = str(path.relative_to(run.path))
        if name in ("lock", "run.log", "run.json") or path.name in ("state.json", "manifest.json"):
            continue  # times, and sums over times
        if name == "metrics.jsonl":
            found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in run.rows()]
        elif name == "result.json":
            result = json.loads(path.read_text())
            found[name] = {key: result[key] for key in EXACT}
        else:
            found[name] = path.read_bytes()
    return found


def trained_both_ways(server: ForkServer, job: Job) -> list[dict[str, Any]]:
    found = []
    for name, start in (("warm", server.start), ("cold", start_process)):
        there = replace(job, root=f"{job.root}-{name}")
        assert started(start, there).wait() == 0, (folder_of(there).path / "run.log").read_text()
        found.append(everything(folder_of(there)))
    return found


@pytest.mark.slow
def test_a_fork_trains_the_same_bits_as_a_process_from_scratch(tiny: Path, server: ForkServer) -> None:
    warm, cold = trained_both_ways(server, jobs_of(tiny)[0])
    assert warm == cold
    assert any("optimizer" in name for name in warm) and any("model.safetensors" in name for name in warm)


@pytest.mark.slow
def test_the_same_with_two_threads_which_give_other_bits_than_one(tiny: Path, server: ForkServer) -> None:
    wide = ("model.n_embd=256", "training.batch_tokens=1024", "training.steps=3", "optim.warmup_steps=1")
    found = {}
    for threads in (1, 2):
        preset = tiny.parent / "tiny.yaml"
        preset.write_text(preset.read_text().replace("threads: 1", f"threads: {threads}"))
        job = jobs_of(tiny, *wide)[0]
        assert job.threads == threads
        warm, cold = trained_both_ways(server, job)
        assert warm == cold
        found[threads] = warm["metrics.jsonl"]
    assert found[1] != found[2]


@pytest.mark.slow
def test_a_fork_finds_around_itself_what_a_process_from_scratch_finds(
    tiny: Path, tmp_path: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "witness.py"
    plugin.write_text(WITNESS)
    job = jobs_of(tiny, "model.norm=witness", plugin=str(plugin))[0]
    started(server.start, replace(jobs_of(tiny)[0], root=str(tmp_path / "beside")))  # its pipe must not be inherited
    monkeypatch.chdir(tmp_path)  # after the server started
    found = []
    for name, start in (("warm", server.start), ("cold", start_process)):
        there = replace(job, root=f"{job.root}-{name}")
        environment = {"WITNESS": str(tmp_path / "said.json"), "NEW": "x", "CUDA_VISIBLE_DEVICES": "3"}
        assert started(start, there, **environment).wait() == 0, (folder_of(there).path / "run.log").read_text()
        found.append(json.loads((tmp_path / "said.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["environment"]["CUDA_VISIBLE_DEVICES"] == "3" and found[0]["blocked"] == []
    assert found[0]["parent"] and found[0]["leads a session"] and found[0]["input"] == "" and not found[0]["sockets"]


def test_the_server_has_one_thread_and_its_workers_start_within_a_fraction_of_a_second(
    tiny: Path, server: ForkServer
) -> None:
    job, other = jobs_of(tiny)[0], jobs_of(tiny, "training.steps=400")[1]
    assert started(server.start, job).wait() == 0
    assert server.process is not None
    assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1
    process = started(server.start, other)
    assert isinstance(process, Forked)
    wait_until(lambda: len(folder_of(other).rows()) > 1)
    process.poll()
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    # of the processor's time, as the machine may be busy; importing torch takes five times as much
    assert sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") < 0.5
    assert process.wait() == 0


def test_exit_codes_are_those_of_processes_from_scratch(tiny: Path, server: ForkServer) -> None:
    plenty = jobs_of(tiny, "training.steps=100000")
    job, held, killed = jobs_of(tiny)[0], *plenty[:2]
    assert started(server.start, job, GPT2LAB_FAULT="raise@step:3").wait() == 1  # the environment comes with the job
    failure = folder_of(job).failure()
    assert failure is not None and "injected at step" in failure["reason"] and failure["step"] in (2, 3)
    assert "InjectedFault" in (folder_of(job).path / "run.log").read_text()
    assert started(server.start, job).wait() == 0
    assert started(server.start, job).wait() == NOTHING_LEFT
    assert started(server.start, job, GPT2LAB_FAULT="nonsense").wait() == 2
    with folder_of(held).lock():
        assert started(server.start, held).wait() == LockHeld.exit_code
    process = started(server.start, killed)
    wait_until(lambda: len(folder_of(killed).rows()) > 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == Preempted.exit_code
    assert json.loads(next(folder_of(killed).checkpoints.glob("*/state.json")).read_text())["step"] > 0
    process = started(server.start, killed)
    wait_until(lambda: process.poll() is None and getattr(process, "pid", None))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_signal_that_comes_before_the_worker_reaches_it(tiny: Path) -> None:
    job = jobs_of(tiny, "training.steps=100000")[0]
    fresh = ForkServer()
    try:
        process = started(fresh.start, job)
        assert isinstance(process, Forked) and process.pid is None
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None)
        assert process.returncode == Preempted.exit_code
    finally:
        fresh.close()


@pytest.mark.slow
def test_who_kills_the_server_stops_its_workers_and_a_new_one_goes_on(tiny: Path) -> None:
    jobs = jobs_of(tiny, "training.steps=300")[:2]
    killed = []

    def tick() -> None:
        process = executor._server.process
        if process is not None and not killed and all(len(folder_of(job).rows()) > 5 for job in jobs):
            killed.append(process.pid)
            process.kill()

    executor = LocalExecutor(2)
    assert Scheduler(executor, tick).run(jobs) == {job.run_id: "done" for job in jobs}
    assert killed and executor._server.launched == 2
    for job in jobs:
        said = (folder_of(job).path / "run.log").read_text()
        assert "the process that starts workers ended (killed by SIGKILL); it is started again" in said
        assert [row["step"] for row in folder_of(job).rows()] == list(range(301))
    assert all("stopped after step" in (folder_of(job).path / "run.log").read_text() for job in jobs)  # and saved


@pytest.mark.slow
def test_without_a_server_that_works_runs_get_processes_from_scratch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *fork_server*) echo broken >&2; exit 3;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    jobs = jobs_of(tiny)[:2]
    executor = LocalExecutor(2)
    assert Scheduler(executor).run(jobs) == {job.run_id: "done" for job in jobs}
    assert executor._server.launched >= SERVERS and not executor.fork
    assert "ended (exit code 3: broken)" in (folder_of(jobs[0]).path / "run.log").read_text()


@pytest.mark.slow
def test_a_killed_worker_takes_nobody_with_it(tiny: Path) -> None:
    jobs = jobs_of(tiny, "training.steps=200")[:3]
    victims = []

    def tick() -> None:
        if not victims and (holder := folder_of(jobs[0]).holder()) and len(folder_of(jobs[0]).rows()) > 3:
            victims.append(holder["pid"])
            os.kill(holder["pid"], signal.SIGKILL)

    executor = LocalExecutor(2)
    assert Scheduler(executor, tick).run(jobs) == {
        jobs[0].run_id: "failed",
        jobs[1].run_id: "done",
        jobs[2].run_id: "done",
    }
    failure = folder_of(jobs[0]).failure()
    assert failure is not None and failure["reason"].startswith("killed by SIGKILL (out of memory?); see ")
    assert executor._server.launched == 1


def test_in_a_thread_an_executor_is_stopped_by_its_method(tiny: Path) -> None:
    jobs = jobs_of(tiny, "training.steps=100000")
    scheduler, raised = Scheduler(LocalExecutor(2)), []

    def run() -> None:
        try:
            scheduler.run(jobs)
        except Preempted as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: all(len(folder_of(job).rows()) > 2 for job in jobs[:2]))
    scheduler.stop()
    thread.join(20)
    assert raised == ["stopped: 2 runs ended or saved, 2 not begun; nothing is lost"]
    assert [folder_of(job).status() for job in jobs] == ["partial", "partial", "absent", "absent"]


CALLER = """
import sys
from pathlib import Path
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.runner import Job
executor = LocalExecutor(2)
jobs = [Job.read(Path(line)) for line in sys.stdin.read().splitlines()]
Scheduler(executor, lambda: executor._server.process and print(executor._server.process.pid, flush=True)).run(jobs)
"""


@pytest.mark.slow
def test_who_kills_the_executor_ends_server_and_workers_which_save(tiny: Path) -> None:
    jobs = jobs_of(tiny, "training.steps=100000")[:2]
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tiny.parent
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        process.stdin.write("\n".join(str(job.write()) for job in jobs))
        process.stdin.close()
        server = int(process.stdout.readline())
        wait_until(lambda: all(len(folder_of(job).rows()) > 4 for job in jobs))
        workers = [folder_of(job).holder()["pid"] for job in jobs]
        process.kill()
    wait_until(lambda: not any(map(alive, [server, *workers])), 10)
    for job in jobs:
        rows, run = folder_of(job).rows(), folder_of(job)
        newest = max(json.loads(state.read_text())["step"] for state in run.checkpoints.glob("*/state.json"))
        assert newest == rows[-1]["step"]
        assert f"stopped after step {newest}" in (run.path / "run.log").read_text()


def alive(pid: int) -> bool:
    """Whether it still runs; a zombie has ended."""
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def test_within_a_seed_the_costliest_run_is_started_first(tiny: Path) -> None:
    (tiny.parent / "ablation.yaml").write_text(
        tiny.read_text().replace(
            "rotary: {model.position: rotary}", "deep: {model.n_layer: 4}\n  flat: {model.n_layer: 1}"
        )
    )
    plan = plan_of(tiny)
    runs = plan.runs()
    dice = random.Random(1)
    dice.shuffle(runs)
    order = [(run.seed, run.arm) for run in longest_first(runs, plan)]
    assert order == [(seed, arm) for seed in (0, 1) for arm in ("deep", "learned", "flat")]
