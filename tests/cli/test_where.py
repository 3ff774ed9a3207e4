"""Where runs train, by options and by profiles of gpt2lab.toml; what a plan for a cluster costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.planning.machine import Machine

Call = Callable[..., Any]

NODE = Machine("cuda", "H200", 1, 2, 1e10, "a test", gpus=2, local=False)
PROJECT = """
[profiles.cluster]
executor = "slurm"
workers = 3
sbatch = "--partition=gpu"
machine = "node.json"
price = 2.0
"""

PLUGIN = """
from pathlib import Path

from gpt2lab.executors import executor
from gpt2lab.executors.inline import InlineExecutor


@executor.register("noted", source="a test")
class Noted(InlineExecutor):
    "This process; the ids of its runs are in a file."

    def submit(self, job):
        with Path("noted.txt").open("a") as file:
            print(job.run_id, file=file)
        super().submit(job)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--workers", "2"], "--workers: has no effect with --executor local; it is for slurm and ray"),
        (["sweep", "--sbatch", "-p x", "--executor", "ray"], "--sbatch: has no effect with --executor ray"),
        (["run", "--price", "2"], "--price: has no effect without --dry-run"),
        (["run", "--machine", "node.json"], "--machine: a plan for another machine needs --dry-run or --executor"),
        (["sweep", "--executor", "print"], "--executor print: is for ablations"),
        (["sweep", "--executor", "ray", "--nproc", "2"], "trains every run in one process; for 2 ranks, submit"),
        (["run", "--profile", "nowhere"], "unknown profile 'nowhere' (known: cluster)"),
        (["run", "--executor", "slrum"], "--executor: unknown executor 'slrum'; did you mean 'slurm'?"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    words: list[str], said: str, gpt2lab: Call, ablation: Path, tmp_path: Path
) -> None:
    (tmp_path / "gpt2lab.toml").write_text('sbatch = "--partition=gpu"\n' + PROJECT)  # which no option on the line uses
    command, *options = words
    answer = gpt2lab(command, ablation, *options)
    assert answer.code == 2 and answer.err.count("\n") <= 2
    assert said in answer.err.replace("invalid value for ", "")


def test_a_profile_plans_for_its_cluster_with_gpu_hours_and_cost(gpt2lab: Call, ablation: Path, tmp_path: Path) -> None:
    (tmp_path / "node.json").write_text(NODE.to_json())
    (tmp_path / "gpt2lab.toml").write_text(PROJECT)
    plan = json.loads(gpt2lab("run", ablation, "--profile", "cluster", "--seeds", "4", "--dry-run", "--json").out)
    [seconds] = {arm["seconds_per_run"] for arm in plan["arms"]}
    assert plan["jobs"] == 6  # three workers with two GPUs each
    assert plan["gpu_hours"] == pytest.approx(8 * seconds / 3600) and plan["cost"] == 2 * plan["gpu_hours"]
    assert plan["seconds_with"] == pytest.approx({str(n): 8 * seconds / n for n in (1, 2, 4, 8)})
    packed = ["--jobs", "4", "--workers", "1"]  # two on each GPU
    plan = json.loads(gpt2lab("run", ablation, "--profile", "cluster", "--dry-run", "--json", *packed).out)
    assert plan["jobs"] == 4 and plan["gpu_hours"] == pytest.approx(2 * seconds / 2 / 3600)
    said = gpt2lab("run", ablation, "--profile", "cluster", "--dry-run", "--price", "3").out
    assert "GPU hours, 0.00 at 3 an hour" in said and "on, the longest run" in said
    for text, wrong in (("executr = 'ray'", "did you mean 'executor'?"), ("workers = 'two'", "another type")):
        (tmp_path / "gpt2lab.toml").write_text(f"[profiles.cluster]\n{text}\n")
        answer = gpt2lab("run", ablation, "--profile", "cluster")
        assert answer.code == 2 and wrong in answer.err


@pytest.mark.usefixtures("no_plugins_after")
def test_an_executor_of_a_plug_in_is_named_like_ours(gpt2lab: Call, ablation: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    answer = gpt2lab("run", ablation, "--executor", "noted", "--plugin", file, "--seeds", "1", "--no-tracking")
    assert answer.code == 0, answer.err
    assert (tmp_path / "noted.txt").read_text().split()
    planned = gpt2lab("run", ablation, "--executor", "noted", "--plugin", file, "--seeds", "2", "--dry-run")
    assert planned.code == 0 and "1 at a time" in planned.out, planned.err
    jobs = gpt2lab("run", ablation, "--executor", "noted", "--plugin", file, "--jobs", "2")
    assert jobs.code == 2 and "--jobs: has no effect with --executor noted" in jobs.err
    packed = gpt2lab("sweep", ablation, "--executor", "noted", "--plugin", file, "--nproc", "2")
    assert packed.code == 2 and "trains every run in one process" in packed.err


@pytest.mark.parametrize(
    ("body", "lacking"),
    [
        ("capacity, label = 1, 'here'", "lacks submit, poll, cancel, collect, close, kill"),
        (
            "def __init__(self, level): pass",
            "is made without arguments, but: missing a required argument: 'level'",
        ),
    ],
)
def test_an_executor_that_lacks_a_member_is_refused(
    body: str, lacking: str, gpt2lab: Call, ablation: Path, tmp_path: Path, no_plugins_after: None
) -> None:
    head = 'from gpt2lab.executors import executor\n@executor.register("half", source="a test")\n'
    (tmp_path / "half.py").write_text(f'{head}class Half:\n    "Not all of one."\n    {body}\n')
    answer = gpt2lab("run", ablation, "--executor", "half", "--plugin", "half.py")
    assert answer.code == 2 and f"--executor half: Half {lacking}" in answer.err, answer.err
