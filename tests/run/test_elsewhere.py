"""Studies and sweeps on a Ray cluster and through Slurm are those of this machine, whatever is taken away meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import joined
from slurm_cluster import Slurm
from workers import SWEEP, folder_of, replace_in, rows_of, wait_until

from gpt2lab import api
from gpt2lab.basics.progress import Event
from gpt2lab.executors.inline import InlineExecutor
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.executors.ray import RayExecutor
from gpt2lab.executors.slurm import SlurmExecutor
from gpt2lab.runner import Job
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
TRIALS = "trials: 3\nsampler: {name: tpe, startup: 2}\nenqueue: [{}]\n"
TUNE = "tune: {space: {optim.lr: {low: 0.25, high: 32, log: true, relative: true}}, trials: 2, sampler: qmc}\n"


@pytest.fixture(params=["ray_cluster", "fake_slurm"])
def place(request: pytest.FixtureRequest) -> str:
    """The name of an executor that can be used."""
    request.getfixturevalue(request.param)
    return "ray" if request.param == "ray_cluster" else "slurm"


PREEMPTIONS = 20
LONG = ["training.steps=4000", "training.checkpoint_every_steps=50", "evaluation.every_steps=500"]
STORM_RUNS = int(os.environ.get("GPT2LAB_STORM_RUNS", "200"))
STORM_SECONDS = 20.0
"""Between two nodes that are killed."""


def all_rows(root: Path) -> dict[str, list[dict[str, Any]]]:
    return {run.id: rows_of(run) for run in Store(root).runs()}


@pytest.mark.slow
def test_a_sweep_and_what_tunes_arms_first_are_the_local_ones(place: str, tiny: Path, gpt2lab: Call) -> None:
    file = tiny.with_name("lr.yaml")
    file.write_text(SWEEP.format(base=tiny.with_name("tiny.yaml")) + TRIALS)
    with tiny.open("a") as ablation:
        ablation.write(TUNE)
    replace_in(tiny, ("seeds: 2", "seeds: 1"))
    there = ["--executor", place, "--workers", "1"]
    for command, path in (("sweep", file), ("run", tiny)):
        code, said = gpt2lab(command, str(path), "--no-tracking", "--runs", "there", *there)
        assert code == 0, said
        code, said = gpt2lab(command, str(path), "--no-tracking", "--runs", "here", "--jobs", "1")
        assert code == 0, said
        code, said = gpt2lab(command, str(path), "--no-tracking", "--runs", "there", *there)
        assert code == 0 and "trained now" not in said.replace("0 trained now", "")
    assert all_rows(Path("there")) == all_rows(Path("here"))
    for name in Store("here").sweeps():
        ours, theirs = (Store(root).sweep(name).searches for root in ("here", "there"))
        for label in ours:
            mine, others = ([(t.settings, t.value) for t in found[label].trials] for found in (ours, theirs))
            assert mine == others


def locally(tiny: Path, *overrides: str, seeds: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Run id -> rows of the same study, undisturbed and in this process."""
    api.run_ablation(
        tiny, seeds=seeds, overrides=overrides, runs=tiny.parent / "here", tracking=False, executor=InlineExecutor()
    )
    return all_rows(tiny.parent / "here")


class Progress:
    """How far a store's runs are. furthest: steps of all checkpoints together, at the last disturbance."""

    def __init__(self, root: Path) -> None:
        self.store, self.furthest, self.disturbed = Store(root), 0, 0

    def saved(self) -> int:
        return sum(run.saved_step() for run in self.store.runs())

    def is_due(self) -> bool:
        """Whether a run is at work that has saved a checkpoint since the last disturbance."""
        at_work = any(run.status() == "running" for run in self.store.runs())
        return self.disturbed < PREEMPTIONS and at_work and self.saved() > self.furthest

    def note(self) -> None:
        """A disturbance is over."""
        self.disturbed += 1
        self.furthest = self.saved()


@pytest.mark.service
def test_twenty_preemptions_in_slurm_change_no_bit(cluster: Slurm, tiny: Path) -> None:
    progress = Progress(tiny.parent / "runs")

    def number() -> str:
        return cluster.said("squeue", "--noheader", "--format=%A").strip()

    def preempt(event: Event) -> None:
        if cluster.states() == ["RUNNING"] and progress.is_due():
            cluster.said("scancel", "--batch", "--signal=USR1", number())
            wait_until(lambda: cluster.states() in (["PENDING"], []), 120)
            cluster.start_requeued(number())
            progress.note()

    result = api.run_ablation(
        tiny, seeds=1, overrides=LONG, runs=progress.store.root, tracking=False, executor=SlurmExecutor("tiny@tiny"),
        on_event=preempt,
    )  # fmt: skip
    assert not result.failed and progress.disturbed == PREEMPTIONS
    assert all_rows(progress.store.root) == locally(tiny, *LONG)


@pytest.mark.service
def test_twenty_nodes_that_go_away_in_ray_change_no_bit(ray_cluster: Any, tiny: Path) -> None:
    progress = Progress(tiny.parent / "runs")

    def take_away(event: Event) -> None:
        if progress.is_due():
            ray_cluster.remove_node(*ray_cluster.worker_nodes, allow_graceful=False)
            joined(ray_cluster, 2)
            progress.note()

    result = api.run_ablation(
        tiny, seeds=1, overrides=LONG, runs=progress.store.root, tracking=False, executor=RayExecutor(1),
        on_event=take_away,
    )  # fmt: skip
    assert not result.failed and progress.disturbed == PREEMPTIONS
    assert all_rows(progress.store.root) == locally(tiny, *LONG)


@pytest.mark.service
def test_a_storm_over_four_nodes_trains_every_run_once(ray_cluster: Any, tiny: Path) -> None:
    """`GPT2LAB_STORM_RUNS` of them, where 200 take too long."""
    killed, ended, seeds = 0, list[str](), STORM_RUNS // 2
    [first] = ray_cluster.worker_nodes
    nodes = [first, *(joined(ray_cluster, 1) for _ in range(3))]
    last = time.monotonic()

    def strike(event: Event) -> None:
        nonlocal killed, last
        if time.monotonic() > last + STORM_SECONDS:
            ray_cluster.remove_node(nodes.pop(0), allow_graceful=False)
            nodes.append(joined(ray_cluster, 1))
            killed, last = killed + 1, time.monotonic()

    class Counted(RayExecutor):
        def submit(self, job: Job) -> None:
            assert folder_of(job).result() is None  # so that nothing is trained to its end again
            super().submit(job)

        def collect(self, run_id: str) -> Any:
            ending = super().collect(run_id)
            ended.extend([run_id] if ending == "done" else [])
            return ending

    there, here = tiny.parent / "there", tiny.parent / "here"
    try:
        result = api.run_ablation(tiny, seeds=seeds, runs=there, tracking=False, executor=Counted(4), on_event=strike)
    finally:
        for node in nodes[1:]:
            ray_cluster.remove_node(node)
    print(f"{len(ended)} runs, {killed} nodes killed")
    # not counted: runs whose node was killed when all of their files had come back
    assert not result.failed and len(ended) == len(set(ended)) and killed
    assert sum(run.status() == "finished" for run in Store(there).runs()) == 2 * seeds
    api.run_ablation(tiny, seeds=seeds, runs=here, tracking=False, executor=LocalExecutor(2))
    assert all_rows(there) == all_rows(here)
