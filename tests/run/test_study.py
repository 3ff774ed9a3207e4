"""The whole way, with real worker processes: a question in, evidence out, and nothing trained twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from workers import command, is_alive, replace_in, rows_of, wait_for_rows, wait_until

import gpt2lab as g
from gpt2lab.basics.cores import usable_cores
from gpt2lab.planning.machine import Machine
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
pytestmark = pytest.mark.usefixtures("forks")


def outcomes(root: Path) -> dict[str, list[Any]]:
    """All that equal runs share: journal, final evaluation, and the sum of the final weights."""
    found = {}
    for run in Store(root).runs():
        [checkpoint] = run.checkpoints.iterdir()
        [evaluation] = (run.path / "evaluations").glob("*.json")
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        found[run.id] = [rows_of(run), json.loads(evaluation.read_text()), manifest["files"]["model.safetensors"]]
    return found


@pytest.mark.slow
def test_ranks_that_share_every_run_end_as_one_process_does(tiny: Path, gpt2lab: Call, tmp_path: Path) -> None:
    """Also the trials of arms that are tuned first."""
    if usable_cores() < 2:
        pytest.skip("needs two cores")
    replace_in(tiny.with_name("tiny.yaml"), ("dropout: 0.1", "dropout: 0"))
    replace_in(tiny, ("seeds: 2", "seeds: 1\ntune: {space: {optim.lr: [0.005, 0.01]}, seeds: 1}"))
    losses = {}
    for runs, words in (("one", ["--jobs", "1"]), ("two", ["--nproc", "2"])):
        code, said = gpt2lab("run", str(tiny), "--no-tracking", "--runs", runs, *words)
        assert code == 0, said
        trained = Store(tmp_path / runs).runs()
        results = {run.id: run.result() or {} for run in trained}
        assert len(results) == 6 and {r["stack"]["ranks"] for r in results.values()} == {2 if runs == "two" else 1}
        losses[runs] = {run: result["metrics"]["val/loss"] for run, result in results.items()}
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5)
    code, said = gpt2lab("run", str(tiny), "--no-tracking", "--runs", "one", "--nproc", "2")
    assert code == 0 and ", 0 trained now" in said  # the number of ranks is no part of a run's id


@pytest.mark.slow
def test_workers_and_slurm_start_ranks_for_every_run(tiny: Path, fake_slurm: FakeSlurm, gpt2lab: Call) -> None:
    if usable_cores() < 2:
        pytest.skip("needs two cores")
    words = ("run", str(tiny), "--seeds", "1", "--no-tracking", "--nproc", "2", "--executor")
    code, said = gpt2lab(*words, "print", "--runs", "declared")
    assert code == 0 and "gpt2lab work tiny@tiny --nproc 2 --runs" in said
    worker = command(tiny.parent, "work", "tiny@tiny", "--nproc", "2", "--runs", "declared")
    said = (tiny.parent / "log.txt").read_text() if worker.wait(180) else ""
    assert worker.returncode == 0, said
    code, said = gpt2lab(*words, "slurm")
    assert code == 0, said
    for root in ("declared", "runs"):
        results = [run.result() or {} for run in Store(root).runs()]
        assert [result["stack"]["ranks"] for result in results] == [2, 2]


def test_what_ranks_cannot_share_is_refused_and_planned_for(tiny: Path, gpt2lab: Call) -> None:
    code, said = gpt2lab("run", str(tiny), "--nproc", "64")
    assert code == 2 and "64 is no multiple of block_size 16 x 64 ranks; the nearest is 1024" in said
    assert "--nproc: 64 ranks; this machine has" in said and not Path("runs").exists()
    code, said = gpt2lab("run", str(tiny), "--nproc", "2", "--jobs", "2")
    assert code == 2 and "--jobs: has no effect with --nproc" in said.replace("invalid value for ", "")
    Path("gpt2lab.toml").write_text("jobs = 4\n")  # of the project, for other commands
    plans = []
    for ranks in (1, 4):
        node = Machine("cuda", "a GPU", 1, 4, 1e12, "a test", gpus=4)
        Path("node.json").write_text(node.to_json())
        words = ["--machine", "node.json", "--dry-run", "--json", "--nproc", str(ranks)]
        code, said = gpt2lab("run", str(tiny), *words)
        assert code == 0, said
        plans.append(json.loads(said.partition("\n")[0]))
    alone, shared = plans
    assert (shared["jobs"], shared["ranks"]) == (1, 4)
    for one, four in zip(alone["arms"], shared["arms"], strict=True):
        assert four["seconds_per_run"] == pytest.approx(one["seconds_per_run"] / 4)
        assert four["memory_bytes"] < one["memory_bytes"]
    assert shared["gpu_hours"] == pytest.approx(alone["gpu_hours"])
    code, said = gpt2lab("run", str(tiny), "--machine", "node.json", "--dry-run", "--nproc", "4")
    assert "1 at a time, ranks each: 4, threads of each rank: 1" in said


def test_a_question_in_evidence_out_and_nothing_trained_twice(tiny: Path, gpt2lab: Call, tmp_path: Path) -> None:
    code, said = gpt2lab("run", str(tiny), "--jobs", "2")
    assert code == 0, said
    assert "0 runs found finished, 4 trained now" in said
    page = tmp_path / "reports/tiny@tiny/index.html"
    assert "Does rotary help a tiny model?" in page.read_text()
    store = Store(tmp_path / "runs")
    record = store.study("tiny")
    assert [run.status() for run in store.runs()] == ["finished"] * 4
    assert set(record["arms"]["rotary"]["runs"]) == {"0", "1"}
    for arm, longer in (("learned", None), ("rotary", float)):
        evaluation = store.run(record["arms"][arm]["runs"]["0"]).evaluation(record["evaluation"]["key"])
        assert evaluation is not None
        assert evaluation["contexts"].keys() == {"0.5", "1", "2"}
        assert (
            evaluation["contexts"]["2"] is None if longer is None else isinstance(evaluation["contexts"]["2"], longer)
        )
    first = store.run(record["arms"]["learned"]["runs"]["0"])
    rows = first.rows()
    assert [row["step"] for row in rows] == list(range(25))
    assert [row["step"] for row in rows if "val/loss" in row["metrics"]] == [0, 2, 6, 8, 12, 16, 18, 24]
    assert rows[-1]["metrics"]["val/loss"] < rows[0]["metrics"]["val/loss"] - 1
    assert rows[-1]["tokens"] == 24 * 64

    stamps = {run.id: (run.path / "result.json").stat().st_mtime_ns for run in store.runs()}
    code, said = gpt2lab("run", str(tiny))
    assert code == 0, said
    assert "4 runs found finished, 0 trained now" in said
    assert stamps == {run.id: (run.path / "result.json").stat().st_mtime_ns for run in store.runs()}

    assert store.study("tiny")["earlier"] == []
    assert store.study("tiny")["created"] == record["created"]

    # other evaluations need no training: the final weights are there
    code, said = gpt2lab("run", str(tiny), "--set", "evaluation.tokens=128", "--no-tracking")
    assert code == 0, said
    assert first.rows() == rows
    assert len(store.runs()) == 4
    assert stamps == {run.id: (run.path / "result.json").stat().st_mtime_ns for run in store.runs()}
    assert all(len(list((run.path / "evaluations").glob("*.json"))) == 2 for run in store.runs())
    [earlier] = store.study("tiny")["earlier"]
    assert earlier["hash"] == record["hash"]
    assert "declared differently once before" in page.read_text()


def test_mlflow_holds_what_the_journals_hold(tiny: Path, gpt2lab: Call, tmp_path: Path) -> None:
    code, said = gpt2lab("run", str(tiny), "--seeds", "1")
    assert code == 0, said
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    mirrored = client.search_runs([experiment.experiment_id])
    parents = [run for run in mirrored if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["gpt2lab.run_id"]: run for run in mirrored if "mlflow.parentRunId" in run.data.tags}
    assert len(parents) == 1
    assert {artifact.path for artifact in client.list_artifacts(parents[0].info.run_id)} >= {"report"}
    for run in Store(tmp_path / "runs").runs():
        copy = children[run.id]
        history = client.get_metric_history(copy.info.run_id, "train/loss")
        wanted = [(row["step"], row["metrics"]["train/loss"]) for row in run.rows() if "train/loss" in row["metrics"]]
        assert sorted((point.step, point.value) for point in history) == wanted
        assert copy.info.status == "FINISHED"
        assert copy.data.tags["gpt2lab.arm"] in ("learned", "rotary")


def test_a_run_that_fails_leaves_the_others_and_is_tried_again(tiny: Path, gpt2lab: Call, tmp_path: Path) -> None:
    plugin = tmp_path / "parts.py"
    switch = tmp_path / "broken"
    plugin.write_text(
        "import os, torch\n"
        "from gpt2lab.components.norm import norm\n\n"
        '@norm.register("brittle", source="a test")\n'
        "def brittle(site):\n"
        '    """A norm that breaks while a certain file exists."""\n'
        f"    if os.path.exists({str(switch)!r}) and torch.empty(0).device.type != 'meta':\n"
        "        raise RuntimeError('it broke')\n"
        "    return torch.nn.Identity()\n"
    )
    replace_in(tiny, ("{model.position: rotary}", "{model.norm: brittle}"))
    switch.touch()
    words = ("run", str(tiny), "--seeds", "1", "--plugin", str(plugin), "--no-tracking")
    code, said = gpt2lab(*words)
    assert code == 1, said
    assert "1 failed (tried again by the same command)" in said
    assert "rotary seed 0: start, step 0: RuntimeError: it broke" in said
    assert "Traceback" not in said
    store = Store(tmp_path / "runs")
    broken = store.run(store.study("tiny")["arms"]["rotary"]["runs"]["0"])
    failure = broken.failure()
    assert failure is not None
    assert failure["reason"] == "RuntimeError: it broke"
    assert "it broke" in (broken.path / "error.log").read_text()
    assert "it broke" in (tmp_path / "reports/tiny@tiny/index.html").read_text()
    switch.unlink()
    code, said = gpt2lab(*words)
    assert code == 0, said
    assert "1 run found finished, 1 trained now" in said
    assert broken.failure() is None


@contextlib.contextmanager
def started(tiny: Path, folder: Path, jobs: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own, which is gone afterwards whatever happens."""
    words = ["run", str(tiny), "--no-tracking", "--runs", str(folder / "runs"), "--out", str(folder / "out"), *more]
    with command(folder, *words, "--jobs", str(jobs)) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_killed_stopped_and_side_by_side_equal_undisturbed_to_the_bit(tiny: Path, tmp_path: Path) -> None:
    replace_in(tiny, ("seeds: 2", "seeds: 1"))
    replace_in(tmp_path / "tiny.yaml", ("steps: 24", "steps: 200"))
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    with started(tiny, calm, 1) as process:
        assert process.wait(180) == 0, (calm / "log.txt").read_text()
    for rows, number in ((20, signal.SIGKILL), (120, signal.SIGTERM)):
        with started(tiny, wild, 2) as process:
            wait_for_rows(wild / "runs", rows)
            process.send_signal(number)
            assert process.wait(60) == (-number if number == signal.SIGKILL else 75)
    assert any(run.status() == "partial" for run in Store(wild / "runs").runs())
    with started(tiny, wild, 2) as process:
        assert process.wait(180) == 0, (wild / "log.txt").read_text()
    assert "Traceback" not in (wild / "log.txt").read_text()
    assert outcomes(wild / "runs") == outcomes(calm / "runs")


WITNESS = """
import os, pathlib, torch
from gpt2lab.components.norm import norm

@norm.register("witness", source="a test")
def witness(site):
    \"\"\"LayerNorm; says which process builds a model to train it.\"\"\"
    if torch.empty(0).device.type != "meta":
        (pathlib.Path({folder!r}) / str(os.getpid())).touch()
    return torch.nn.LayerNorm(site.width or site.dims.n_embd)
"""


def trainings(folder: Path) -> set[str]:
    """Processes that built a model to train it: one for each time that a worker trained a run."""
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def watched(tiny: Path, tmp_path: Path) -> tuple[Path, str]:
    """(folder of witnesses, plug-in): the tiny ablation with a baseline that leaves a trace of every training."""
    folder, plugin = tmp_path / "witnesses", tmp_path / "witness.py"
    folder.mkdir()
    plugin.write_text(WITNESS.format(folder=str(folder)))
    replace_in(tmp_path / "tiny.yaml", ("model: {", "model: {norm: witness, "), ("steps: 24", "steps: 80"))
    return folder, str(plugin)


def test_two_starters_share_the_work_and_train_each_run_once(tiny: Path, tmp_path: Path, inline: list[str]) -> None:
    """Two forks of this process, each of which trains its runs itself."""
    replace_in(tmp_path / "tiny.yaml", ("steps: 24", "steps: 80"))
    runs, pids = tmp_path / "runs", []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            code = 99
            try:
                code = len(g.run_ablation(tiny, runs=runs, tracking=False).endings)
            finally:
                os._exit(code)
        pids.append(pid)
    counts = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sum(counts) == 4 and min(counts) >= 1  # shared
    assert [run.status() for run in Store(runs).runs()] == ["finished"] * 4
    assert all([row["step"] for row in run.rows()] == list(range(81)) for run in Store(runs).runs())


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 1, 30, 120, 200])
def test_when_either_of_two_starters_is_killed_the_other_finishes(
    rows: int | None, tiny: Path, tmp_path: Path, watched: tuple[Path, str]
) -> None:
    folder, plugin = watched
    with started(tiny, tmp_path, 1, "--plugin", plugin) as one, started(tiny, tmp_path, 1, "--plugin", plugin) as two:
        killed, other = (one, two) if rows and rows % 20 else (two, one)
        if rows:
            wait_for_rows(tmp_path / "runs", rows)
            killed.kill()
        assert other.wait(180) == 0 and (rows or killed.wait(180) == 0), (tmp_path / "log.txt").read_text()
    assert [run.status() for run in Store(tmp_path / "runs").runs()] == ["finished"] * 4
    assert len(trainings(folder)) <= 4 + bool(rows)  # the killed one's run was continued
    assert all([row["step"] for row in run.rows()] == list(range(81)) for run in Store(tmp_path / "runs").runs())


def test_workers_end_with_a_killed_parent(tiny: Path, tmp_path: Path) -> None:
    replace_in(tmp_path / "tiny.yaml", ("steps: 24", "steps: 100000"))
    with started(tiny, tmp_path, 2) as process:
        wait_for_rows(tmp_path / "runs", 4)
        holders = [run.holder()["pid"] for run in Store(tmp_path / "runs").runs() if run.holder()]
    assert process.returncode == -signal.SIGKILL
    assert holders
    wait_until(lambda: not any(map(is_alive, holders)), 10)


WATCHED = """
from gpt2lab import Diagnostic, diagnostic

@diagnostic.register("quiet", source="a test")
class Quiet(Diagnostic):
    "Share of the output that is nearly zero."

    def __init__(self, *, below: float = 0.5):
        super().__init__()
        self.below = below

    def output(self, name, module, x):
        if name == "h.0.mlp.activation":
            self.values[0] = (x.abs() < self.below).float().mean()
"""


@pytest.mark.usefixtures("no_plugins_after")
def test_a_diagnostic_is_named_with_its_options_and_missed_where_it_was_listed_too_late(
    tiny: Path, gpt2lab: Call, tmp_path: Path
) -> None:
    plugin = tmp_path / "quiet.py"
    plugin.write_text(WATCHED)
    words = ("run", str(tiny), "--plugin", str(plugin), "--no-tracking")

    def listed(*diagnostics: str) -> None:
        text = tiny.read_text().partition("evaluate:")[0]
        tiny.write_text(f"{text}evaluate: {{diagnostics: [update_ratio, {', '.join(diagnostics)}]}}\n")

    def names() -> set[str]:
        rows = (row for run in Store("runs").runs() for row in run.rows())
        return {name for row in rows for name in row["metrics"] if "quiet" in name}

    listed("quiet")
    code, said = gpt2lab(*words, "--seeds", "1")
    assert code == 0 and "no values" not in said, said
    assert names() == {"diag/quiet/0"}
    listed("quiet", "{name: quiet, below: 0.1}")
    for more in (["--dry-run"], []):
        code, said = gpt2lab(*words, *more)
        assert code == 0 and "quiet(below=0.1) has no values in 2 runs that finished before it was listed" in said, said
    assert names() == {"diag/quiet/0", "diag/quiet(below=0.1)/0"}
    code, said = gpt2lab(*words)
    assert "0 trained now" in said and "quiet(below=0.1) has no values in 2 runs" in said
