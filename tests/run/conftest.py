"""A tiny ablation over local text, and servers to train and track on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from postgres_server import postgres, postgres_cluster  # noqa: F401
from ray_cluster import ray_cluster  # noqa: F401
from slurm_cluster import cluster, slurm_cluster  # noqa: F401
from tiny import write_ablation


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The ablation's file, beside its preset and text."""
    return write_ablation(tmp_path)


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's commands, without a cluster."""
    made = FakeSlurm(tmp_path / "slurm")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gpt2lab.executors.slurm.QUEUE_SECONDS", 0.2)
    return made


@pytest.fixture
def gpt2lab(gpt2lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Call the command line in this process; -> exit code, everything printed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*words: str) -> tuple[int, str]:
        answer = gpt2lab(*words)
        return answer.code, answer.out + answer.err

    return call
