"""Stops and ends that come early, late or twice: of a worker, of ranks that have not met, of a whole command."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import pytest
from workers import SWEEP, command, is_alive, wait_for_rows, wait_until

from gpt2lab.basics.signals import PARENT, STOP_SIGNALS, Stopped, StopRequest, die_with_parent, stop_command
from gpt2lab.cli import execute
from gpt2lab.errors import EnvironmentFault, Preempted, RankLost
from gpt2lab.executors import worker_command
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.executors.ranks import RanksExecutor
from gpt2lab.runner import Job, worker
from gpt2lab.store import Store
from gpt2lab.training import ranks
from gpt2lab.training.ranks import find_store, host_store


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = Job(str(tmp_path), "a" * 16, "", {}, "", 1.0, 1)
    made.write()
    return made


def test_a_component_that_exits_fails_its_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object) -> bool:
        sys.exit(0)

    monkeypatch.setattr(worker, "execute", leave)
    assert worker.work(job, StopRequest()) == 1
    assert (Store(job.root).run(job.run_id).failure() or {})["reason"] == "SystemExit: 0"


# before torch is imported


SLOW_TORCH = """
import importlib.abc, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            open(NOTE, "w").close()
            for _ in range(6000):  # a stop that comes between two instructions waits for the next sleep
                time.sleep(0.01)
sys.meta_path.insert(0, Slow())
"""


@pytest.fixture
def importing(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, str], Path]:
    """A worker's command and environment; it comes as far as importing torch, and then there is a file."""
    note = tmp_path / "importing"
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(f"NOTE = {str(note)!r}\n{SLOW_TORCH}")
    path = os.pathsep.join([str(tmp_path / "slow"), *filter(None, [os.environ.get("PYTHONPATH"), *sys.path])])
    return worker_command(job), {**os.environ, "PYTHONPATH": path}, note


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_worker_that_is_still_importing_stops_without_loss(importing: Any, number: signal.Signals) -> None:
    command, environment, note = importing
    with subprocess.Popen(command, env={**environment, PARENT: str(os.getpid())}) as worker:
        wait_until(note.exists, 20)
        worker.send_signal(number)
        assert worker.wait(5) == Preempted.exit_code


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_ends_with_its_parent_while_it_is_still_importing(importing: Any, tmp_path: Path) -> None:
    command, environment, note = importing
    script = f"import os, subprocess, time; os.environ[{PARENT!r}] = str(os.getpid())\n"
    script += f"worker = subprocess.Popen({command!r}); print(worker.pid, flush=True); time.sleep(60)"
    starter = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    worker = int(starter.stdout.readline())
    wait_until(note.exists, 20)
    assert is_alive(worker)
    starter.kill()
    starter.communicate()
    wait_until(lambda: not is_alive(worker), 3)


def test_a_worker_whose_parent_was_gone_before_it_began_ends_at_once(importing: Any) -> None:
    command, environment, note = importing
    assert subprocess.run(command, env={**environment, PARENT: "1"}, timeout=10, check=False).returncode == 75
    assert not note.exists()


# ranks that have not met


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket at the port where ranks are to meet, which listens and never answers."""
    monkeypatch.setattr(ranks, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        yield server


def test_a_port_that_another_program_has_is_refused_by_every_rank(meeting: socket.socket) -> None:
    with pytest.raises(EnvironmentFault, match=r"MASTER_PORT: the ranks cannot meet at port \d+: .*in use"):
        host_store(2)
    with pytest.raises(EnvironmentFault, match="no store of ranks; another program has the port"):
        find_store(None, lambda: False)


def test_a_host_that_does_not_come_is_waited_for_until_a_stop_or_the_end_and_named(
    meeting: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting.close()
    asked: list[float] = []

    def stopped() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 2

    with pytest.raises(Preempted, match="before the training began"):
        find_store(None, stopped)
    monkeypatch.setattr(ranks, "JOIN_SECONDS", 0.1)
    with pytest.raises(RankLost, match=r"rank 0 did not come to 127\.0\.0\.1:\d+ within 0 s: Connection refused"):
        find_store(None, lambda: False)


class Sleeper(subprocess.Popen[bytes]):
    """In place of a rank; the second one cannot be started."""

    made: ClassVar[list[Sleeper]] = []

    def __init__(self, job: Job, environment: Mapping[str, str], log: IO[str]) -> None:
        if environment["RANK"] == "1":
            raise BlockingIOError(11, "Resource temporarily unavailable")
        super().__init__(["sleep", "60"])
        self.made.append(self)


def test_no_rank_outlives_the_failed_start_of_another(job: Job) -> None:
    executor = RanksExecutor(2, Sleeper)
    with pytest.raises(EnvironmentFault, match="no process can be started: Resource temporarily unavailable") as caught:
        executor.submit(job)
    assert caught.value.exit_code == 3
    assert [rank.poll() for rank in Sleeper.made] == [-signal.SIGKILL]
    executor.close()


def test_a_worker_that_cannot_be_started_is_one_line(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for fork in (False, True):
        executor = LocalExecutor(1, fork=fork)
        with pytest.raises(EnvironmentFault, match="no process can be started"):
            executor.submit(job)
        executor.close()


# a command


@pytest.mark.parametrize("number", [n for n in STOP_SIGNALS if n != signal.SIGINT], ids=lambda number: number.name)
def test_a_command_that_is_stopped_while_nothing_trains_says_so(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice in a row, and no handler of errors keeps it."""
    ended: list[str] = []

    def plan(self: object) -> list[str]:
        try:
            with contextlib.suppress(Exception):
                os.kill(os.getpid(), number)
                time.sleep(5)
        finally:
            os.kill(os.getpid(), number)
            ended.append("in order")
        return []

    monkeypatch.setattr(Store, "studies", plan)
    stop_command()
    assert execute(["runs", "--runs", str(tmp_path)], debug=False) == 75 and ended == ["in order"]
    assert f"error [PREEMPTED] stopped by {number.name} while nothing trained" in capsys.readouterr().err


def test_a_second_signal_does_not_disturb_a_command_that_is_stopping() -> None:
    stop_command()
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        raise Preempted("saved")
    except Preempted:
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupt_after_a_stop_says_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def closing(self: object) -> list[str]:
        try:
            raise Preempted("saved")
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    monkeypatch.setattr(Store, "studies", closing)
    stop_command()
    assert execute(["runs", "--runs", str(tmp_path)], debug=False) == 130
    assert "ended at once; every run continues from its last checkpoint" in capfd.readouterr().err


def test_elsewhere_than_on_linux_a_thread_looks_for_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("gpt2lab.basics.signals.LOOK_SECONDS", 0.01)
    monkeypatch.setattr(os, "getppid", lambda: 2 if gone else 1)
    monkeypatch.setenv(PARENT, "1")
    gone: list[str] = []
    die_with_parent(signal.SIGUSR1)
    time.sleep(0.05)
    assert seen == []
    gone.append("")
    wait_until(lambda: seen == [signal.SIGUSR1], 2)


# commands that train


LONGER = ("--set", "training.steps=300", "--no-tracking", "--runs", "runs")


def journals(root: Path) -> dict[str, list[dict[str, Any]]]:
    """What two equal stores have in common: the rows of every run, without times."""
    rows = {run.id: run.rows() for run in Store(root).runs()}
    return {run: [{k: v for k, v in row.items() if k != "seconds"} for row in found] for run, found in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("word", ["train", "run", "sweep"])
def test_a_command_that_trains_saves_on_any_signal_and_continues(tiny: Path, tmp_path: Path, word: str) -> None:
    """One signal, and two of them 50 ms apart, as clusters send them."""
    sweep, preset = tmp_path / "lr.yaml", tmp_path / "tiny.yaml"
    sweep.write_text(SWEEP.format(base=preset) + "trials: 2\nsampler: random\n")
    words = {"train": [str(preset)], "run": [str(tiny), "--seeds", "1"], "sweep": [str(sweep)]}[word]
    assert command(tmp_path / "undisturbed", word, *words, *LONGER).wait(120) == 0
    folder, rows = tmp_path / "disturbed", 0
    for pair in [(signal.SIGUSR1,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGUSR2)]:
        process = command(folder, word, *words, *LONGER)
        wait_for_rows(folder / "runs", rows + 10)
        for sent in pair:
            process.send_signal(sent)
            time.sleep(0.05)
        assert process.wait(30) == 75, f"{pair}: {(folder / 'log.txt').read_text()}"
        rows = sum(map(len, journals(folder / "runs").values()))
    assert command(folder, word, *words, *LONGER).wait(120) == 0, (folder / "log.txt").read_text()
    assert journals(folder / "runs") == journals(tmp_path / "undisturbed" / "runs")
