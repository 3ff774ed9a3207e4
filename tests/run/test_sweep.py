"""Sweeps by the command line, with real worker processes: every slot ends once, whatever happens to who works on it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workers import SWEEP, command, replace_in, wait_for_rows

from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
Trial = dict[str, Any]
pytestmark = pytest.mark.usefixtures("forks")

TRIALS = """
trials: 5
sampler: {name: tpe, startup: 2}
enqueue: [{}]
"""


@pytest.fixture
def lr(tiny: Path) -> Path:
    """A sweep's file beside the tiny preset."""
    file = tiny.with_name("lr.yaml")
    file.write_text(SWEEP.format(base=tiny.with_name("tiny.yaml")) + TRIALS)
    return file


def changed(file: Path, *pairs: tuple[str, str]) -> str:
    """The file's name, some of its text replaced."""
    replace_in(file, *pairs)
    return str(file)


def trials(root: Path, name: str = "lr", label: str = "lr") -> list[Trial]:
    found: list[Trial] = Store(root / "runs").sweep(name)["searches"][label]["trials"]
    return found


def what_was_found(root: Path) -> list[tuple[Any, ...]]:
    """All of the trials that must not depend on who did them, and when."""
    return [(t["slot"], t["outcome"], t["settings"], t["value"], t["curve"]) for t in trials(root)]


def started(file: str | Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    return command(folder, "sweep", str(file), "--no-tracking", "--runs", str(folder / "runs"), *more)


def test_a_space_in_an_answer_out_and_nothing_trained_twice(lr: Path, gpt2lab: Call, tmp_path: Path) -> None:
    code, said = gpt2lab("sweep", str(lr), "--apply", "--no-tracking")
    assert code == 0, said
    found = trials(tmp_path)
    assert [t["outcome"] for t in found] == ["finished"] * 5
    assert found[0]["settings"] == {"optim.lr": 0.01}  # the config's own, first
    assert found[0]["enqueued"] and not found[1]["enqueued"]
    store, key = Store(tmp_path / "runs"), Store(tmp_path / "runs").sweep("lr")["evaluation"]["key"]
    for trial in found:
        evaluation = store.run(trial["runs"]["100"]).evaluation(key)
        assert evaluation is not None and evaluation["metrics"]["val/loss"] == trial["value"]
        assert trial["tokens"] == 24 * 64
    assert "lr@tiny/index.html" in said

    # the best is a preset that trains as it was: the run is found, as its seed is all that differs
    best = min(found, key=lambda t: float(t["value"]))
    code, said = gpt2lab("train", "tiny-lr.yaml", "--seed", "100", "--no-tracking")
    assert code == 0 and "already finished" in said and best["runs"]["100"][:8] in said

    stamps = {run.id: (run.path / "result.json").stat().st_mtime_ns for run in store.runs()}
    code, said = gpt2lab("sweep", str(lr), "--no-tracking")
    assert code == 0 and trials(tmp_path) == found

    # trials are a total: more of them go on where it was; another search finds the same settings trained
    code, said = gpt2lab("sweep", str(lr), "--no-tracking", "--trials", "6")
    assert code == 0 and trials(tmp_path)[:5] == found and len(trials(tmp_path)) == 6
    assert ("the best so far" in said) == (min(trials(tmp_path), key=lambda t: float(t["value"]))["index"] == 5)
    changed(lr, ("sweep: lr", "sweep: other"), ("startup: 2}", "startup: 2, seed: 1}"), ("trials: 5", "trials: 1"))
    code, said = gpt2lab("sweep", str(lr), "--no-tracking")
    [other] = trials(tmp_path, "other", "other")
    assert other["found"] and other["value"] == found[0]["value"] and other["curve"] == found[0]["curve"] != []
    changed(lr, ("sweep: other", "sweep: lr"))
    code, said = gpt2lab("sweep", str(lr), "--no-tracking")
    assert "lr: its space, settings or base are not those of its 6 earlier trials, so the search starts anew" in said
    assert all((store.run(run).path / "result.json").stat().st_mtime_ns == at for run, at in stamps.items())


@pytest.mark.slow
def test_same_seed_and_one_worker_give_the_same_trials_even_when_stopped_and_killed(lr: Path, tmp_path: Path) -> None:
    replace_in(tmp_path / "tiny.yaml", ("steps: 24", "steps: 150"), ("every_steps: 8", "every_steps: 30"))
    changed(lr, ("enqueue", "pruner: {name: median, startup_trials: 2}\nenqueue"))
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    assert started(lr, calm, "--jobs", "1").wait(120) == 0, (calm / "log.txt").read_text()
    for rows, number in ((100, signal.SIGKILL), (350, signal.SIGTERM)):
        process = started(lr, wild, "--jobs", "1")
        wait_for_rows(wild / "runs", rows)
        process.send_signal(number)
        assert process.wait(60) == (-number if number == signal.SIGKILL else 75), (wild / "log.txt").read_text()
    assert started(lr, wild, "--jobs", "1").wait(120) == 0, (wild / "log.txt").read_text()
    assert "Traceback" not in (wild / "log.txt").read_text()
    assert what_was_found(wild) == what_was_found(calm)
    assert sum(t["retries"] for t in trials(wild)) <= 1  # a stop in good order is none
    pruned = [t for t in trials(calm) if t["outcome"] == "pruned"]
    assert pruned, what_was_found(calm)
    for trial in pruned:
        folder = Store(calm / "runs").run(trial["runs"]["100"])
        assert trial["stopped_at"] < 150 and trial["tokens"] < 150 * 64 and trial["value"] is None
        assert not folder.checkpoints.exists() and folder.result() is None


@pytest.mark.slow
def test_workers_share_one_sweep_and_the_work_of_a_killed_one_is_done_once_more(lr: Path, tmp_path: Path) -> None:
    replace_in(tmp_path / "tiny.yaml", ("steps: 24", "steps: 100"))
    changed(lr, ("trials: 5", "trials: 8"))
    folder = tmp_path / "shared"
    one, two = (started(lr, folder, "--jobs", "1", *more) for more in ((), ("--worker",)))
    wait_for_rows(folder / "runs", 150)
    two.kill()
    two.wait()
    assert one.wait(120) == 0, (folder / "log.txt").read_text()
    found = trials(folder)
    assert [t["outcome"] for t in found] == ["finished"] * 8
    assert len({run for t in found for run in t["runs"].values()}) == 8
    assert "Traceback" not in (folder / "log.txt").read_text()


@pytest.mark.parametrize(("fault", "outcome", "losses"), [("kill@step:5", "finished", 5), ("kill@step:2", "failed", 3)])
def test_a_trial_whose_process_is_killed_is_tried_again_as_long_as_it_makes_progress(
    lr: Path, gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, outcome: str, losses: int
) -> None:
    """Every process dies at its fifth step, one behind a checkpoint; or at its second, before there is one."""
    replace_in(tmp_path / "tiny.yaml", ("checkpoint_every_steps: 6", "checkpoint_every_steps: 4"))
    monkeypatch.setenv("GPT2LAB_FAULT", fault)
    code, said = gpt2lab("sweep", str(lr), "--no-tracking", "--trials", "1", "--jobs", "1")
    [trial] = trials(tmp_path)
    assert (trial["outcome"], trial["retries"]) == (outcome, losses), said
    assert said.count("was lost: killed by SIGKILL (out of memory?)") == losses
    assert code == (0 if outcome == "finished" else 1)
    if outcome == "failed":
        assert trial["reason"].startswith("lost 4 times, at last because killed by SIGKILL")


def test_when_all_diverge_the_page_says_so(lr: Path, gpt2lab: Call, tmp_path: Path) -> None:
    changed(lr, ("low: 1e-3, high: 1e-1", "low: 1e18, high: 1e20"), ("enqueue: [{}]", "enqueue: [{optim.lr: 1e19}]"))
    code, said = gpt2lab("sweep", str(lr), "--no-tracking")
    assert code == 5, said
    assert "Traceback" not in said and "all of them diverged" in said
    assert {t["outcome"] for t in trials(tmp_path)} == {"diverged"}
    assert all(t["value"] is None and t["reason"] for t in trials(tmp_path))
    assert "diverged" in (tmp_path / "reports/lr@tiny/report.md").read_text()


def test_settings_that_cannot_be_combined_fail_alone_until_there_are_too_many(
    lr: Path, gpt2lab: Call, tmp_path: Path
) -> None:
    optim = "optim.lr: {low: 1e-3, high: 1e-1, log: true}"
    both = "model.n_head: {choices: [2, 4]}\n  model.n_embd: {choices: [16, 18]}\n"
    changed(lr, (optim, both), ("trials: 5", "trials: 4"), ("{name: tpe, startup: 2}", "grid"), ("enqueue: [{}]", ""))
    code, said = gpt2lab("sweep", str(lr), "--no-tracking")
    assert code == 0, said
    failed = [t for t in trials(tmp_path) if t["outcome"] == "failed"]
    assert [t["settings"] for t in failed] == [{"model.n_head": "4", "model.n_embd": "18"}]
    assert "n_head" in failed[0]["reason"]
    assert sum(t["outcome"] == "finished" for t in trials(tmp_path)) == 3

    changed(lr, ("sweep: lr", "sweep: capped\nmax_failures: 0"), ("trials: 4", "trials: 8"), ("[2, 4]", "[4, 2]"),
            ("[16, 18]", "[18, 16]"))  # fmt: skip
    code, said = gpt2lab("sweep", str(lr), "--no-tracking", "--jobs", "1")
    assert code == 1 and "max_failures" in said
    assert [t["outcome"] for t in trials(tmp_path, "capped", "capped")] == ["failed", *["waiting"] * 3]


def test_several_seeds_of_a_trial_are_its_mean(lr: Path, gpt2lab: Call, tmp_path: Path) -> None:
    changed(lr, ("trials: 5", "trials: 3\nseeds: 2"))
    code, said = gpt2lab("sweep", str(lr), "--no-tracking", "--jobs", "2")
    assert code == 0, said
    for trial in trials(tmp_path):
        assert set(trial["values"]) == {"100", "101"} == set(trial["runs"])
        assert trial["value"] == sum(trial["values"].values()) / 2
        assert trial["tokens"] == 2 * 24 * 64


@pytest.mark.slow
def test_two_ranks_are_pruned_at_the_same_step(lr: Path, tmp_path: Path) -> None:
    replace_in(tmp_path / "tiny.yaml", ("steps: 24", "steps: 400"), ("every_steps: 8", "every_steps: 20"))
    rates = "[{optim.lr: 0.03}, {optim.lr: 0.001}]"  # the second is far behind all the way
    pruner = "pruner: {name: median, startup_trials: 1, warmup: 0.1, keep_checkpoints: true}"
    changed(lr, ("trials: 5", f"trials: 2\n{pruner}"), ("[{}]", rates))
    process = started(lr, tmp_path, "--nproc", "2")
    assert process.wait(180) == 0, (tmp_path / "log.txt").read_text()
    good, bad = trials(tmp_path)
    assert (good["outcome"], bad["outcome"]) == ("finished", "pruned")
    folder = Store(tmp_path / "runs").run(bad["runs"]["100"])
    last = folder.rows()[-1]["step"]
    assert bad["stopped_at"] <= last < 400
    checkpoint = max(folder.checkpoints.iterdir())  # whole, at the step at which both ranks ended
    state = json.loads((checkpoint / "state.json").read_text())
    assert checkpoint.name == f"step_{last:06}" and state["extra"]["ranks"] == 2


def test_a_plan_trains_nothing(lr: Path, gpt2lab: Call, tmp_path: Path) -> None:
    code, said = gpt2lab("sweep", str(lr), "--dry-run")
    assert code == 0 and "5 trials" in said and "optim.lr from 0.001 to 0.1 (log)" in said
    code, said = gpt2lab("sweep", str(lr), "--dry-run", "--json")
    plan = json.loads(said[said.index("{") :])
    assert plan["searches"]["lr"]["trials"] == 5 and not (tmp_path / "runs/sweeps").exists()
    code, said = gpt2lab("sweep", changed(lr, ("low: 1e-3", "low: 1")), "--dry-run")
    assert code == 2 and "lr.yaml:6: space.optim.lr: low (1) must be less than high (0.1)" in said
