"""Runs on GPUs, as far as it can be tested without one: how they are shared out, and that none moves to a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_plan import Planned

from gpt2lab.errors import EnvironmentFault
from gpt2lab.executors import local
from gpt2lab.executors.driver import executor_for
from gpt2lab.experiments.ablation import job_of
from gpt2lab.planning import machine
from gpt2lab.planning.machine import Machine, estimate_speed
from gpt2lab.runner import Job, StopRequest, execute
from gpt2lab.store import Store
from gpt2lab.training import TrainingConfig


def test_more_runs_than_gpus_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs at once on two GPUs: the third is on the first GPU again, not on one that is not there."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen: list[str] = []
    monkeypatch.setattr(
        local, "started", lambda start, job, **environment: seen.append(environment["CUDA_VISIBLE_DEVICES"])
    )
    here = Machine("cuda", "a GPU", 1, 3, 1e12, "a test", gpus=2)
    executor = executor_for(here)
    for name in "abc":
        executor.submit(Job(str(tmp_path), name * 16, "", {}, "", 1.0, 1))
    assert seen == ["0", "1", "0"]


def test_a_run_that_was_planned_for_a_gpu_is_refused_without(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name says cuda; on a CPU it would be another run."""
    plan = planned()
    store = Store(tmp_path / "elsewhere")
    job: Any = job_of(plan.runs()[0], store, plan)
    moved = Job(**{**vars(job), "identity": {**job.identity, "device": "cuda"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match="planned on cuda, but this process finds cpu alone"):
        execute(moved, StopRequest())
    assert not store.run(job.run_id).rows()


def test_a_gpus_step_takes_at_least_as_long_as_asking_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_flops", lambda device, precision, threads, size: 8e14 if size > 4096 else 1e12)
    store, cuda = Store(tmp_path), torch.device("cuda")
    large = estimate_speed(store, cuda, 1, 1e9, TrainingConfig(batch_tokens=524_288))[0]
    assert large == pytest.approx(4e14, rel=0.02)
    small = estimate_speed(store, cuda, 1, 5e6, TrainingConfig(batch_tokens=1024))[0]
    assert 5e6 * 1024 / small == pytest.approx(machine.GPU_STEP_SECONDS, rel=0.01)
