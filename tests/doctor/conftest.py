"""Tiny runs to examine, trained in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_text

from gpt2lab.config import load_config
from gpt2lab.data.shards import prepare
from gpt2lab.planning.ablation import Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import make_run
from gpt2lab.runner import Job, StopRequest, execute
from gpt2lab.store import RunFolder, Store

PRESET = """
model: {{n_layer: 2, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 256}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 10}}
training: {{steps: 60, batch_tokens: 128, threads: 1, device: cpu, checkpoint_every_steps: 60}}
evaluation: {{every_steps: 20, tokens: 256}}
"""
Trained = Callable[..., RunFolder]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """Train the tiny preset with overrides; -> its folder."""
    preset = tmp_path / "preset.yaml"
    preset.write_text(PRESET.format(text=write_text(tmp_path / "text.txt", 4000)))
    machine = Machine("cpu", "cpu", 1, 1, 1e9, "a test")

    def train(*overrides: str) -> RunFolder:
        config = load_config(preset, overrides)
        data = prepare(config.data)
        run = make_run(Arm("tiny", {}, config), 0, data, machine)
        store = Store(tmp_path / "runs")
        execute(Job(str(store.root), run.id, run.config.to_yaml(), run.identity, str(data.path), 1e6, 1), StopRequest())
        return store.run(run.id)

    return train
