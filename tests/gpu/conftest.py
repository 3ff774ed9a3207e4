"""What tests on a CUDA device share. Run them with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import write_text

from gpt2lab.model import ModelConfig, build_model
from gpt2lab.optim import OptimConfig, build_optimizers
from gpt2lab.training import TrainState
from gpt2lab.training.precision import loss_scaler

VOCABULARY, BLOCK, SEQUENCES = 97, 32, 8

PRESET = """
model: {{n_layer: 2, n_head: 2, n_embd: 32, block_size: 32, vocab_size: 256, dropout: 0.1}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 4}}
training: {{steps: 60, batch_tokens: 256, threads: 1, checkpoint_every_steps: 20}}
evaluation: {{every_steps: 20, tokens: 512, context_tokens: 128}}
scale: {{smallest_effect: 0.05}}
"""


@pytest.fixture(autouse=True)
def plain_arithmetic() -> Iterator[None]:
    """A training tells torch how to multiply, and that stays: every test begins and ends as torch does."""

    def reset() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)

    reset()
    yield
    reset()


@dataclass
class RandomBatches:
    """Batches drawn from (seed, step)."""

    seed: int = 0

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        drawn = np.random.default_rng([self.seed, step]).integers(0, VOCABULARY, (SEQUENCES, BLOCK + 1))
        return drawn[:, :-1].copy(), drawn[:, 1:].copy()


@pytest.fixture
def batches() -> RandomBatches:
    return RandomBatches()


@pytest.fixture
def optim() -> OptimConfig:
    return OptimConfig(lr=3e-3, warmup_steps=2)


def make_state(optim: OptimConfig, *, device: str = "cuda", precision: Any = "fp32", **model: Any) -> TrainState:
    """A small model at its start; the same weights on every device."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": BLOCK, "vocab_size": VOCABULARY}
    built = build_model(ModelConfig(**(sizes | model)), seed=1, device=device)
    scaler = loss_scaler(precision, torch.device(device))
    return TrainState(built, build_optimizers(optim, built.params()), scaler=scaler)


@pytest.fixture
def fresh() -> Callable[..., TrainState]:
    return make_state


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A tiny preset over some words; its device is the default, hence the GPU."""
    text = write_text(tmp_path / "text.txt", 4000)
    (tmp_path / "preset.yaml").write_text(PRESET.format(text=text))
    return tmp_path / "preset.yaml"
