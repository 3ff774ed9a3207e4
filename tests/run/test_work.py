"""Workers that anybody starts: a study that is declared in one place and trained in others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from workers import command, folder_of, replace_in, rows_of, wait_for_rows, wait_until

from gpt2lab import api, identity
from gpt2lab.errors import EnvironmentFault
from gpt2lab.executors import Ending
from gpt2lab.executors.inline import InlineExecutor
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.executors.submitted import copy_of_code
from gpt2lab.experiments.work import Pool, work
from gpt2lab.runner import Job
from gpt2lab.store import Store, read_json
from gpt2lab.store.listing import LISTING

STUDY = "tiny@tiny"
EDIT = """

def steps(*arguments, **options):
    raise RuntimeError("edited")
"""
PLUGIN = '''
import scale

from gpt2lab.components.mlp import MLP, mlp


@mlp.register("twice", source="a test")
def twice(builder):
    """One hidden layer without an activation, doubled.  (B, T, C) -> (B, T, C)"""
    return MLP(builder, lambda u: scale.FACTOR * u)
'''


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers train in this process; -> the runs that they were given."""
    executor = InlineExecutor()
    monkeypatch.setattr("gpt2lab.experiments.work.LocalExecutor", lambda *_: executor)
    monkeypatch.setattr("gpt2lab.runner.job.PLUGINS", [])  # of tests before this one
    monkeypatch.setattr("gpt2lab.experiments.work.is_imported", lambda job: True)  # in a test below, it is
    return executor.trained


def declared(tiny: Path) -> list[Job]:
    return api.open_study(tiny, runs=tiny.parent / "runs").declare()


def trained(names: list[str], store: Store) -> Pool:
    return work(names, store, say=lambda text: None)


def test_a_declared_study_is_trained_by_a_worker_as_by_the_command(
    tiny: Path, here: list[str], inline: list[str], gpt2lab: Callable[..., tuple[int, str]]
) -> None:
    code, said = gpt2lab("run", str(tiny), "--executor", "print", "--json")
    plan = json.loads(said.splitlines()[0])
    store = Store("runs")
    assert code == 0 and plan["study"] == STUDY and len(plan["runs"]) == 4 and not inline
    assert plan["worker"] == f"gpt2lab work {STUDY} --runs {store.root.resolve()}"
    assert not any(run.rows() for run in store.runs()) and store.study(STUDY).seeds == [0, 1]
    code, said = gpt2lab(*plan["worker"].split()[1:])
    assert code == 0 and said.count(" done\n") == 4 and "4 trained here; nothing else" in said
    first, second, *_ = here
    arms = store.study(STUDY).arms
    assert here == plan["runs"] and {first, second} == {arm.runs["0"] for arm in arms.values()}  # seed by seed
    assert "0 trained here" in gpt2lab("work", STUDY)[1]
    code, said = gpt2lab("run", str(tiny), "--executor", "print")
    assert code == 0 and "every run is finished" in said
    assert "4 runs found finished, 0 trained now" in gpt2lab("run", str(tiny), "--no-tracking")[1] and not inline
    api.run_ablation(tiny, runs="others", tracking=False)
    assert sorted(inline) == sorted(plan["runs"])
    for run in plan["runs"]:
        assert rows_of(store.run(run)) == rows_of(Store("others").run(run))
    for root in (store.root, Path("others")):  # so that a list of runs need not read them
        assert (read_json(root / LISTING) or {})["runs"].keys() == set(plan["runs"])


def test_what_others_hold_is_left_to_them_and_a_failure_to_the_next_declaration(tiny: Path, here: list[str]) -> None:
    jobs, store = declared(tiny), Store(tiny.parent / "runs")
    held, failed, *_ = jobs
    folder_of(failed).fail({"reason": "a bug", "phase": "start", "step": 0, "at": "now"})
    with folder_of(held).lock():
        pool = trained([STUDY], store)
    assert pool.left == [held.run_id] and set(pool.endings) == {job.run_id for job in jobs[2:]}
    assert set(trained([STUDY], store).endings) == {held.run_id}
    assert set(trained([failed.run_id], store).endings) == set()
    declared(tiny)
    assert trained([STUDY], store).endings == {failed.run_id: "done"} and folder_of(failed).failure() is None


def test_a_run_that_becomes_free_meanwhile_is_taken(tiny: Path, here: list[str]) -> None:
    held, *others = declared(tiny)
    with ExitStack() as stack:
        stack.enter_context(folder_of(held).lock())
        pool = work([STUDY], Store(tiny.parent / "runs"), say=lambda text: stack.close())  # once another was taken
    assert here == [*(job.run_id for job in others), held.run_id] and not pool.left


def test_a_run_that_would_be_another_one_is_refused_before_it_begins(
    tiny: Path, here: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs, store = declared(tiny), Store(tiny.parent / "runs")
    for target, name, value, part in (
        (identity, "core_code", lambda: "other code", "core"),
        (identity, "component_code", lambda choice: "other code", "components"),
        (torch, "__version__", "1.0", "torch version"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(EnvironmentFault, match=f"another run here: {part} differ"):
                trained([STUDY], store)
    (tmp_path / "moved").symlink_to(tmp_path)
    store.root.rename(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentFault, match="which is not this store"):
        trained([jobs[0].run_id], Store(tmp_path / "elsewhere"))
    assert not here


def test_a_scheduler_of_a_shared_store_lets_go_of_a_run_that_was_taken_meanwhile(tmp_path: Path) -> None:
    endings: list[tuple[str, Ending]] = []

    class Late(InlineExecutor):
        """Another process is quicker."""

        def collect(self, run_id: str) -> Ending:
            super().collect(run_id)
            return "locked"

    job = Job(str(tmp_path), "a" * 16, "", {}, "", 1.0, 1)
    Scheduler(Late(), shared=True).run(iter([job]), lambda *ended: endings.append(ended))
    assert endings == [("a" * 16, "locked")] and not job.path.exists()


@pytest.mark.slow
def test_workers_side_by_side_share_a_study_save_when_stopped_and_end_what_is_withdrawn(tiny: Path) -> None:
    root = tiny.parent / "runs"
    jobs = api.open_study(tiny, runs=root, overrides=["training.steps=400"]).declare()
    workers = [command(tiny.parent / f"worker{n}", "work", STUDY, "--jobs", "1", "--runs", str(root)) for n in (0, 1)]
    wait_for_rows(root, 20)
    wait_until(lambda: sum(folder_of(job).status() == "running" for job in jobs) == 2)
    workers[0].send_signal(signal.SIGUSR1)
    assert workers[0].wait(60) == 75
    at_work = [job for job in jobs if folder_of(job).status() == "running"]
    assert len(at_work) <= 1 and any(folder_of(job).status() == "partial" for job in jobs)
    for job in jobs:
        job.path.unlink()
    assert workers[1].wait(60) == 0
    assert all(folder_of(job).status() in ("partial", "absent", "finished") for job in jobs)
    assert not any(folder_of(job).failure() for job in jobs)
    api.open_study(tiny, runs=root, overrides=["training.steps=400"]).declare()
    again = [command(tiny.parent / f"worker{n}", "work", STUDY, "--jobs", "1", "--runs", str(root)) for n in (0, 1)]
    assert [worker.wait(120) for worker in again] == [0, 0]
    assert all(folder_of(job).status() == "finished" for job in jobs)
    texts = [(tiny.parent / f"worker{n}" / "log.txt").read_text() for n in (0, 1)]
    assert sum(text.count(f"{job.run_id} done") for text in texts for job in jobs) == 4  # each trained to its end once


@pytest.mark.slow
def test_the_code_that_was_submitted_is_the_code_that_runs(tiny: Path, tmp_path: Path) -> None:
    checkout, root = tmp_path / "checkout", tiny.parent / "runs"
    package, plugin = checkout / "gpt2lab", tmp_path / "gate.py"
    shutil.copytree(Path(api.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "scale.py").write_text("FACTOR = 2.0\n")  # which the plug-in imports
    plugin.write_text(PLUGIN)
    replace_in(tiny, ("rotary: {model.position: rotary}", "twice: {model.mlp: twice}"))
    paths = os.pathsep.join([str(checkout), str(tmp_path)])
    here = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}

    def call(*words: str) -> str:
        argv = [sys.executable, "-m", "gpt2lab", *words, "--runs", str(root)]
        done = subprocess.run(argv, env=here, cwd=checkout, capture_output=True, text=True, check=False, timeout=200)
        return f"{done.returncode} {done.stdout}{done.stderr}"

    study = ["run", str(tiny), "--seeds", "1", "--plugin", str(plugin)]
    assert "2 runs to train" in call(*study, "--executor", "print")
    before = (package / "training" / "loop.py").read_text()
    (package / "training" / "loop.py").write_text(before + EDIT)
    plugin.write_text("raise RuntimeError('edited')\n")
    (tmp_path / "scale.py").write_text("FACTOR = 3.0\n")
    assert call("work", STUDY).startswith("0 ") and all(run.status() == "finished" for run in Store(root).runs())
    (package / "training" / "loop.py").write_text(before)
    plugin.write_text(PLUGIN)
    (tmp_path / "scale.py").write_text("FACTOR = 2.0\n")
    said = call(*study, "--no-tracking")
    assert said.startswith("0 ") and "2 runs found finished, 0 trained now" in said
    shutil.rmtree(root / "submitted")
    (package / "training" / "loop.py").write_text(before + EDIT)
    for run in Store(root).runs():
        (run.path / "result.json").unlink()
    assert "is gone" in (said := call("work", STUDY)) and said.startswith("3 ")


def test_copies_of_the_code_stay_while_an_unfinished_run_or_a_recent_submission_has_them(tmp_path: Path) -> None:
    copies = {name: tmp_path / "submitted" / name for name in ("used", "done", "recent")}
    for number, (name, copy) in enumerate(copies.items()):
        copy.mkdir(parents=True)
        Job(str(tmp_path), f"{number:016x}", "", {}, "", 1.0, 1, code=str(copy)).write()
        if name != "used":
            (tmp_path / f"{number:016x}" / "result.json").touch()
        if name != "recent":
            os.utime(copy, (0, 0))
    made = copy_of_code(tmp_path, ())
    assert set((tmp_path / "submitted").iterdir()) == {copies["used"], copies["recent"], made}
