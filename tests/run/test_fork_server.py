"""Workers forked from a server that has imported torch: as clean as new processes, as hard to lose, only sooner."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from workers import folder_of, is_alive, jobs_of, replace_in, rows_of, wait_until

from gpt2lab import api
from gpt2lab.basics import early
from gpt2lab.basics.forks import Forked, ForkServer
from gpt2lab.errors import LockHeld, Preempted
from gpt2lab.executors.local import SERVERS, LocalExecutor, Start, start_process
from gpt2lab.executors.local import started as started_worker
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.experiments.ablation import longest_first
from gpt2lab.runner import NOTHING_LEFT, Job
from gpt2lab.store import RunFolder

ENDLESS = "training.steps=100000"
EXACT = ("status", "reason", "steps", "tokens", "flops_per_token", "metrics", "skipped_steps", "spikes")
"""The fields of a result that equal runs have in common: the others are about time and memory."""

TIMED = ("state.json", "manifest.json")  # times, and sums over times

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


def started(start: Start, job: Job, **environment: str) -> Any:
    job.write()
    return started_worker(start, job, **environment)


def log_of(job: Job) -> str:
    return (folder_of(job).path / "run.log").read_text()


def everything(run: RunFolder) -> dict[str, Any]:
    """All that a run left, without what may differ."""
    content: dict[str, Any] = {"journal": rows_of(run)}
    for path in sorted(path for path in run.path.rglob("*") if path.is_file()):
        name = str(path.relative_to(run.path))
        if name == "result.json":
            result = json.loads(path.read_text())
            content[name] = {key: result[key] for key in EXACT}
        elif path.name not in (*TIMED, "lock", "job.json", "run.log", "run.json", "metrics.jsonl"):
            content[name] = path.read_bytes()
    return content


def both_ways(server: ForkServer, job: Job, **environment: str) -> Iterator[Job]:
    """Train the run as a fork and as a process from scratch, in stores of their own."""
    for name, start in (("fork", server.start), ("new", start_process)):
        there = replace(job, root=f"{job.root}-{name}")
        assert started(start, there, **environment).wait() == 0, log_of(there)
        yield there


@pytest.mark.slow
def test_a_fork_trains_the_same_bits_as_a_process_from_scratch(tiny: Path, server: ForkServer) -> None:
    fork, new = (everything(folder_of(there)) for there in both_ways(server, jobs_of(tiny)[0]))
    assert fork == new
    assert any("optimizer" in name for name in fork) and any("model.safetensors" in name for name in fork)


@pytest.mark.slow
def test_the_same_with_two_threads_which_give_other_bits_than_one(tiny: Path, server: ForkServer) -> None:
    wide = ("model.n_embd=256", "training.batch_tokens=1024", "training.steps=3", "optim.warmup_steps=1")
    journals = []
    for threads in (1, 2):
        replace_in(tiny.parent / "tiny.yaml", ("threads: 1", f"threads: {threads}"))
        fork, new = (everything(folder_of(there)) for there in both_ways(server, jobs_of(tiny, *wide)[0]))
        assert fork == new
        journals.append(fork["journal"])
    assert journals[0] != journals[1]


@pytest.mark.slow
def test_a_fork_finds_around_itself_what_a_process_from_scratch_finds(
    tiny: Path, tmp_path: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "witness.py"
    plugin.write_text(WITNESS)
    job = jobs_of(tiny, "model.norm=witness", plugin=str(plugin))[0]
    started(server.start, replace(jobs_of(tiny)[0], root=str(tmp_path / "beside")))  # its pipe must not be inherited
    monkeypatch.chdir(tmp_path)  # after the server started
    environment = {"WITNESS": str(tmp_path / "around.json"), "NEW": "x", "CUDA_VISIBLE_DEVICES": "3"}
    fork, new = (json.loads((tmp_path / "around.json").read_text()) for _ in both_ways(server, job, **environment))
    assert fork == new
    assert fork["environment"]["CUDA_VISIBLE_DEVICES"] == "3" and fork["blocked"] == []
    assert fork["parent"] and fork["leads a session"] and fork["input"] == "" and not fork["sockets"]


def test_the_server_has_one_thread_and_its_workers_start_at_once(tiny: Path, server: ForkServer) -> None:
    job, other = jobs_of(tiny)[0], jobs_of(tiny, "training.steps=100")[1]
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
    plenty = jobs_of(tiny, ENDLESS)
    job, held, killed = jobs_of(tiny)[0], *plenty[:2]
    assert started(server.start, job, GPT2LAB_FAULT="raise@step:3").wait() == 1  # the environment comes with the job
    failure = folder_of(job).failure()
    assert failure is not None and "injected at step" in failure["reason"] and failure["step"] in (2, 3)
    assert "InjectedFault" in log_of(job)
    assert started(server.start, job).wait() == 0
    assert started(server.start, job).wait() == NOTHING_LEFT
    assert started(server.start, job, GPT2LAB_FAULT="nonsense").wait() == 2
    with folder_of(held).lock():
        assert started(server.start, held).wait() == LockHeld.exit_code
    process = started(server.start, killed)
    wait_until(lambda: len(folder_of(killed).rows()) > 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == Preempted.exit_code
    assert any(folder_of(killed).checkpoints.iterdir())
    process = started(server.start, killed)
    wait_until(lambda: process.poll() is None and getattr(process, "pid", None))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_signal_that_comes_before_the_worker_reaches_it(tiny: Path) -> None:
    job = jobs_of(tiny, ENDLESS)[0]
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
        assert "the process that starts workers ended (killed by SIGKILL); it is started again" in log_of(job)
        assert "stopped after step" in log_of(job)  # and saved
        assert [row["step"] for row in folder_of(job).rows()] == list(range(301))


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
    assert "ended (exit code 3: broken)" in log_of(jobs[0])


@pytest.mark.slow
def test_a_killed_worker_leaves_the_others_running(tiny: Path) -> None:
    jobs = jobs_of(tiny, "training.steps=200")[:3]
    victims = []

    def tick() -> None:
        if not victims and (holder := folder_of(jobs[0]).holder()) and len(folder_of(jobs[0]).rows()) > 3:
            victims.append(holder["pid"])
            os.kill(holder["pid"], signal.SIGKILL)

    executor = LocalExecutor(2)
    endings = Scheduler(executor, tick).run(jobs)
    assert [endings[job.run_id] for job in jobs] == ["failed", "done", "done"]
    failure = folder_of(jobs[0]).failure()
    assert failure is not None and failure["reason"].startswith("killed by SIGKILL (out of memory?); see ")
    assert executor._server.launched == 1


def test_in_a_thread_an_executor_is_stopped_by_its_method(tiny: Path, forks: None) -> None:
    jobs = jobs_of(tiny, ENDLESS)
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
    jobs = jobs_of(tiny, ENDLESS)[:2]
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
    wait_until(lambda: not any(map(is_alive, [server, *workers])), 10)
    for job in jobs:
        step = max(folder_of(job).checkpoints.iterdir()).name.removeprefix("step_").lstrip("0")
        assert step == str(folder_of(job).rows()[-1]["step"]) and f"stopped after step {step}" in log_of(job)


def test_within_a_seed_the_costliest_run_is_started_first(tiny: Path) -> None:
    arms = "deep: {model.n_layer: 4}\n  flat: {model.n_layer: 1}"
    replace_in(tiny, ("rotary: {model.position: rotary}", arms))
    plan = api.plan(tiny, runs=tiny.parent / "runs")
    runs = plan.runs()
    random.Random(1).shuffle(runs)
    order = [(run.seed, run.arm) for run in longest_first(runs, plan)]
    assert order == [(seed, arm) for seed in (0, 1) for arm in ("deep", "learned", "flat")]


def test_a_server_that_was_started_early_serves_the_first_executor_and_an_unused_one_ends(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, executor = jobs_of(tiny)[0], LocalExecutor(1)
    with early.started_early(wanted=True):
        assert not early._early  # this process has imported torch, so nothing would be gained
    monkeypatch.delitem(sys.modules, "torch")
    with early.started_early(wanted=True):
        (server,) = early._early
        assert Scheduler(executor).run([job]) == {job.run_id: "done"}
        assert executor._server.launched == 1 and server.process.returncode == -signal.SIGKILL and not early._early
    with early.started_early(wanted=True):
        (unused,) = early._early
    assert unused.process.returncode == -signal.SIGKILL and not early._early


@pytest.mark.parametrize(
    "words", ["run posenc --scale nano", "sweep lr --scale nano", "train nano", "noise nano", "try norm=rmsnorm"]
)
def test_commands_that_train_start_it_before_they_import_torch_themselves(words: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom gpt2lab.basics import early\nfrom gpt2lab.cli import main\n"
        "def launch(): raise SystemExit(71)\n"
        f"early.launch, sys.argv = launch, {['gpt2lab', *words.split(), '--max-days', '0']}\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 71, done.stdout + done.stderr
