"""Studies and sweeps on a Ray cluster and through Slurm are those of this machine, whatever is taken away meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from ray_cluster import ray_cluster  # noqa: F401
from slurm_cluster import Slurm, slurm_cluster  # noqa: F401
from workers import SWEEP, replace_in, rows_of

from gpt2lab.executors import slurm
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
TRIALS = "trials: 3\nsampler: {name: tpe, startup: 2}\nenqueue: [{}]\n"
TUNE = "tune: {space: {optim.lr: {low: 0.25, high: 32, log: true, relative: true}}, trials: 2, sampler: qmc}\n"


@pytest.fixture(params=["ray", "fake slurm"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of an executor that can be used."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
        return "ray"
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 0.2)
    for name, value in FakeSlurm(tmp_path / "slurm").environment.items():
        monkeypatch.setenv(name, value)
    return "slurm"


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
