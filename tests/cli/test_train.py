"""`gpt2lab train`: one run of the same store as ablations, by itself or by several ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.basics.cores import usable_cores
from gpt2lab.store import Store

Call = Callable[..., Any]
SECONDS = 120.0


def test_one_run_is_trained_told_found_again_and_shared_with_an_ablation(
    gpt2lab: Call, ablation: Path, inline: list[str]
) -> None:
    plan = gpt2lab("train", "preset.yaml", "--dry-run")
    assert plan.code == 0
    assert "4 steps of 64" in plan.out
    assert "MFLOP/token" in plan.out
    assert not list(Store("runs").runs())

    first = gpt2lab("train", "preset.yaml", "--no-tracking")
    assert first.code == 0
    loss = re.search(r"validation loss (\d\.\d{4}) nats", first.out)
    assert loss is not None
    (run,) = Store("runs").runs()
    assert f"run {run.id}" in first.out
    assert run.status() == "finished"

    again = gpt2lab("train", "preset.yaml", "--no-tracking", "--json")
    found = json.loads(again.out)
    assert (again.code, found["run"], found["status"]) == (0, run.id, "finished")
    assert f"{found['evaluation']['val/loss']:.4f}" == loss[1]
    assert "already finished; nothing to train" in again.err

    study = json.loads(gpt2lab("run", ablation, "--dry-run", "--json").out)
    assert {arm["arm"]: arm["finished"] for arm in study["arms"]} == {"learned": ["0"], "rotary": []}

    other = gpt2lab(
        "train",
        "preset.yaml",
        "--seed",
        "7",
        "--set",
        "optim.lr=0.02",
        "--set",
        "evaluation.every_steps=2",
        "--dry-run",
    )
    assert "preset with optim.lr=0.02, seed 7" in other.out
    record = Store("runs").study("train@preset")
    assert record["arms"]["preset"]["runs"] == {"0": run.id}
    assert gpt2lab("report", "train").code == 0


def test_a_run_that_another_process_holds_is_left_to_it(gpt2lab: Call, ablation: Path) -> None:
    run_id = json.loads(gpt2lab("train", "preset.yaml", "--dry-run", "--json").out)["run"]
    with Store("runs").run(run_id).lock():
        refused = gpt2lab("train", "preset.yaml", "--no-tracking")
    assert refused.code == 6
    assert f"in use by process {os.getpid()} on " in refused.err


def test_what_ranks_cannot_share_is_refused_before_any_work(gpt2lab: Call, ablation: Path) -> None:
    refused = gpt2lab("train", "preset.yaml", "--nproc", "64")
    assert refused.code == 2
    assert "training.batch_tokens: 64 is no multiple of block_size 16 x 64 ranks; the nearest is 1024" in refused.err
    assert "--nproc: 64 ranks; this machine has" in refused.err
    assert not Path("runs").exists()
    assert gpt2lab("train", "preset.yml").code == 2
    assert "did you mean 'nano'" in gpt2lab("train", "nanoo").err


def test_variables_of_a_launcher_that_cannot_be_are_refused(
    gpt2lab: Call, ablation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK: is not set, though WORLD_SIZE is" in gpt2lab("train", "preset.yaml").err
    monkeypatch.setenv("RANK", "2")
    assert "RANK: rank 2 of 2 ranks cannot be" in gpt2lab("train", "preset.yaml").err
    monkeypatch.setenv("RANK", "1")
    assert "MASTER_ADDR: is not set" in gpt2lab("train", "preset.yaml").err
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "--nproc: torchrun has started 2 ranks already" in gpt2lab("train", "preset.yaml", "--nproc", "2").err


# Started as users do


def command(*words: str, fault: str = "", launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])} | (
        {"GPT2LAB_FAULT": fault} if fault else {}
    )
    python = [sys.executable, *launcher, "-m", "gpt2lab"]
    return subprocess.Popen(
        [*python, "train", *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def until_step(step: int) -> Any:
    """The folder of the only run, once its journal is there."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for run in Store("runs").runs():
            if any(row["step"] >= step for row in run.rows()):
                return run
        time.sleep(0.05)
    pytest.fail("no run got so far")


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            own = int(stat.parent.name)
            found += [own, *children(own)]
    return found


def gone(pids: Sequence[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


LONG = ("preset.yaml", "--no-tracking", "--set", "training.steps=5000")


@pytest.fixture
def here(ablation: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ablation.parent)
    return ablation.parent


@pytest.mark.slow
def test_two_ranks_end_as_one_does(here: Path) -> None:
    if usable_cores() < 2:
        pytest.skip("needs two cores")
    losses = []
    for runs, words in (("one", ["--nproc", "1"]), ("two", ["--nproc", "2"])):
        process = command("preset.yaml", "--runs", runs, "--json", *words)
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, err
        losses.append(json.loads(out)["evaluation"]["val/loss"])
        assert json.loads(out)["result"]["stack"]["ranks"] == len(losses)
        assert (here / runs / "mlflow.db").exists()
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_torchrun_starts_ranks_and_the_first_one_speaks(here: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = command("preset.yaml", "--no-tracking", launcher=launcher)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert out.count("validation loss") == 1
    (run,) = Store("runs").runs()
    assert (run.result() or {})["stack"]["ranks"] == 2

    process = command(*LONG, launcher=launcher, fault="raise@backward:3,rank=1")
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert err.count("InjectedFault: injected at backward") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_killed_leaves_no_rank(here: Path) -> None:
    process = command(*LONG, launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])
    until_step(3)
    ranks = children(process.pid)
    assert len(ranks) >= 2
    process.kill()
    assert gone(ranks, 10)
    process.communicate()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fault", ["", "stop@backward:5,rank=1"])
def test_a_killed_starter_leaves_no_rank_that_runs(here: Path, fault: str) -> None:
    """With a stopped rank the other one is blocked; the stopped one cannot even end."""
    process = command(*LONG, "--nproc", "2", fault=fault)
    until_step(3)
    ranks = children(process.pid)
    assert len(ranks) == 2
    end = time.monotonic() + 30
    while len(stopped := [pid for pid in ranks if is_stopped(pid)]) < bool(fault):
        assert time.monotonic() < end
    process.kill()
    process.communicate()
    try:
        assert gone([pid for pid in ranks if pid not in stopped], 12)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("count", ["1", "2"])
def test_control_c_saves_and_twice_ends_at_once(here: Path, count: str) -> None:
    process = command(*LONG, "--nproc", count)
    run = until_step(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "once more ends them at once" in err
    assert "try: the same command continues" in err
    assert run.status() == "partial"

    process = command(*LONG, "--nproc", count, fault="sleep=20@evaluation:1")
    before = time.monotonic()
    while run.status() != "running":
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - before < SECONDS
        time.sleep(0.05)
    ranks = children(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - sent < 1
    assert gone(ranks, 2)


@pytest.mark.slow
def test_a_killed_rank_ends_the_command_with_7(here: Path) -> None:
    process = command(*LONG, "--nproc", "2", fault="kill@backward:20,rank=1")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 7
    assert re.search(r"gpt2lab: error \[RANK\] rank 1 died \(SIGKILL\) at step \d+ .*rank_1\.log", err)


@pytest.mark.slow
def test_a_run_that_diverges_by_itself_is_an_error(here: Path) -> None:
    process = command("preset.yaml", "--no-tracking", fault="nan@loss:3")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 5
    assert "gpt2lab: error [NUMERICS]" in err
    assert re.search(r"runs/[0-9a-f]{16}: step 3: loss .*, gradient norm nan", err)
