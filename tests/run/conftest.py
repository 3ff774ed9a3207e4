"""A tiny ablation over local text: two arms of a one-layer model that train in about a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from postgres_server import postgres, postgres_cluster  # noqa: F401
from ray_cluster import ray_cluster  # noqa: F401
from slurm_cluster import cluster, slurm_cluster  # noqa: F401
from workers import write_text

TINY = """
model: {{n_layer: 2, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 256, dropout: 0.1}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 4}}
training: {{steps: 24, batch_tokens: 64, threads: 1, checkpoint_every_steps: 6, device: cpu}}
evaluation: {{every_steps: 8, tokens: 256, context_tokens: 64}}
scale: {{smallest_effect: 0.05}}
"""
ABLATION = """
ablation: tiny
question: Does rotary help a tiny model?
base: {base}
baseline: learned
arms:
  learned: {{}}
  rotary: {{model.position: rotary}}
seeds: 2
evaluate: {{contexts: [0.5, 1, 2]}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The ablation's file, beside its preset and text."""
    (tmp_path / "tiny.yaml").write_text(TINY.format(text=write_text(tmp_path / "text.txt")))
    file = tmp_path / "ablation.yaml"
    file.write_text(ABLATION.format(base=tmp_path / "tiny.yaml"))
    return file


@pytest.fixture
def gpt2lab(gpt2lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Call the command line in this process; -> exit code, everything printed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*words: str) -> tuple[int, str]:
        answer = gpt2lab(*words)
        return answer.code, answer.out + answer.err

    return call
